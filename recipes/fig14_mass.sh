#!/usr/bin/env bash
# Figures 14, 15 and 16, columns that hold the attention; other text: bash recipes/fig14_mass.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig14 fig15 fig16 "$@"
