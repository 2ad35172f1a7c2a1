#!/usr/bin/env bash
# A real model without the Hub: SmolLM2-135M-Instruct (30 layers), from a Python package. Its layers are analyzed, it is cut to half by
# each rule, and each cut is healed (trained) for 200 steps, as is the whole model, which is the control. Each step is timed; the same
# command resumes. About four hours on two cores and 26 GB; a GPU is used where there is one.
#   bash recipes/real_model.sh [FOLDER [EXPERIMENT]]   FOLDER: model and text (default: real_model). EXPERIMENT: a file like
#                                                      recipes/evidence/smollm2.yaml; the results go to the folder beside it
set -euo pipefail
if [ $# -gt 2 ] || [[ ${1:-} = -* ]]; then
  sed -n '2,6p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
# shellcheck source=recipes/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
folder=${1:-real_model} experiment=$(realpath "${2:-$repository/recipes/evidence/smollm2.yaml}")
setup_for_caller --cpus-per-task=4 --time=08:00:00

python "$repository/recipes/evidence/real_model.py" get "$folder"
cd "$folder"
name=$(basename "${experiment%.*}")
run_step prepare "$experiment"
[ -f "${INHERITUNE_ROOT:-$repository}/runs/$name/seed0/reference/attention.jsonl" ] ||
  run_step analyze --model reference --data "$experiment" --sequences 8
[ -f ranks/attention.jsonl ] || run_step analyze --model reference --data "$experiment" --ranks-only --out ranks
run_step grow "$experiment" --run first
run_step train "$experiment" --run trained_on,distilled,cost,influence,window
run_step grow "$experiment" --run stacked
python "$repository/recipes/evidence/real_model.py" collect "$experiment"
print_times
