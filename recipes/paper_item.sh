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
[ $# -gt 0 ] || { echo "usage: bash recipes/paper_item.sh ITEM ..." >&2 && exit 2; }
SEED=${SEED:-0}
[ "${REHEARSE:-0}" = 0 ] || export DS_ACCELERATOR=cpu

if command -v sbatch > /dev/null; then # runs and data lie where the scripts of slurm/ keep them
  # shellcheck source=slurm/site.sh disable=SC2030,SC2031 # nothing else of it is wanted
  folders=$(: "${INHERITUNE_ROOT:=}" "${HF_HOME:=}" && source slurm/site.sh && printf '%s\n' "${INHERITUNE_ROOT:-}" "${HF_HOME:-}")
  mapfile -t folders <<< "$folders" # the substitution drops empty lines at its end: both folders may be the default
  # shellcheck disable=SC2031
  [ -z "${folders[0]}" ] || export INHERITUNE_ROOT="${folders[0]}"
  # shellcheck disable=SC2031
  [ -z "${folders[1]:-}" ] || export HF_HOME="${folders[1]}"
fi
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
# shellcheck disable=SC2119 # no further requirements
setup_environment
PROCS=${PROCS:-$(fitting_procs)}
inheritune() { python -m inheritune "$@"; }

# One line for each thing that has to be run: verb, experiment, run, the lines it waits for, options.
missing() { inheritune table "$1" --missing --seed "$SEED"; }

run_one() {
  local verb=$1 experiment=$2 run=$3 options=("${@:5}")
  case $verb in
    toy) python -m inheritune.paper.toy "$SEED" ;;
    prepare) inheritune prepare "$experiment" ;;
    train | grow) inheritune "$verb" "$experiment" --run "$run" --seed "$SEED" --procs "$PROCS" ;;
    evaluate) inheritune evaluate "$experiment" --run "$run" --seed "$SEED" ;;
    analyze) inheritune analyze --model "$run" --data "$experiment" --seed "$SEED" "${options[@]}" ;;
  esac
}

# Asks again after each: a growth that ends early leaves no further stage to look at.
run_missing() {
  local last='' listed lines line words more
  listed=$(missing "$1")
  while [ -n "$listed" ]; do
    mapfile -t lines <<< "$listed"
    if [ "${lines[0]}" = "$last" ]; then
      echo "this ended without an error but is still missing: $last" >&2
      exit 1
    fi
    last=${lines[0]}
    read -ra words <<< "$last"
    if [ "${REHEARSE:-0}" != 0 ] && [[ ${words[0]} = train || ${words[0]} = evaluate ]]; then
      for line in "${lines[@]:1}"; do # such runs are shorter than their start-up: those of one experiment share it
        read -ra more <<< "$line"
        [ "${more[*]:0:2}" = "${words[*]:0:2}" ] || break
        words[2]+=,${more[2]}
      done
    fi
    printf '\n== %s\n' "${words[*]:0:3}"
    run_one "${words[@]}"
    listed=$(missing "$1")
  done
}

for item in "$@"; do
  if [ -n "${SUBMIT:-}" ] && [ "$item" != toy ]; then # which takes minutes on a CPU
    listed=$(missing "$item")
    if [ -n "$listed" ]; then
      inheritune submit "$item" --seed "$SEED"
      continue
    fi
  fi
  if [ -z "${DRAW:-}" ]; then
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
