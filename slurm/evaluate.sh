#!/usr/bin/env bash
#SBATCH --job-name=evaluate --nodes=1 --gpus-per-node=1 --cpus-per-gpu=8 --mem-per-gpu=60G --time=04:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --kill-on-invalid-dep=yes --array=1-32
# Validation loss and lm-eval tasks of every run of an experiment, one array task each, or of one run. 1 GPU.
#   bash slurm/evaluate.sh EXPERIMENT [--run RUN] [--seed SEED] [--ds DS] [--tasks TASKS] [--model MODEL] [--out OUT] [--allow-task-code] [--rehearse] [--dry-run] [--no-snapshot] [-- SBATCH OPTIONS]
# Made from jobs.yaml by tools/job_stubs.py.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # in a job of plain sbatch this is Slurm's spool folder
if [ ! -f "$here/job.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||; t found; b; :found; s|\.sh .*|.sh|; p; q')
  here=$(dirname "$(readlink -f "$here")")
fi
[ -f "$here/job.sh" ] || here=${INHERITUNE_REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}/slurm
[ -f "$here/job.sh" ] || { echo "inheritune: $0 is a copy outside the repository; set INHERITUNE_REPOSITORY to the repository, or link the script" >&2 && exit 2; }
# shellcheck source=slurm/job.sh
source "$here/job.sh"
run_job evaluate "$@"
