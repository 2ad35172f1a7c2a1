#!/usr/bin/env bash
# A table or figure of the paper, our numbers beside its own; what table*.sh and fig*.sh call:
#   bash recipes/paper_item.sh ITEM ...        names of recipes/paper/items.yaml: table5, fig05, openllama_commonsense
# Locally it runs what is missing (data, training, attention, tasks), then draws; with everything there it only draws.
#   SUBMIT=1     submit Slurm jobs for what is missing, with their dependencies, and leave; afterwards run this again
#   DRAW=1       run nothing: draw what is there, the rest is "not run"
#   REHEARSE=1   in small on two CPU cores; marked REHEARSAL
#   SEED=0 PROCS=2   seed of the runs; processes (ranks) to train with
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { echo "usage: bash recipes/paper_item.sh ITEM ..." >&2 && exit 2; }
SEED=${SEED:-0} PROCS=${PROCS:-2}

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
# shellcheck disable=SC2119 # no further requirements
setup_environment
inheritune() { python -m inheritune "$@"; }

# One line for each thing that has to be run: verb, experiment, run, the lines it waits for, options.
missing() { inheritune table "$1" --missing --seed "$SEED"; }

# RUN/stage2, RUN@10000: a stage or weights kept on the way, which evaluate takes as a checkpoint with a results.json of its own.
evaluate() {
  local experiment=$1 run=$2 folder="${INHERITUNE_ROOT:-.}/runs"
  if [ "${REHEARSE:-0}" != 0 ]; then folder+=/rehearsal; fi
  folder+=/$(basename "$experiment")/seed$SEED/${run%@*}
  case $run in
    *@*)
      folder+=/at_$(printf %08d "${run#*@}")
      inheritune evaluate "$experiment" --model "$folder" --out "$folder/results.json"
      ;;
    */stage*) inheritune evaluate "$experiment" --model "$folder/final" --out "$folder/results.json" ;;
    *) inheritune evaluate "$experiment" --run "$run" --seed "$SEED" ;;
  esac
}

run_one() {
  local verb=$1 experiment=$2 run=$3 options=("${@:5}")
  case $verb in
    prepare) inheritune prepare "$experiment" ;;
    train | grow) inheritune "$verb" "$experiment" --run "$run" --seed "$SEED" --procs "$PROCS" ;;
    evaluate) evaluate "$experiment" "$run" ;;
    analyze) inheritune analyze --model "$run" --data "$experiment" --seed "$SEED" "${options[@]}" ;;
  esac
}

# Asks again after each: a growth that ends early leaves no further stage to look at.
run_missing() {
  local line last='' words
  while line=$(missing "$1" | sed -n 1p) && [ -n "$line" ]; do
    if [ "$line" = "$last" ]; then
      echo "this ended without an error but is still missing: $line" >&2
      exit 1
    fi
    last=$line
    printf '\n== %s\n' "$line"
    read -ra words <<< "$line"
    run_one "${words[@]}"
  done
}

# The number of the job that a script of slurm/ submits, or of the one of that name that is queued already.
submit() {
  local printed
  printed=$(bash "$@")
  echo "$printed" >&2
  echo "$printed" | sed -n 's/^submitted job //p; s/^not submitted: .*queued already (\([0-9]*\).*/\1/p' | sed -n 1p
}

submit_missing() {
  local lines=() jobs=() line words numbers number waits options id
  local -A evaluated=()
  mapfile -t lines < <(missing "$1")
  for line in "${lines[@]}"; do
    read -ra words <<< "$line"
    waits='' id=''
    IFS=, read -ra numbers <<< "${words[3]//-/}"
    for number in "${numbers[@]}"; do [ -z "${jobs[number]:-}" ] || waits+=":${jobs[number]}"; done
    options=()
    [ -z "$waits" ] || options=(-- "--dependency=afterok$waits")
    printf '\n== %s\n' "$line"
    case ${words[0]} in
      prepare)
        [ "${REHEARSE:-0}" != 0 ] || bash slurm/fetch.sh "${words[1]}"
        id=$(submit slurm/prepare.sh "${words[1]}")
        ;;
      train | grow) id=$(submit "slurm/${words[0]}.sh" "${words[1]}" "${words[2]}" --seed "$SEED" "${options[@]}") ;;
      evaluate)
        evaluated[${words[1]}]+=$waits
        case ${words[2]} in *@*) echo "kept weights are no run: on a node with a GPU, run this script without SUBMIT" ;; esac
        ;;
      analyze) id=$(FORCE=1 submit slurm/analyze.sh "${words[2]}" "${words[1]}" --seed "$SEED" "${words[@]:4}" "${options[@]}") ;;
    esac
    jobs[${#jobs[@]} + 1]=$id
  done
  for line in "${!evaluated[@]}"; do # one array over all runs of the experiment
    printf '\n== evaluate %s\n' "$line"
    options=(--seed "$SEED")
    [ -z "${evaluated[$line]}" ] || options+=(-- "--dependency=afterok${evaluated[$line]}")
    FORCE=1 submit slurm/evaluate.sh "$line" "${options[@]}" > /dev/null
  done
  [ "${#lines[@]}" = 0 ] || echo "When these jobs are done, run this again: it then only draws."
}

for item in "$@"; do
  if [ -n "${SUBMIT:-}" ] && [ -n "$(missing "$item")" ]; then
    submit_missing "$item"
    continue
  fi
  [ -n "${DRAW:-}" ] || run_missing "$item"
  case $item in
    fig*) inheritune figure "$item" --seed "$SEED" ;;
    *) inheritune table "$item" --seed "$SEED" ;;
  esac
done
