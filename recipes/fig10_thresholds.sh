#!/usr/bin/env bash
# Figure 10, MaxRank at other thresholds: bash recipes/fig10_thresholds.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig10 "$@"
