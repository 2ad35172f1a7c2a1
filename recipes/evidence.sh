#!/usr/bin/env bash
# Does the effect show at a scale that anyone can repeat? Several seeds of the reference, Inheritune, the same size from random
# and the baselines, paired by seed; then a table and three plots under recipes/evidence/cpu (which it replaces) or .../gpu.
#   SEEDS="11 12 13"   three for an interval, or more; results of other seeds that lie there already are counted too
#   ARMS=core          reference, random (and with the reference's steps added), Inheritune, last half; all; or names of runs,
#                      whose numbers join those that lie there if the reference comes out with the same bits
#   SCALE=cpu          gpu: GPT-2 Small's shape on one GPU
#   BUDGET_HOURS=      save and leave after so many hours; the same command goes on (a GPU lent for ten minutes: 0.15)
#   JOBS=              runs side by side, one thread each; default: one per core, on a GPU one
#   REHEARSE=1         minutes, marked REHEARSAL, written under runs/rehearsal
set -euo pipefail
START=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCALE=${SCALE:-cpu} ARMS=${ARMS:-core} SEEDS=${SEEDS:-11 12 13} BUDGET_HOURS=${BUDGET_HOURS:-}
[[ $SCALE = [cg]pu && $ARMS =~ ^[a-z0-9_\ ]+$ && $BUDGET_HOURS =~ ^([0-9]+(\.[0-9]*)?|\.[0-9]+)?$ && $SEEDS =~ ^[0-9\ ]+$ ]] || {
  sed -n '2,10p' recipes/evidence.sh >&2
  exit 2
}
export EXPERIMENT=recipes/evidence/$SCALE.yaml

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
options=(--cpus-per-task="${JOBS:-4}" --time=04:00:00)
[ "$SCALE" = cpu ] || options+=(--gpus=1)
[ "${REHEARSE:-0}" != 0 ] || refuse_login_node "${options[@]}"
# shellcheck disable=SC2119 # no further requirements
setup_environment
if [ "$SCALE" = cpu ] || [ "${REHEARSE:-0}" != 0 ]; then
  JOBS=${JOBS:-$(nproc)} # before the next line, which nproc would heed
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
else
  check_gpu
  JOBS=${JOBS:-1}
  python -c 'from inheritune.runtime.dist import device; raise SystemExit(device().type != "cuda")' || {
    echo "SCALE=gpu needs a GPU, and there is none here; SCALE=cpu takes two hours on two cores" >&2
    exit 2
  }
fi
PYTHON_PACKAGES=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') # the text of gpu.yaml
END=0
[ -z "$BUDGET_HOURS" ] || END=$(python -c 'import sys; print(int(sys.argv[1]) + int(3600 * float(sys.argv[2])))' "$START" "$BUDGET_HOURS")
export PYTHON_PACKAGES END

# What is missing and can be done now, a line each: seed, verb and its arguments.
missing() {
  # shellcheck disable=SC2086 # seeds are words
  python recipes/evidence/summary.py missing "$EXPERIMENT" "$ARMS" $SEEDS
}

# A verb, asked at the end of the time to save and leave, as Slurm does.
limited() {
  local left=0 code=0
  if [ "$END" != 0 ]; then
    left=$((END - $(date +%s)))
    [ "$left" -gt 0 ] || return 0
  fi
  timeout --foreground --preserve-status --signal=USR1 "$left" python -m inheritune "$@" || code=$?
  [ "$code" = 138 ] || return "$code" # it had not yet begun to listen to that signal: nothing was to be saved
}

one() {
  local name=$5
  [ "$2" != analyze ] || name="$4, attention"
  limited "${@:2}" --seed "$1" 2>&1 | sed -u "s|^|seed $1 $name: |"
}
export -f limited one

limited prepare "$EXPERIMENT"
over() { [ "$END" != 0 ] && [ "$(date +%s)" -ge "$END" ]; }
before='' listed=''
over || listed=$(missing)
while ! over && [ -n "$listed" ]; do
  [ "$listed" != "$before" ] || { printf 'these ended without an error but are still missing:\n%s\n' "$listed" >&2 && exit 1; }
  before=$listed
  printf '\n== %s runs or measurements, %s at a time\n' "$(wc -l <<< "$listed")" "$JOBS"
  set -m # a process group of their own, so that all of it can be asked to leave with this script
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
  echo "The $BUDGET_HOURS hours are over, everything is saved; the same command goes on from here."
  exit
fi
# shellcheck disable=SC2086
python recipes/evidence/summary.py summary "$EXPERIMENT" $SEEDS
