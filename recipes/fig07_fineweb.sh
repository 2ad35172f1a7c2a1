#!/usr/bin/env bash
# Figure 7, training loss on FineWeb-Edu: bash recipes/fig07_fineweb.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig07 "$@"
