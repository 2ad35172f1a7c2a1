#!/usr/bin/env bash
# Table 6, model sizes: bash recipes/table6_model_configs.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table6 "$@"
