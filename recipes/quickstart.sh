#!/usr/bin/env bash
# The main job at small scale, on two CPU cores, minutes after the set-up: a reference model trained on real text, its attention
# measured, its first layers inherited and grown until they reach its validation loss, and the same size from random beside it.
# The same verbs run the paper's sizes. Finished steps are not done again; delete runs/quickstart to start over.
#   PROCS=2      processes (ranks) of the reference, on GPUs of all runs: they share its states under ZeRO 3 (1 on CPUs and on a single
#                GPU, where two are slower)
#   SEED=0       another seed is another set of runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SEED=${SEED:-0}

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
refuse_login_node --cpus-per-task="${PROCS:-2}" --time=00:30:00
setup_environment "$@"
check_gpu
exec python recipes/quickstart.py "$SEED" ${PROCS:+"$PROCS"}
