#!/usr/bin/env bash
# A job like those of slurm/, with counting.py for the program: bash counting.sh FOLDER STEPS; COUNTING_SLOTS=1 for a growth.
# Its `python` (bin/python) is counting.py where the program is asked for, and the real one for all else.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/bin:$PATH" COUNTING_PYTHON="${COUNTING_PYTHON:-$(command -v python)}"
# shellcheck disable=SC2034 # of job.sh
job_script=$here/counting.sh
# shellcheck source=slurm/job.sh
source "$here/../../../slurm/job.sh"
if [ "${COUNTING_SLOTS:-0}" = 1 ]; then run_job grow "$@"; else run_job train "$@"; fi
