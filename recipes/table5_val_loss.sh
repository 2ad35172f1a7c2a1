#!/usr/bin/env bash
# Table 5, validation loss on OpenWebText: bash recipes/table5_val_loss.sh (SUBMIT=1, DRAW=1, REHEARSE=1: paper_item.sh)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/paper_item.sh" table5 "$@"
