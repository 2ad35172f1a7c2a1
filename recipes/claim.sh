#!/usr/bin/env bash
# Puts the paper's claim to a test that it can fail, in 25 GPU-hours on one H100: half of GPT-2 Small's layers against the reference,
# the reference trained on, and a random start with the same FLOPs. The rule, the cost, the outcomes: docs/claim.md
#   bash recipes/claim.sh     runs what is missing, seed after seed, then prints the verdict; the same command resumes
#   PLAN=1 bash recipes/claim.sh [H100=2.50 ...]     runs nothing: prints hours, and their cost at a price of a GPU-hour
#   SUBMIT=1     submit Slurm jobs of one GPU for what is missing, with their dependencies, and leave; afterwards run this again
#   DRAW=1       run nothing: the verdict on what is there
#   REHEARSE=1   at small scale with two seeds on two CPU cores; marked REHEARSAL
#   SEEDS=       default: as many as the power computation asks for     PROCS=1   processes (ranks); one for each GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# = 0 ] || [ "${PLAN:-0}" != 0 ] || { sed -n '2,10p' recipes/claim.sh >&2 && exit 2; }
[[ ${SEEDS:-0} =~ ^[0-9\ ]+$ ]] || { echo "SEEDS are whole numbers, as in SEEDS=\"0 1 2\" (got '$SEEDS')" >&2 && exit 2; }
[ "${REHEARSE:-0}" = 0 ] || export DS_ACCELERATOR=cpu

# shellcheck source=recipes/run_missing.sh
source recipes/run_missing.sh
use_site_folders
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
# shellcheck disable=SC2119 # no further requirements
setup_environment
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[ "${PLAN:-0}" = 0 ] || exec python recipes/claim/design.py "$@"
if [ "${REHEARSE:-0}" != 0 ]; then SEEDS=${SEEDS:-0 1}; fi
SEEDS=${SEEDS:-$(python recipes/claim/design.py seeds)}
read -ra seeds <<< "$SEEDS"
PROCS=${PROCS:-1}
missing() { python recipes/claim/claim.py missing "$SEED"; }

if [ "${SUBMIT:-0}" != 0 ]; then
  exec python recipes/claim/claim.py submit "${seeds[@]}"
fi
if [ "${DRAW:-0}" = 0 ]; then
  [ "${REHEARSE:-0}" != 0 ] || check_gpu
  for SEED in "${seeds[@]}"; do
    if [ "${REHEARSE:-0}" = 0 ] && on_login_node && [ -n "$(missing)" ]; then
      echo "seed $SEED lacks runs, and this is a Slurm login node: SUBMIT=1 submits them as jobs, DRAW=1 judges what is there" >&2
      exit 2
    fi
    run_missing "the claim"
  done
fi
python recipes/claim/claim.py judge "${seeds[@]}"
