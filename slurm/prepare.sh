#!/usr/bin/env bash
#SBATCH --job-name=prepare --nodes=1 --ntasks=1 --cpus-per-task=16 --mem=64G --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --kill-on-invalid-dep=yes
# Turn an experiment's documents into token shards, on CPUs. On CPUs.
#   bash slurm/prepare.sh EXPERIMENT [--workers WORKERS] [--parts PARTS] [--rehearse] [--dry-run] [--no-snapshot] [-- SBATCH OPTIONS]
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
run_job prepare "$@"
