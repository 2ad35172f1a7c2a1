#!/usr/bin/env bash
# Figures 23 and 24, a lazy deep part; 200K steps: bash recipes/fig23_lazy_deep.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig23 fig24 "$@"
