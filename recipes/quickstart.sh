#!/usr/bin/env bash
# The main job at small scale, on two CPU cores, minutes after the set-up: a reference model trained on real text, its attention
# measured, its first layers inherited and grown until they reach its validation loss, and the same size from random beside it.
# The same verbs run the paper's sizes. Finished steps are not done again; delete runs/quickstart to start over.
#   PROCS=2      processes (ranks) to train with (on a single GPU 1)      SEED=0      another seed is another set of runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SEED=${SEED:-0}

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
refuse_login_node --cpus-per-task="${PROCS:-2}" --time=00:30:00
setup_environment "$@"
check_gpu
PROCS=${PROCS:-$(fitting_procs)}
started=$SECONDS
inheritune() { python -m inheritune "$@"; }
say() { printf '\n== %s\n' "$*"; }
runs=$(python -c "import sys; from inheritune.config.experiment import load_experiment; from inheritune.files.rundir import RunDir
print(RunDir.of(load_experiment('quickstart'), '', int(sys.argv[1])).path)" "$SEED")

say "1/6 prepare: the Python standard library's text becomes tokens"
inheritune prepare quickstart

say "2/6 train the reference: an 8-layer GPT-2 from random, ZeRO 3 on $PROCS ranks"
inheritune train quickstart --run reference --seed "$SEED" --procs "$PROCS"

say "3/6 analyze the reference's attention: which layers are lazy?"
inheritune analyze --model "$runs/reference/final" --data quickstart

say "4/6 inherit its first layers, train, and grow until parity or the last stage"
inheritune grow quickstart --run inheritune --seed "$SEED" --procs "$PROCS"

say "5/6 the baseline: the same size from random, at the same steps and with the reference's steps added"
inheritune train quickstart --run random --seed "$SEED" --procs "$PROCS"
inheritune train quickstart --run random_longer --seed "$SEED" --procs "$PROCS"

say "6/6 what came out"
inheritune analyze --model "$runs/inheritune" --data quickstart --ranks-only
inheritune figure quickstart --seed "$SEED"
inheritune table quickstart --seed "$SEED"
echo "Done in $((SECONDS - started)) s. Everything lies under $runs"
