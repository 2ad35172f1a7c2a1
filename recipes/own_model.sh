#!/usr/bin/env bash
# The whole method on a pretrained model of yours: its experiment is drafted, its layers are analyzed, and it is cut to half by each
# rule (first layers, by cost, by influence, all but a window). Each cut is healed (trained) for the file's number of steps; the first
# layers are also grown against the model, and compared with a random start and with the same layers distilled. Then the table, with
# the loss right after each cut and after healing, the plots and a portable checkpoint. Each step is timed.
#   bash recipes/own_model.sh MODEL 'TEXT' [OUT.yaml]    MODEL: a folder, a GGUF file or a Hub id; TEXT: a glob, in quotes
#   STEPS=      steps of each run (default: what fits the text)     PROCS=1     processes (ranks); on several GPUs one for each
#   SEQUENCES=16   sequences that the layers are measured on
# The same command resumes: the experiment that it drafted is kept, and finished steps are not done again.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  sed -n '2,9p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
model=$1 text=$2 out=${3:-mine.yaml}
# shellcheck source=recipes/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_for_caller --cpus-per-task=4 --time=04:00:00

run_step init --model "$model" --text "$text" --out "$out" ${STEPS:+--steps "$STEPS"}
run_step check "$out"
run_step plan "$out"
run_step prepare "$out"
name=$(basename "${out%.*}")
runs=${INHERITUNE_ROOT:-$repository}/runs/$name/seed0
[ -f "$runs/reference/attention.jsonl" ] || run_step analyze --model reference --data "$out" --sequences "${SEQUENCES:-16}"
run_step grow "$out" --run inheritune --procs "${PROCS:-1}"
run_step train "$out" --run random,distilled,cost,influence,window --procs "${PROCS:-1}"
run_step table "$out"
run_step figure "$out"
exported=$name-small
# an export of earlier runs is refused by name
if [ ! -f "$exported/config.json" ] || [ "$runs/inheritune/DONE" -nt "$exported/config.json" ]; then
  run_step export "$runs/inheritune" --to "$exported"
fi
print_times
