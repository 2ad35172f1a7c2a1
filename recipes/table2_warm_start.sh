#!/usr/bin/env bash
# Table 2, starts from trained models: bash recipes/table2_warm_start.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table2 "$@"
