#!/usr/bin/env bash
# Figure 3, lazy layers as a start: bash recipes/fig03_lazy_start.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig03 "$@"
