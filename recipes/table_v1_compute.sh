#!/usr/bin/env bash
# Version 1, what pre-training cost: bash recipes/table_v1_compute.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" v1_compute "$@"
