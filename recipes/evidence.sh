#!/usr/bin/env bash
# Does the effect show at a scale that anyone can repeat? Several seeds of the reference, Inheritune, the same size from random
# and the baselines, paired by seed; then a table and three plots under recipes/evidence/cpu (which it replaces) or .../gpu.
#   SEEDS="11 12 13"   three for an interval, or more; results of other seeds that lie there already are counted too
#   ARMS=core          reference, random (and with the reference's steps added), Inheritune, last half; or all of the file
#   SCALE=cpu          gpu: GPT-2 Small's shape on one GPU
#   BUDGET_HOURS=      save and leave after so many hours; the same command goes on (a GPU lent for ten minutes: 0.15)
#   JOBS=              runs side by side, one thread each; default: one per core, on a GPU one
#   REHEARSE=1         minutes, marked REHEARSAL, written under runs/rehearsal
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export EXPERIMENT=recipes/evidence/${SCALE:-cpu}.yaml
ARMS=${ARMS:-core} SEEDS=${SEEDS:-11 12 13}
[ -f "$EXPERIMENT" ] && [[ $ARMS = core || $ARMS = all ]] || { sed -n '2,9p' recipes/evidence.sh >&2 && exit 2; }

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
[ "${REHEARSE:-0}" != 0 ] || refuse_login_node "${JOBS:-4}" 04:00:00
# shellcheck disable=SC2119 # no further requirements
setup_environment
if [ "${SCALE:-cpu}" = cpu ]; then
  JOBS=${JOBS:-$(nproc)} # before the next line, which nproc would heed
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
else
  check_gpu
  JOBS=${JOBS:-1}
fi
PYTHON_PACKAGES=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') # the text of gpu.yaml
END=$(python -c 'import sys, time; print(int(time.time() + 3600 * float(sys.argv[1])) if sys.argv[1] else 0)' "${BUDGET_HOURS:-}")
export PYTHON_PACKAGES END

# What is missing and can be done now, a line each: seed, verb and its arguments.
missing() {
  # shellcheck disable=SC2086 # seeds are words
  python recipes/evidence/summary.py missing "$EXPERIMENT" "$ARMS" $SEEDS
}

one() {
  local seed=$1 name=$5 left=0 code=0
  [ "$2" != analyze ] || name="$4, attention"
  if [ "$END" != 0 ]; then
    left=$((END - $(date +%s)))
    [ "$left" -gt 0 ] || return 0
  fi
  # at the end of the time it is asked to save and leave, as Slurm does
  timeout --foreground --signal=USR1 "$left" python -m inheritune "${@:2}" --seed "$seed" 2>&1 |
    sed -u "s|^|seed $seed $name: |" || code=$?
  [ "$code" = 124 ] || return "$code"
}
export -f one

python -m inheritune prepare "$EXPERIMENT"
listed=$(missing) before=''
while [ -n "$listed" ]; do
  if [ "$END" != 0 ] && [ "$(date +%s)" -ge "$END" ]; then
    echo "The $BUDGET_HOURS hours are over, everything is saved; the same command goes on from here:"
    echo "$listed"
    exit
  fi
  [ "$listed" != "$before" ] || { printf 'these ended without an error but are still missing:\n%s\n' "$listed" >&2 && exit 1; }
  before=$listed
  printf '\n== %s runs or measurements, %s at a time\n' "$(wc -l <<< "$listed")" "$JOBS"
  xargs -P "$JOBS" -L 1 bash -c 'set -euo pipefail; one "$@"' _ <<< "$listed"
  listed=$(missing)
done
# shellcheck disable=SC2086
python recipes/evidence/summary.py summary "$EXPERIMENT" $SEEDS
