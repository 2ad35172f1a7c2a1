#!/usr/bin/env bash
#SBATCH --job-name=prepare --nodes=1 --ntasks=1 --cpus-per-task=16 --mem=64G --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append
# Turn an experiment's documents into token shards, on CPUs:  bash slurm/prepare.sh EXPERIMENT [--workers N]
set -euo pipefail
here=$(dirname "$0") # in a job of plain sbatch this is Slurm's spool folder
[ -f "$here/job.sh" ] || here=${INHERITUNE_REPOSITORY:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*|\1|p')}/slurm
[ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
# shellcheck source=slurm/job.sh
source "$here/job.sh"
prepare "$@"
