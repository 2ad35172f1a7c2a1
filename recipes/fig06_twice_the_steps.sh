#!/usr/bin/env bash
# Figure 6, against twice the steps: bash recipes/fig06_twice_the_steps.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig06 "$@"
