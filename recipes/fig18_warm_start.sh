#!/usr/bin/env bash
# Figure 18, starts from trained models: bash recipes/fig18_warm_start.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig18 "$@"
