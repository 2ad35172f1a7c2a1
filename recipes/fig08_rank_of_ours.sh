#!/usr/bin/env bash
# Figures 8 and 13, MaxRank of the full model and of Inheritune: bash recipes/fig08_rank_of_ours.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig08 fig13 "$@"
