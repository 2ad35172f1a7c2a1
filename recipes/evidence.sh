#!/usr/bin/env bash
# Tests whether the effect shows at a scale that anyone can repeat. It trains the reference, Inheritune, a random start of the
# same size and the baselines with several seeds, paired by seed. It replaces the table and plots of recipes/evidence/$SCALE.
#   SEEDS="11 12 13"   three or more for an interval; finished results of other seeds are counted too
#   ARMS=core          reference, random start (also with the reference's steps added), Inheritune, last half. Or all, or names
#                      of runs: their numbers are added to the finished ones if the reference has the same bits
#   SCALE=cpu          gpu: GPT-2 Small's shape on one GPU. deep: 24 layers, with hypotheses about lazy layers, 34 core-hours
#   BUDGET_HOURS=      save and stop after this many hours; the same command resumes (0.15 is 9 minutes)
#   JOBS=              runs in parallel, one thread each; default: one per core, one on a GPU
#   REHEARSE=1         takes minutes, is marked REHEARSAL and writes to runs/rehearsal
set -euo pipefail
START=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCALE=${SCALE:-cpu} ARMS=${ARMS:-core} SEEDS=${SEEDS:-11 12 13} BUDGET_HOURS=${BUDGET_HOURS:-}
[[ $SCALE =~ ^(cpu|gpu|deep)$ && $ARMS =~ ^[a-z0-9_\ ]+$ && $BUDGET_HOURS =~ ^([0-9]+(\.[0-9]*)?|\.[0-9]+)?$ && $SEEDS =~ ^[0-9\ ]+$ && ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || {
  sed -n '2,10p' recipes/evidence.sh >&2
  exit 2
}
export EXPERIMENT=recipes/evidence/$SCALE.yaml

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
options=(--cpus-per-task="${JOBS:-4}" --time=04:00:00)
[ "$SCALE" != gpu ] || options+=(--gpus=1)
[ "${REHEARSE:-0}" != 0 ] || refuse_login_node "${options[@]}"
# shellcheck disable=SC2119 # no further requirements
setup_environment
if [ "$SCALE" != gpu ] || [ "${REHEARSE:-0}" != 0 ]; then
  JOBS=${JOBS:-$(nproc)} # before the next line: nproc reads OMP_NUM_THREADS
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
else
  check_gpu
  JOBS=${JOBS:-1}
  python -c 'from inheritune.runtime.devices import get_device; raise SystemExit(get_device().type != "cuda")' || {
    echo "SCALE=gpu needs a GPU, and there is none here; SCALE=cpu takes about an hour and a half on two cores" >&2
    exit 2
  }
fi
PYTHON_PACKAGES=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') # gpu.yaml and deep.yaml read their text there
END=0
[ -z "$BUDGET_HOURS" ] || END=$(python -c 'import sys; print(int(sys.argv[1]) + int(3600 * float(sys.argv[2])))' "$START" "$BUDGET_HOURS")
export PYTHON_PACKAGES END

# Print what is missing and can run now, one per line: seed, verb and its arguments.
missing() {
  # shellcheck disable=SC2086 # seeds are words
  python recipes/evidence/summary.py missing "$EXPERIMENT" "$ARMS" $SEEDS
}

# Run a verb. At the end of the budget it receives the signal that Slurm sends before a time limit.
limited() {
  local left=0 code=0
  if [ "$END" != 0 ]; then
    left=$((END - $(date +%s)))
    [ "$left" -gt 0 ] || return 0
  fi
  timeout --foreground --preserve-status --signal=USR1 "$left" python -m inheritune "$@" || code=$?
  [ "$code" = 138 ] || return "$code" # it did not handle the signal yet, so there was nothing to save
}

one() {
  local name=$5
  [ "$2" != analyze ] || name="$4, attention"
  limited "${@:2}" --seed "$1" 2>&1 | sed -u "s|^|seed $1 $name: |"
}
export -f limited one

python recipes/evidence/summary.py check "$EXPERIMENT" "$ARMS"
limited prepare "$EXPERIMENT"
over() { [ "$END" != 0 ] && [ "$(date +%s)" -ge "$END" ]; }
before='' listed=''
over || listed=$(missing)
while ! over && [ -n "$listed" ]; do
  [ "$listed" != "$before" ] || { printf 'these finished without an error but are still missing:\n%s\n' "$listed" >&2 && exit 1; }
  before=$listed
  printf '\n== %s runs or measurements, %s at a time\n' "$(wc -l <<< "$listed")" "$JOBS"
  set -m # a process group of its own, so that all of it stops with this script
  xargs -P "$JOBS" -L 1 bash -c 'set -euo pipefail; one "$@"' _ <<< "$listed" &
  set +m
  work=$!
  # shellcheck disable=SC2064 # this group, not a later one
  trap "kill -TERM -- -$work; exit 143" TERM INT
  wait "$work"
  trap - TERM INT
  over || listed=$(missing)
done
if over; then
  echo "The $BUDGET_HOURS hours are over, everything is saved; the same command resumes from here."
  exit
fi
# shellcheck disable=SC2086
python recipes/evidence/summary.py summary "$EXPERIMENT" $SEEDS
