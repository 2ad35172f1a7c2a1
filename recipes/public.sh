#!/usr/bin/env bash
# A public model: its layers are analyzed, it is cut to half by each rule (first layers, by cost, by influence, all but a window), and
# each cut is healed (trained) for the steps of the file. The first layers are also grown against it, and compared with a random start
# and with the same layers distilled. Then the table, with the loss right after each cut and after healing, and the plots. Each step
# is timed, and the same command resumes.
#   bash recipes/public.sh NAME        NAME: a file of recipes/public (gpt2, smollm2_135m, qwen3_0p6b, llama32_1b); needs the Hub
#   PROCS=1      processes (ranks); on several GPUs one for each     SEQUENCES=100   sequences that the layers are measured on
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
experiment=recipes/public/${1:-}.yaml
if [ $# != 1 ] || [[ $1 = */* ]] || [ ! -f "$experiment" ]; then
  sed -n '2,7p' recipes/public.sh >&2
  exit 2
fi
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
[ "${REHEARSE:-0}" != 0 ] || refuse_login_node --gpus=1 --time=12:00:00
# shellcheck disable=SC2119 # no further requirements
setup_environment

run_step fetch "$experiment"
run_step check "$experiment"
run_step plan "$experiment" --gpus 1
run_step prepare "$experiment"
run_step analyze --model reference --data "$experiment" --sequences "${SEQUENCES:-100}"
run_step grow "$experiment" --run inheritune --procs "${PROCS:-1}"
run_step train "$experiment" --run random,distilled,cost,influence,window --procs "${PROCS:-1}"
run_step table "$experiment"
run_step figure "$experiment"
print_times
