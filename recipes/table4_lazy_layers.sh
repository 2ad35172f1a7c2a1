#!/usr/bin/env bash
# Table 4, four layers of GPT-2 Small from different depths: bash recipes/table4_lazy_layers.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table4 "$@"
