#!/usr/bin/env bash
# Figure 1, MaxRank per layer: bash recipes/fig01_max_rank.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig01 "$@"
