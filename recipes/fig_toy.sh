#!/usr/bin/env bash
# The authors' toy demonstration, minutes on a CPU the first time: bash recipes/fig_toy.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" toy "$@"
