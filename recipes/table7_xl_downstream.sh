#!/usr/bin/env bash
# Table 7, XLarge zero-shot: bash recipes/table7_xl_downstream.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table7 "$@"
