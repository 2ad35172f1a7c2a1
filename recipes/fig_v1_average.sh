#!/usr/bin/env bash
# Version 1, mean of nine tasks and MMLU; version 2, depth and epochs: bash recipes/fig_v1_average.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" v1_average "$@"
