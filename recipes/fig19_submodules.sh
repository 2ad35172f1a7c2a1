#!/usr/bin/env bash
# Figure 19, which modules are inherited: bash recipes/fig19_submodules.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig19 "$@"
