#!/usr/bin/env bash
# Version 1, language understanding: bash recipes/table_openllama_understanding.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" openllama_understanding "$@"
