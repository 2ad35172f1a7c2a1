#!/usr/bin/env bash
#SBATCH --job-name=gpt2_medium_fineweb_growth --nodes=1 --gpus-per-node=4 --cpus-per-gpu=8 --mem-per-gpu=60G --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --kill-on-invalid-dep=yes --array=1-12%1
# GPT-2 Medium on FineWeb-Edu: Inheritune until it reaches the reference; each array task does what comes next. 4 GPUs.
#   bash slurm/gpt2_medium_fineweb_growth.sh [--seed SEED] [--ds DS] [--rehearse] [--dry-run] [--no-snapshot] [-- SBATCH OPTIONS]
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
run_job gpt2_medium_fineweb_growth "$@"
