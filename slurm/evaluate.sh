#!/usr/bin/env bash
#SBATCH --job-name=evaluate --nodes=1 --gpus-per-node=1 --cpus-per-gpu=8 --mem-per-gpu=60G --time=04:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --array=1-32
# Validation loss and lm-eval tasks of every run of an experiment, one array task each, or of one:  bash slurm/evaluate.sh EXPERIMENT [--run RUN] [--seed K] [--tasks A,B]
set -euo pipefail
here=$(dirname "$0") # in a job of plain sbatch this is Slurm's spool folder
[ -f "$here/job.sh" ] || here=${INHERITUNE_REPOSITORY:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*|\1|p')}/slurm
[ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
# shellcheck source=slurm/job.sh
source "$here/job.sh"
evaluate "$@"
