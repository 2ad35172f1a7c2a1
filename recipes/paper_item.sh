#!/usr/bin/env bash
# A table or figure of the paper, our numbers beside its own; what table*.sh and fig*.sh call:
#   bash recipes/paper_item.sh ITEM ...        names of recipes/paper/items.yaml: table5, fig05, openllama_commonsense
# Locally it runs what is missing (data, training, attention, tasks), then draws; with everything there it only draws.
#   SUBMIT=1     submit Slurm jobs for what is missing, with their dependencies, and leave; afterwards run this again
#   DRAW=1       run nothing: draw what is there, the rest is "not run"
#   REHEARSE=1   at small scale on two CPU cores; marked REHEARSAL
#   SEED=0 PROCS=2   seed of the runs; processes (ranks) to train with (on a single GPU 1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for item in "${@:--}"; do
  case $item in -*) sed -n '2,8p' recipes/paper_item.sh >&2 && exit 2 ;; esac
done
SEED=${SEED:-0}
[ "${REHEARSE:-0}" = 0 ] || export DS_ACCELERATOR=cpu

# shellcheck source=recipes/run_missing.sh
source recipes/run_missing.sh
use_site_folders
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
# shellcheck disable=SC2119 # no further requirements
setup_environment
PROCS=${PROCS:-$(fitting_procs)}

# One line for each thing that has to be run: verb, experiment, run, the lines it waits for, options.
missing() { inheritune table "$1" --missing --seed "$SEED"; }

for item in "$@"; do # an unknown one is refused before anything is run
  missing "$item" > /dev/null
done

for item in "$@"; do
  if [ "${SUBMIT:-0}" != 0 ] && [ "$item" != toy ]; then # which takes minutes on a CPU
    listed=$(missing "$item")
    if [ -n "$listed" ]; then
      inheritune submit "$item" --seed "$SEED"
      continue
    fi
  fi
  if [ "${DRAW:-0}" = 0 ]; then
    if [ "${REHEARSE:-0}" = 0 ] && on_login_node && [ "$item" != toy ] && [ -n "$(missing "$item")" ]; then
      echo "$item lacks runs, and this is a Slurm login node: SUBMIT=1 submits them as jobs, DRAW=1 draws what is there" >&2
      exit 2
    fi
    run_missing "$item"
  fi
  case $item in
    fig*) inheritune figure "$item" --seed "$SEED" ;;
    *) inheritune table "$item" --seed "$SEED" ;;
  esac
done
