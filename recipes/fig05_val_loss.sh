#!/usr/bin/env bash
# Figures 5 and 20, loss of full size, same size, Inheritune; rounds of growth: bash recipes/fig05_val_loss.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig20 fig05 "$@"
