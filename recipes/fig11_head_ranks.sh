#!/usr/bin/env bash
# Figures 11, 21 and 22, rank of each head in models of others: bash recipes/fig11_head_ranks.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig11 fig21 fig22 "$@"
