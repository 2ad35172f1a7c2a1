#!/usr/bin/env bash
# Figures 9 and 12, attention maps: bash recipes/fig09_attention_maps.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" fig09 fig12 "$@"
