#!/usr/bin/env bash
# Table 3, which modules are inherited: bash recipes/table3_submodules.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table3 "$@"
