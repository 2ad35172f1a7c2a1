# Sourced by paper_item.sh and claim.sh: runs what is missing, one thing after the other.
#   The caller defines `missing WHAT`, which prints one line for each thing that has to be run: verb, experiment, run, the lines it
#   waits for, options. SEED and PROCS: seed of the runs, and processes to train with.
# shellcheck shell=bash
set -euo pipefail

# Runs and data are where the scripts of slurm/ keep them.
use_site_folders() {
  local folders
  command -v sbatch > /dev/null || return 0
  # shellcheck source=slurm/site.sh disable=SC2030,SC2031 # nothing else of it is wanted
  folders=$(: "${INHERITUNE_ROOT:=}" "${HF_HOME:=}" && source slurm/site.sh && printf '%s\n' "${INHERITUNE_ROOT:-}" "${HF_HOME:-}")
  mapfile -t folders <<< "$folders" # the substitution drops empty lines at its end: both folders may be the default
  # shellcheck disable=SC2031
  [ -z "${folders[0]}" ] || export INHERITUNE_ROOT="${folders[0]}"
  # shellcheck disable=SC2031
  [ -z "${folders[1]:-}" ] || export HF_HOME="${folders[1]}"
  return 0
}

inheritune() { python -m inheritune "$@"; }

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
