#!/usr/bin/env bash
# Figure 17, distillation: bash recipes/fig17_distillation.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig17 "$@"
