#!/usr/bin/env bash
# Download what an experiment needs, on a login node, without a job:  bash slurm/fetch.sh EXPERIMENT
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
# shellcheck source=slurm/job.sh
source "$here/job.sh"
run_fetch "$@"
