#!/usr/bin/env bash
# Download what an experiment needs, on a login node, without a job:  bash slurm/fetch.sh EXPERIMENT
set -euo pipefail
here=$(dirname "$0") # in a job of plain sbatch this is Slurm's spool folder
[ -f "$here/job.sh" ] || here=${INHERITUNE_REPOSITORY:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*|\1|p')}/slurm
[ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
# shellcheck source=slurm/job.sh
source "$here/job.sh"
fetch "$@"
