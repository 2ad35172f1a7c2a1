# Sourced by every script of this folder; nothing to edit here (site.sh is). Only what needs a shell is here: the environment of a
# job, its signals, and waiting for its tasks. `inheritune submit` queues a job, inheritune/submit/job.py decides in it.
#
#   run_job NAME "$@"     outside a job: submit it. In a job: run it to its end, and requeue it or report why it failed
#
# NAME is an entry of jobs.yaml. slurm/README.md lists the variables: GPUS, NODES, TASKS, ARRAY, FORCE, REHEARSE, MAX_RESTARTS, SITE.
# shellcheck shell=bash
set -euo pipefail

slurm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
code=$(dirname "$slurm_folder") # in a submitted job a snapshot (it has a file COMMIT), else the checkout
checkout=$code
[ ! -f "$code/COMMIT" ] || checkout=${INHERITUNE_REPOSITORY:-$code}

# This shell gets what site.sh sets, but not sbatch's options, which are for login shells.
read_site() {
  local before=" ${!SBATCH_*} " name
  : "${INHERITUNE_ROOT:=}" "${HF_HOME:=}"
  # shellcheck source=slurm/site.sh
  source "$slurm_folder/site.sh"
  for name in "${!SBATCH_@}"; do [[ $before = *" $name "* ]] || unset "$name"; done
  export "${!SITE_@}" INHERITUNE_ROOT="${INHERITUNE_ROOT:-$checkout}"
  host_python=python # next to srun; where the tasks run in an image, that of the host decides
  if [ -n "$SITE_APPTAINER" ]; then host_python=python3; fi
}

load_modules() {
  local file active=${VIRTUAL_ENV:-}
  if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then active=${CONDA_PREFIX:-}; fi
  if ! command -v module > /dev/null; then # dash, where it runs what sbatch wraps, drops the functions of the login shell
    for file in "${LMOD_PKG:-none}/init/bash" "${MODULESHOME:-none}/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
      # shellcheck disable=SC1090
      if [ -r "$file" ]; then source "$file" && break; fi
    done
  fi
  # shellcheck disable=SC2086 # a list of words
  module load $SITE_MODULES || return
  PATH=${active:+$active/bin:}$PATH # a module that is loaded again goes in front of an environment that was active
}

load_software() {
  step="the start"
  set +u # modules and conda's own scripts use variables that are not set
  if [ -n "$SITE_MODULES" ]; then
    step="module load $SITE_MODULES"
    load_modules
  fi
  if [ -n "$SITE_CONDA" ]; then
    step="conda activate $SITE_CONDA"
    eval "$(conda shell.bash hook)"
    conda activate "$SITE_CONDA"
  fi
  set -u
  step="the Python environment"
  export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # this code, wherever the current folder is
  if [ -z "$SITE_APPTAINER" ]; then
    # shellcheck source=recipes/setup.sh
    source "$checkout/recipes/setup.sh"
    # shellcheck disable=SC2119 # no further requirements
    setup_environment
  elif ! python3 -c 'import fire, pydantic, xxhash, yaml' 2> /dev/null; then
    echo "inheritune: python3 on $(hostname) needs pydantic, PyYAML, fire and xxhash beside the image: python3 -m pip install --user pydantic PyYAML fire xxhash" >&2
    exit 2
  fi
}

say() { echo "$(date '+%F %T') job $this_job: $*" || true; } # also where the disk of the log is full

# A failure that never reached Python, or that Python could not report. Needs neither Python nor a disk.
on_exit() {
  local status=$? node=${SLURMD_NODENAME:-$(hostname)}
  if [ "$status" = 0 ] || [ -n "$reported" ]; then return; fi
  if [ -n "$slots" ] && [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true; fi
  scontrol update jobid="$this_job" comment="$node: $step failed (code $status)" || true
  say "FAILED (code $status): $step failed on node $node, see above; when that is fixed, submit again: $INHERITUNE_AGAIN"
}

# On the login node: a module or conda environment of site.sh that does not load.
on_login_exit() {
  case $step in module* | conda*) echo "inheritune: $step failed on $(hostname), see above; correct slurm/site.sh; nothing was submitted" >&2 && exit 2 ;; esac
}

# Run "$@" (srun, or the program that starts it) to its end, then decide: finished, go on, or failed. Does not return.
work() {
  local child status=0
  if [ -n "$signalled" ]; then # before there was anything to pass it on to
    status=138
  else
    "$@" &
    child=$!
    # to srun, which hands it to the tasks; TERM would make srun kill them at once
    trap 'signalled=1; say "USR1: asking the tasks to save and stop"; kill -USR1 "$child" 2> /dev/null || true' USR1
    # scancel, requeue, preemption, the time limit: the tasks get their own TERM from Slurm; stay until they have saved
    trap 'signalled=1; say "TERM: waiting for the tasks to save"' TERM
    while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done # `wait` comes back early for each signal
    wait "$child" || status=$?
  fi
  trap '' USR1 TERM
  step="the end of the job"
  "$host_python" -m inheritune.submit.job end "$status" "$signalled" && status=0 || status=$?
  case $status in 126 | 127) ;; *) reported=1 ;; esac
  exit "$status"
}

run_job() {
  local lines script=${job_script:-$checkout/slurm/$1.sh}
  read_site
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    trap on_login_exit EXIT
    load_software # on this machine, which has internet: the job finds the environment ready
    exec "$host_python" -m inheritune submit "$@"
  fi
  this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} signalled='' reported='' slots='' step='the start'
  this_job=${this_job:-$SLURM_JOB_ID} # the last task of an array has the id of the whole array
  case $1 in grow | *_growth) slots=1 ;; esac
  case " $* " in *' --rehearse '*) export REHEARSE=1 ;; esac
  INHERITUNE_AGAIN="bash $(printf '%q ' "$script" "${@:2}")"
  export INHERITUNE_AGAIN INHERITUNE_NO_BUILD=1
  trap on_exit EXIT
  trap 'signalled=1' USR1 # until there is a step to pass it on to
  load_software
  step="the start of the program"
  lines=$("$host_python" -m inheritune.submit.job begin "$script" "$@")
  local command=()
  # assignments, quoted by Python
  # shellcheck disable=SC1091
  source /dev/stdin <<< "$lines"
  work "${command[@]}"
}

# On a login node, without a job: compute nodes often have no internet.
run_fetch() {
  read_site
  trap on_login_exit EXIT
  load_software
  exec "$host_python" -m inheritune.submit.job fetch "$@"
}
