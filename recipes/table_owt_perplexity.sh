#!/usr/bin/env bash
# Version 1, perplexity of the OpenWebText models: bash recipes/table_owt_perplexity.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" owt_perplexity "$@"
