#!/usr/bin/env bash
#SBATCH --job-name=gpt2_large_baselines --nodes=1 --gpus-per-node=4 --cpus-per-gpu=8 --mem-per-gpu=60G --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --array=1-32
# GPT-2 Large on OpenWebText: the runs it is compared with, one array task each.
set -euo pipefail
here=$(dirname "$0") # in a job of plain sbatch this is Slurm's spool folder
[ -f "$here/job.sh" ] || here=${INHERITUNE_REPOSITORY:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[a-z0-9_]*\.sh.*|\1|p')}/slurm
[ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
# shellcheck source=slurm/job.sh
source "$here/job.sh"
GPUS=${GPUS:-8} baselines gpt2_large_owt "$@"
