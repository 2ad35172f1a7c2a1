#!/usr/bin/env bash
# Table 1, zero-shot accuracy of models trained on FineWeb-Edu: bash recipes/table1_fineweb_downstream.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table1 "$@"
