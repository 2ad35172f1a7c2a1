#!/usr/bin/env bash
# Figure 2, lazy layers of GPT-2 Small: bash recipes/fig02_lazy_small.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig02 "$@"
