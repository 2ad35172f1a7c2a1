#!/usr/bin/env bash
# Version 1, MMLU after fresh and repeated tokens: bash recipes/table_mmlu_tokens.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" mmlu_tokens "$@"
