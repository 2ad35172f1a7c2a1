#!/usr/bin/env bash
#SBATCH --job-name=grow --nodes=1 --gpus-per-node=4 --cpus-per-gpu=8 --mem-per-gpu=60G --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --array=1-12%1
# Grow a run, stage after stage, until it reaches its reference:  bash slurm/grow.sh EXPERIMENT RUN [--seed K] [--ds FILE]
# Each array task is a slot: it does what comes next. A surplus one says so and ends.
set -euo pipefail
here=$(dirname "$0") # in a job of plain sbatch this is Slurm's spool folder
[ -f "$here/job.sh" ] || here=${INHERITUNE_REPOSITORY:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*|\1|p')}/slurm
[ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
# shellcheck source=slurm/job.sh
source "$here/job.sh"
grow "$@"
