# Sourced by every script of this folder; nothing to edit here (site.sh is). Each script calls one of the functions at the end:
# train, grow, baselines, evaluate, analyze, prepare.
#
# Outside a job such a script submits itself with the shape that site.sh gives. In a job it says what it runs with, starts one task
# per GPU with srun, passes USR1 (the end of the time is near) on to them, and goes on in another job while there is work left:
#
#   $INHERITUNE_JOB/more     written by the program: it saved and stopped, and there is more to do
#   $INHERITUNE_JOB/stopped  written by the program: a person's STOP file ended it before its work was done
#   $INHERITUNE_JOB/failure  written by the program when it fails: "NODE rank R: cause", and its exit code on a second line
#
# The exit code alone could not say so: Slurm ends a step whose first task leaves with an error while others still save, and
# takes a job whose step ends with 0 at preemption for finished.
#
# From the environment: GPUS=8 (in all), NODES and TASKS (of a rehearsal or a CPU job), ARRAY=1-12%1 or no, FORCE=1 (submit though
# a job of that name is queued), REHEARSE=1 (in small, on CPUs), MAX_RESTARTS=100, DEEPSPEED_TIMEOUT=60 (minutes).
# shellcheck shell=bash
set -euo pipefail

slurm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$slurm_folder")
script_arguments=() # of the script that sources this file, without what only concerns submitting
for word in "$@"; do
  case $word in
    --) break ;;
    --dry-run) ;;
    *) script_arguments+=("$word") ;;
  esac
done
: "${INHERITUNE_ROOT:=}" "${HF_HOME:=}"
# what a login shell exported for plain sbatch: submit states everything itself, and must not be given GPUs behind its back
exported_options=("${!SBATCH_@}")
# shellcheck source=slurm/site.sh
source "$slurm_folder/site.sh"
unset "${!SBATCH_@}"
export INHERITUNE_ROOT="${INHERITUNE_ROOT:-$repository}"
# shellcheck source=recipes/setup.sh
source "$repository/recipes/setup.sh"

# --- words

say() { printf '%s job %s: %s\n' "$(date '+%F %T')" "$this_job" "$*"; }

refuse() {
  echo "inheritune: $*" >&2
  exit 2
}

# What scontrol takes for this job and no other: the last task of an array has the id of the whole array.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; else this_job=${SLURM_JOB_ID:-}; fi

in_job() { [ -n "${SLURM_JOB_ID:-}" ]; }

rehearsing() { case ${REHEARSE:-0} in 0 | '') return 1 ;; *) return 0 ;; esac; }

# "$@" as one line for any POSIX shell: names are data, whatever is in them
quoted() {
  local word line='' apostrophe="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) line+=" '${word//\'/$apostrophe}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

# Split a script's arguments: `words`, `flags` (after EXPERIMENT and, where the script takes one, RUN), `sbatch_options` (after --)
# and `dry_run`. The first argument is how many words are positional, the second the usage line.
read_arguments() {
  local positional=$1 usage=$2
  shift 2
  arguments=() sbatch_options=() dry_run=0
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=1 ;;
      -h | --help)
        echo "usage: bash $0 $usage [--dry-run] [-- SBATCH OPTIONS]"
        exit 0
        ;;
      --)
        shift
        sbatch_options=("$@")
        break
        ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  if [ "${#arguments[@]}" -lt "$positional" ]; then refuse "usage: bash $0 $usage (got $(quoted "${arguments[@]}"))"; fi
  words=("${arguments[@]:0:$positional}") flags=("${arguments[@]:$positional}")
  local word
  for word in "${words[@]}"; do
    case $word in -*) refuse "usage: bash $0 $usage (got $word first)" ;; esac
  done
}

# value of --NAME among the flags, or the second argument
flag() {
  local i
  for ((i = 0; i < ${#flags[@]}; i++)); do
    case ${flags[i]} in
      "--$1") echo "${flags[i + 1]:-}" && return ;;
      "--$1="*) echo "${flags[i]#*=}" && return ;;
    esac
  done
  echo "${2:-}"
}

# This script and its arguments as a command: what a person pastes, and what a job that submits itself again runs. In a job of
# plain sbatch $0 is a copy in a spool folder; the generic script of the same kind does the same.
this_command() {
  if [ "$(basename "$0")" = slurm_script ]; then
    quoted bash "$slurm_folder/$kind.sh" "${arguments[@]}"
  else
    quoted bash "$(cd "$(dirname "$0")" && pwd)/$(basename "$0")" "${script_arguments[@]}"
  fi
}

# The same as a line to paste.
again() { echo "$(if rehearsing; then echo 'REHEARSE=1 '; fi)$(this_command)"; }

# "$@" of Slurm's own commands, again for a while where its controller does not answer (it is restarted now and then).
asked() {
  local try
  for try in {1..12}; do
    if "$@"; then return; fi
    [ "$try" = 12 ] || sleep 5
  done
  return 1
}

# --- the environment of a job

load_software() {
  local file active=${VIRTUAL_ENV:-}
  if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then active=${CONDA_PREFIX:-}; fi
  set +u # modules and conda's own scripts use variables that are not set
  if [ -n "$SITE_MODULES" ]; then
    if ! command -v module > /dev/null; then # dash, where it runs what sbatch wraps, drops the functions of the login shell
      for file in "${LMOD_PKG:-none}/init/bash" "${MODULESHOME:-none}/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
        # shellcheck disable=SC1090
        if [ -r "$file" ]; then source "$file" && break; fi
      done
    fi
    # shellcheck disable=SC2086 # a list of words
    module load $SITE_MODULES
    PATH=${active:+$active/bin:}$PATH # a module that is loaded again goes in front of an environment that was active
  fi
  if [ -n "$SITE_CONDA" ]; then
    eval "$(conda shell.bash hook)"
    conda activate "$SITE_CONDA"
  fi
  set -u
  if [ -n "$SITE_APPTAINER" ]; then
    case $SITE_APPTAINER$INHERITUNE_ROOT${HF_HOME:-}$repository in
      *[[:space:]]*) refuse "with an Apptainer image its path, INHERITUNE_ROOT, HF_HOME and the repository's path may hold no spaces" ;;
    esac
    [ -f "$SITE_APPTAINER" ] || refuse "SITE_APPTAINER is $SITE_APPTAINER, which is not there; make it with: cd $(quoted "$repository") && apptainer build $(quoted "$SITE_APPTAINER") slurm/inheritune.def"
    mkdir -p "$INHERITUNE_ROOT" ${HF_HOME:+"$HF_HOME"} # what is not there can't be bound
    # the tasks run in the image; what starts them (check, grow) runs outside it, next to srun. Neither has this package
    export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
    python3 -c 'import fire, pydantic, xxhash, yaml' 2> /dev/null ||
      refuse "python3 on $(hostname) needs pydantic, PyYAML, fire and xxhash beside the image: python3 -m pip install --user pydantic PyYAML fire xxhash"
  else
    # shellcheck disable=SC2119 # no further requirements
    setup_environment
  fi
}

# The Python next to srun: the environment's, or the host's where the tasks run in an image; and what goes before `python` there.
host_python=python image=''
if [ -n "$SITE_APPTAINER" ]; then
  host_python=python3 # its own packages, of the home that is mounted, must not hide those of the image
  export TMPDIR=/tmp # which every image has
  image="apptainer exec --nv --env PYTHONNOUSERSITE=1 --bind $repository --bind $INHERITUNE_ROOT${HF_HOME:+ --bind $HF_HOME} $SITE_APPTAINER"
fi

export_environment() {
  local cache
  cache=${TMPDIR:-/tmp}/inheritune-$(id -un) # on the node: compilers must not share a network disk, nor two users a folder
  export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  export DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-60}" # minutes; DeepSpeed's own 10 are too short for a large first step
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
  export INHERITUNE_LEAD="$SITE_LEAD"
  if [ -n "$SITE_INTERFACE" ]; then export NCCL_SOCKET_IFNAME="$SITE_INTERFACE" GLOO_SOCKET_IFNAME="$SITE_INTERFACE"; fi
}

# "NODES GPUS" for each group of this job's nodes that have the same number of GPUs
gpus_of_nodes() {
  asked scontrol show job -d "$this_job" | awk '
    $1 ~ /^Nodes=/ {
      gpus = 0; rest = $0
      while (match(rest, /gpu(:[^:,(]+)?:[0-9]+/)) {
        entry = substr(rest, RSTART, RLENGTH); rest = substr(rest, RSTART + RLENGTH); sub(/.*:/, "", entry); gpus += entry
      }
      sub(/^Nodes=/, "", $1); print $1, gpus
    }'
}

# Find out what this job was given, say so, and export INHERITUNE_LAUNCH and INHERITUNE_JOB. `$1` says what is going to run;
# TASKS is 1 for a verb that runs as one process.
begin() {
  local shape gpus tasks cpus per_node commit memory
  shape=$(gpus_of_nodes)
  case $(echo "$shape" | cut -d' ' -f2 | sort -u | wc -l) in
    0 | 1) gpus=$(echo "$shape" | sed -n '1s/.* //p') ;;
    *) refuse "the nodes of job $this_job have unequal numbers of GPUs ($(echo "$shape" | awk '{printf "%s%s: %s", (NR > 1 ? ", " : ""), $1, $2}')); ask for equal ones with --nodes=N --gpus-per-node=G, not with --gpus: bash slurm/X.sh does" ;;
  esac
  gpus=${gpus:-${SLURM_GPUS_ON_NODE:-0}}
  export SLURM_NNODES="${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}"
  if [ "$gpus" -gt 0 ]; then
    tasks=$((gpus * SLURM_NNODES))
  else
    tasks=${SLURM_NTASKS:-$SLURM_NNODES}
    export DS_ACCELERATOR=cpu
    if [ "$needs_gpu" = 1 ] && ! rehearsing; then
      refuse "job $this_job has no GPU; submit it with 'bash slurm/X.sh', which asks for some, or rehearse in small with REHEARSE=1"
    fi
  fi
  tasks=${TASKS:-$tasks}
  per_node=$(((tasks + SLURM_NNODES - 1) / SLURM_NNODES))
  cpus=$(echo "${SLURM_JOB_CPUS_PER_NODE:-1}" | tr ',' '\n' | sed 's/(.*//' | sort -n | sed -n 1p)
  cpus=$((cpus / per_node > 0 ? cpus / per_node : 1))
  # how the job was asked for must not shape the step a second time: some versions of srun refuse the two together
  unset SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_NODE
  INHERITUNE_LAUNCH="srun --kill-on-bad-exit=1 --wait=180 --export=ALL --mpi=none"
  if [ "$TASKS" = 1 ]; then
    INHERITUNE_LAUNCH+=" --nodes=1 --ntasks=1"
  else
    INHERITUNE_LAUNCH+=" --nodes=$SLURM_NNODES --ntasks=$tasks"
    if [ $((per_node * SLURM_NNODES)) = "$tasks" ]; then INHERITUNE_LAUNCH+=" --ntasks-per-node=$per_node"; fi
  fi
  INHERITUNE_LAUNCH+=" --cpus-per-task=$cpus${image:+ $image}"
  INHERITUNE_HOSTS=$(asked scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ') # an image has no scontrol
  export INHERITUNE_PYTHON="${image:+$image python}" # of a step on this node, outside srun
  export INHERITUNE_LAUNCH INHERITUNE_HOSTS OMP_NUM_THREADS="$cpus"
  jobs_folder=$INHERITUNE_ROOT/runs/jobs
  export INHERITUNE_JOB="$jobs_folder/$this_job"
  mkdir -p "$INHERITUNE_JOB"
  rm -f "$INHERITUNE_JOB/more" "$INHERITUNE_JOB/stopped" "$INHERITUNE_JOB/failure"
  export_environment
  commit=$(git -C "$repository" rev-parse --short HEAD 2> /dev/null || echo unknown)
  if [ "$commit" != unknown ] && [ -n "$(git -C "$repository" status --porcelain --untracked-files=no)" ]; then commit+=" with changes"; fi
  memory=$(asked scontrol show job "$this_job" | sed -n 's/^ *\(Req\)\?TRES=.*mem=\([^,]*\).*/\2/p' | sed -n 1p)
  restarts=${SLURM_RESTART_COUNT:-${INHERITUNE_RESTARTS:-0}}
  say "$1"
  say "restart $restarts on $SLURM_NNODES node(s) $SLURM_JOB_NODELIST, each $gpus GPU(s); $tasks task(s) of $cpus CPU(s); memory ${memory:-unknown} in all"
  say "commit $commit, INHERITUNE_ROOT=$INHERITUNE_ROOT$(if rehearsing; then echo ', REHEARSAL'; fi)"
  if [ "$gpus" -gt 0 ] && { [ "$tasks" -lt $((gpus * SLURM_NNODES)) ] || [ "$needs_gpu" = 0 ]; }; then
    say "note: this job holds $((gpus * SLURM_NNODES)) GPUs and uses fewer; 'bash slurm/$kind.sh' asks for what is needed"
  fi
  stop_if_array_stopped
}

# --- running, and what comes after

# Run "$@" (srun, or the program that starts it) to its end, then decide: finished, go on, or failed. Does not return. No shell
# function: that would run in a shell of its own, which USR1 ends, and the tasks would learn of the time limit by Slurm's TERM.
work() {
  local child code=0
  signalled=$early
  if [ -n "$early" ]; then echo "asked to stop before the start" > "$INHERITUNE_JOB/more" && after 0; fi
  "$@" &
  child=$!
  # to srun, which hands it to the tasks; TERM would make srun kill them at once
  trap 'signalled=1; say "USR1: asking the tasks to save and stop"; kill -USR1 "$child" 2> /dev/null || true' USR1
  # scancel, requeue, preemption, the time limit: the tasks get their own TERM from Slurm; stay until they have saved
  trap 'signalled=1; say "TERM: waiting for the tasks to save"' TERM
  while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done # `wait` comes back early for each signal
  wait "$child" || code=$?
  after "$code"
}

after() {
  trap '' USR1
  # USR1 (signal 10) ends a task that has only just started and does not listen yet: nothing was begun, so nothing is lost
  if [ "$1" = 138 ] && [ -n "$signalled" ] && [ ! -e "$INHERITUNE_JOB/failure" ]; then
    echo "asked to stop before the tasks had started" > "$INHERITUNE_JOB/more"
  fi
  # an error that no signal explains is a failure, also where other tasks could still save
  if [ -e "$INHERITUNE_JOB/more" ] && [ ! -e "$INHERITUNE_JOB/failure" ] && { [ "$1" = 0 ] || [ -n "$signalled" ]; }; then go_on; fi
  if [ "$1" != 0 ]; then fail "$1"; fi
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then rm -f "$(last_failure)"; fi
  if [ -e "$INHERITUNE_JOB/stopped" ]; then
    say "stopped, not finished: $(cat "$INHERITUNE_JOB/stopped")"
  else
    say "finished"
  fi
  exit 0
}

pending_slots() { asked squeue -h -r -j "$SLURM_ARRAY_JOB_ID" -t PENDING -o %K | grep -cvx "$SLURM_ARRAY_TASK_ID" || true; }

job_field() { asked scontrol show job -o "$this_job" | tr ' ' '\n' | sed -n "s/^$1=//p" | sed -n 1p || true; }

# There is more to do: the next slot does it, or this job again, or a new job like it. Does not return.
go_on() {
  local state reason
  say "there is more to do: $(cat "$INHERITUNE_JOB/more")"
  if [ "$slots" = 1 ] && in_array && [ "$(pending_slots)" -gt 0 ]; then
    say "the next slot of the array goes on"
    exit 0
  fi
  state=$(job_field JobState) reason=$(job_field Reason)
  state=${state:-RUNNING} # where Slurm does not answer
  if [ "$(job_field BatchFlag)" = 0 ]; then
    say "this is an interactive allocation; go on with: $(again)"
    exit 0
  fi
  # a job that was cancelled, or requeued from outside, must not come back through us
  case $state in
    RUNNING | SIGNALING | PREEMPTED | TIMEOUT) ;;
    COMPLETING) if [ "$reason" != TimeLimit ]; then
      say "the job was cancelled or requeued from outside; to go on: $(again)"
      exit 0
    fi ;;
    *)
      say "the job is $state; to go on, if it does not by itself: $(again)"
      exit 0
      ;;
  esac
  if [ "$restarts" -ge "${MAX_RESTARTS:-100}" ]; then
    echo "it was restarted $restarts times, which is all that MAX_RESTARTS allows" > "$INHERITUNE_JOB/failure"
    fail 1
  fi
  if [ "$SITE_REQUEUE" = yes ] && scontrol requeue "$this_job"; then
    say "requeued as restart $((restarts + 1))"
    trap 'exit 0' TERM
    sleep 60 &
    wait $! || true
    exit 0
  fi
  resubmit
}

in_array() { [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; }

# What waits for this job waits for `$1`, which goes on with its work.
move_dependents() {
  local new=$1 old=$this_job queued job dependency
  if in_array; then
    if [ "$slots" = 1 ]; then old="$SLURM_ARRAY_JOB_ID(_\*|_$SLURM_ARRAY_TASK_ID)?"; else new+=_$SLURM_ARRAY_TASK_ID; fi
  fi
  queued=$(asked squeue --me -h -r -t PENDING -o '%i %E') || say "what waits for this job must wait for $new instead"
  while read -r job dependency; do
    if [ "${job%%_*}" != "$1" ] && echo "$dependency" | grep -qE ":$old\("; then
      dependency=$(echo "$dependency" | sed -E "s/:$old\(/:$new(/g; s/\([^)]*\)//g")
      scontrol update jobid="$job" dependency="$dependency" || say "job $job should wait for $new; Slurm took no such change"
    fi
  done <<< "$queued"
}

# A job of the same shape behind this one, where the site does not requeue.
resubmit() {
  local id options=() variable cleaned=()
  options+=(--job-name="$SLURM_JOB_NAME" --dependency="afterany:$this_job" --partition="$SLURM_JOB_PARTITION" --nodes="$SLURM_NNODES")
  if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    options+=(--gpus-per-node="${SLURM_GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE}" --cpus-per-gpu=$((SLURM_CPUS_ON_NODE / SLURM_GPUS_ON_NODE)))
  else
    options+=(--ntasks="${SLURM_NTASKS:-1}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  fi
  if [ -n "${SLURM_MEM_PER_GPU:-}" ]; then
    options+=(--mem-per-gpu="$SLURM_MEM_PER_GPU")
  elif [ -n "${SLURM_MEM_PER_CPU:-}" ]; then
    options+=(--mem-per-cpu="$SLURM_MEM_PER_CPU")
  elif [ -n "${SLURM_MEM_PER_NODE:-}" ]; then
    options+=(--mem="$SLURM_MEM_PER_NODE")
  fi
  if [ -n "${SLURM_JOB_ACCOUNT:-}" ]; then options+=(--account="$SLURM_JOB_ACCOUNT"); fi
  if [ -n "${SLURM_JOB_QOS:-}" ]; then options+=(--qos="$SLURM_JOB_QOS"); fi
  if [ -n "$SITE_CONSTRAINT" ]; then options+=(--constraint="$SITE_CONSTRAINT"); fi
  if in_array; then options+=(--array="$SLURM_ARRAY_TASK_ID"); fi
  options+=(--time="$(job_field TimeLimit)" --signal="B:USR1@$SITE_LEAD" --no-requeue --open-mode=append --export=ALL)
  options+=(--output="$(scontrol show job "$this_job" | sed -n 's/^ *StdOut=//p')")
  # this job's own variables must not pass for the next one's
  for variable in "${!SLURM_@}"; do [ "$variable" = SLURM_CONF ] || cleaned+=(-u "$variable"); done
  if id=$(env "${cleaned[@]}" -u INHERITUNE_JOB -u INHERITUNE_LAUNCH INHERITUNE_RESTARTS=$((restarts + 1)) \
    sbatch --parsable "${options[@]}" --wrap "exec $(this_command)"); then
    say "this site does not requeue; job ${id%%;*} goes on after this one"
    move_dependents "${id%%;*}"
    exit 0
  fi
  echo "the job could neither be requeued nor submitted again" > "$INHERITUNE_JOB/failure"
  fail 1
}

# --- failing

last_failure() { echo "$jobs_folder/$SLURM_ARRAY_JOB_ID.failed"; } # cause and progress of the array's last failed slot
array_stopped() { echo "$jobs_folder/$SLURM_ARRAY_JOB_ID.stopped"; } # why the rest of the array must not run

# Changes with every finished checkpoint and run of the experiment: two failures with the same value struck at the same place.
progress() {
  local name
  name=$(basename "${words[0]:-none}")
  name=${name%.yaml} name=${name%.yml}
  { find "$INHERITUNE_ROOT/runs/$name" "$INHERITUNE_ROOT/runs/rehearsal/$name" \( -name COMPLETE -o -name DONE \) 2> /dev/null || true; } | sort | cksum
}

stop_if_array_stopped() {
  if [ "$slots" = 1 ] && in_array && [ -e "$(array_stopped)" ]; then
    say "this array was stopped: $(cat "$(array_stopped)"); when that is mended, submit again: $(again)"
    exit 2
  fi
}

# The last line of the log: cause, node, next command. Stops the rest of an array of slots if it would fail in the same way.
fail() {
  local code=$1 own cause='' record next
  if [ -s "$INHERITUNE_JOB/failure" ]; then
    cause=$(sed -n '1{s/:$//;p}' "$INHERITUNE_JOB/failure")
    own=$(sed -n '2s/^\([1-9][0-9]*\)$/\1/p' "$INHERITUNE_JOB/failure")
    code=${own:-$code} # srun may report that of a task which it ended because of the one that failed
  elif [ "$code" -gt 128 ]; then
    cause="a task was killed by signal $((code - 128))"
    if [ "$code" = 137 ]; then cause+=" (out of memory?)"; fi
    if [ "$code" = 143 ]; then cause+=" (cancelled, or the time limit came before the work was saved)"; fi
    cause+=" on one of the nodes $SLURM_JOB_NODELIST"
  elif [ "$code" = 2 ]; then
    cause="the sentence above tells what is missing (node ${SLURMD_NODENAME:-unknown})"
  else
    cause="it ended with code $code, see above, on one of the nodes $SLURM_JOB_NODELIST"
  fi
  next="the same command goes on from the last checkpoint: $(again)"
  if [ "$code" = 2 ]; then next="mend that, then submit again: $(again)"; fi
  if [ "$slots" = 1 ] && in_array; then
    record="${cause#* rank *: } | $(progress)" # the same cause on another node or rank is the same cause
    if [ "$code" = 2 ] || { [ -e "$(last_failure)" ] && [ "$(cat "$(last_failure)")" = "$record" ]; }; then
      echo "$cause" > "$(array_stopped)"
      scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true
      say "the rest of the array was cancelled: it would fail in the same way"
    fi
    echo "$record" > "$(last_failure)"
  fi
  say "FAILED (code $code): $cause; $next"
  exit "$code"
}

# --- submitting

# Submit this script as a job and leave. Shape: GPUS in all (0: TASKS tasks on CPUs), ARRAY, CPUS a task without GPU.
submit() {
  local options=() command name nodes per_node partition=$SITE_PARTITION queued id log line
  if ! sinfo -h > /dev/null 2>&1; then
    case $kind in # as the verb takes it: not each has processes of its own
      prepare) line="prepare EXPERIMENT [--workers N]" ;;
      analyze) line="analyze --model MODEL --data EXPERIMENT" ;;
      evaluate) line="evaluate EXPERIMENT --run RUN [--procs N]" ;;
      grow) line="grow EXPERIMENT --run RUN [--procs N]" ;;
      *) line="train EXPERIMENT --run RUN [--procs N]" ;;
    esac
    refuse "this is no login node of a Slurm cluster (sinfo does not answer); without Slurm: python -m inheritune $line"
  fi
  name=$(basename "$0" .sh)
  for word in ${script_arguments[@]+"${script_arguments[@]}"}; do
    word=${word#--} word=${word##*/}
    name+="-${word%.yaml}"
  done
  if rehearsing; then name+=-rehearsal; fi
  name=$(printf %s "$name" | tr -c 'A-Za-z0-9_.-' _)
  log=$INHERITUNE_ROOT/runs/logs/$([ "$array" = no ] && echo '%x-%j.out' || echo '%x-%A_%a.out')
  options+=(--job-name="$name")
  if rehearsing || [ "$gpus_wanted" = 0 ]; then
    nodes=${NODES:-1}
    options+=(--nodes="$nodes" --ntasks="$cpu_tasks" --cpus-per-task="$cpus_per_task" --mem-per-cpu=4G)
    if [ -n "$SITE_CPU_PARTITION" ]; then
      partition=$SITE_CPU_PARTITION SITE_CONSTRAINT='' # a feature of GPU nodes
    elif [ "$partition" = "$SITE_GUESSED_PARTITION" ]; then
      partition='' # a guess for jobs with GPUs
    fi
    if rehearsing; then
      options+=(--time=01:00:00)
    elif [ "$partition" = "$SITE_PARTITION" ] || [ "$SITE_TIME" != "$SITE_GUESSED_TIME" ]; then
      options+=(--time="$SITE_TIME") # another partition has its own limit
    fi
  else
    if [ -z "$SITE_GPUS_PER_NODE" ] || [ "$SITE_GPUS_PER_NODE" = 0 ]; then
      refuse "sinfo shows no GPU${SITE_PARTITION:+ in partition $SITE_PARTITION}${SITE_GPU_TYPE:+ of type $SITE_GPU_TYPE}; set SITE_PARTITION or SITE_GPUS_PER_NODE in slurm/site.sh, or rehearse on CPUs with REHEARSE=1"
    fi
    nodes=$(((gpus_wanted + SITE_GPUS_PER_NODE - 1) / SITE_GPUS_PER_NODE))
    per_node=$(((gpus_wanted + nodes - 1) / nodes)) # equal on all nodes: 6 GPUs on nodes of 4 are 2 times 3
    options+=(--nodes="$nodes" --gpus-per-node="${SITE_GPU_TYPE:+$SITE_GPU_TYPE:}$per_node")
    if [ -n "$SITE_CPUS_PER_GPU" ]; then options+=(--cpus-per-gpu="$SITE_CPUS_PER_GPU"); fi
    if [ -n "$SITE_MEM_PER_GPU" ]; then options+=(--mem-per-gpu="$SITE_MEM_PER_GPU"); fi
    options+=(--time="$SITE_TIME")
  fi
  options+=(--signal="B:USR1@$SITE_LEAD" "$([ "$SITE_REQUEUE" = yes ] && echo --requeue || echo --no-requeue)")
  options+=(--open-mode=append --output="$log" --export=ALL)
  if [ "$array" != no ]; then options+=(--array="$array"); fi
  if [ -n "$partition" ]; then options+=(--partition="$partition"); fi
  if [ -n "$SITE_ACCOUNT" ]; then options+=(--account="$SITE_ACCOUNT"); fi
  if [ -n "$SITE_QOS" ]; then options+=(--qos="$SITE_QOS"); fi
  if [ -n "$SITE_CONSTRAINT" ]; then options+=(--constraint="$SITE_CONSTRAINT"); fi
  options+=(${sbatch_options[@]+"${sbatch_options[@]}"})
  command=(sbatch "${options[@]}" --wrap "exec $(this_command)")
  line=$(quoted "${command[@]}")
  for word in ${exported_options[@]+"${exported_options[@]}"}; do line="-u $word $line"; done
  if [ "${#exported_options[@]}" -gt 0 ]; then line="env $line"; fi
  echo "$line"
  if [ "$dry_run" = 1 ]; then
    echo "dry run: nothing was submitted; its log would be $log"
    exit 0
  fi
  queued=$(squeue -h -u "$(id -un)" -n "$name" -o '%i %T')
  if [ -n "$queued" ] && [ "${FORCE:-0}" != 1 ]; then
    echo "not submitted: a job of this name is queued already ($(echo "$queued" | tr '\n' ',' | sed 's/,$//; s/,/, /g')); FORCE=1 submits another"
    exit 0
  fi
  load_software # on this machine, which has internet: the job finds the environment ready
  mkdir -p "$INHERITUNE_ROOT/runs/logs"
  id=$("${command[@]}" --parsable) || exit 1 # also where this runs in a substitution, which -e does not reach
  id=${id%%;*}
  log=${log//%x/$name} log=${log//%j/$id} log=${log//%A/$id} log=${log//%a/*}
  echo "submitted job $id"
  echo "log:    $log"
  echo "watch:  squeue -j $id; tail -F $(quoted "$(dirname "$log")")/$(basename "$log")"
  echo "stop:   scancel $id${stop_file:+      (or, with a checkpoint first: touch $(quoted "$stop_file"))}"
  exit 0
}

# Common to all: outside a job, submit; in a job, load the software and begin. `$1` says what runs.
start() {
  if ! in_job; then submit; fi
  early=''
  trap 'early=1' USR1 # until there is a step to pass it on to
  load_software
  begin "$1"
}

# --- the kinds of job. Each sets what submit and begin need: kind, GPUs (in all), tasks, array, whether its slots are one chain.

defaults() {
  kind=$1 gpus_wanted=${GPUS:-$2} array=no slots=0 needs_gpu=1 cpu_tasks=${TASKS:-2} cpus_per_task=1 stop_file=''
  TASKS=${TASKS:-}
}

run_folder() {
  local name
  name=$(basename "$1")
  name=${name%.yaml} name=${name%.yml}
  echo "$INHERITUNE_ROOT/runs/$(if rehearsing; then echo rehearsal/; fi)$name/seed$(flag seed 0)/$2"
}

# The names of an experiment's runs, one a line: "all", or "baselines" (trained, not grown, and not the reference).
runs_of() {
  "$host_python" "$slurm_folder/runs.py" "$@"
}

# One array task for each of the experiment's runs of a kind (see runs_of), unless ARRAY says otherwise.
over_runs() {
  array=${ARRAY:-}
  if [ -n "$array" ] || in_job; then return; fi
  load_software
  local names
  names=$(runs_of "${words[0]}" "$1")
  [ -n "$names" ] || refuse "${words[0]} has no such run: nothing to submit"
  array=1-$(echo "$names" | wc -l)
}

# Submit the baselines that start from others of them behind these, each in a job of its own, and all others as one array.
submit_in_order() {
  local waiting first number sources source printed dependency ids=()
  waiting=$(runs_of "${words[0]}" waiting)
  if [ -z "$waiting" ]; then return; fi
  array=$(seq "${array#1-}" | grep -vxF "$(echo "$waiting" | cut -d' ' -f1)" | paste -sd,)
  printed=$(submit)
  echo "$printed"
  first=$(echo "$printed" | sed -n 's/^submitted job //p')
  if [ -z "$first" ] && [ "$dry_run" = 0 ]; then exit 0; fi # they are queued already
  while read -r number sources; do
    dependency=''
    for source in ${sources//,/ }; do dependency+=,afterok:${ids[source]:-${first:-JOB}}_$source; done
    array=$number
    printed=$(sbatch_options+=(--dependency="${dependency#,}") && FORCE=1 submit)
    echo "$printed"
    ids[number]=$(echo "$printed" | sed -n 's/^submitted job //p')
  done <<< "$waiting"
  exit 0
}

# The run of this array task; says so and leaves if there are fewer runs than tasks.
run_of_task() {
  local listed names
  listed=$(runs_of "${words[0]}" "$1") || fail 2
  mapfile -t names <<< "$listed"
  run=${names[${SLURM_ARRAY_TASK_ID:-1} - 1]:-}
  if [ -z "$run" ]; then
    say "nothing to do: there are ${#names[@]} runs and this is task ${SLURM_ARRAY_TASK_ID:-1} of the array"
    exit 0
  fi
}

check() { "$host_python" -m inheritune check "$1" --run "$2" "${@:3}" || fail $?; }

# shellcheck disable=SC2086 # INHERITUNE_LAUNCH is a list of plain words
launch() { work $INHERITUNE_LAUNCH python -m inheritune "$@"; }

train() {
  defaults train 8
  read_arguments 2 "EXPERIMENT RUN [--stage N] [--seed K] [--ds FILE]" "$@"
  stop_file=$(run_folder "${words[@]}")/STOP
  start "train ${words[0]}, run ${words[1]}${flags[*]:+ ${flags[*]}}"
  local options=() name
  for name in stage seed ds; do if [ -n "$(flag $name)" ]; then options+=("--$name" "$(flag $name)"); fi; done
  check "${words[@]}" ${options[@]+"${options[@]}"}
  launch train "${words[0]}" --run "${words[1]}" ${flags[@]+"${flags[@]}"}
}

grow() {
  defaults grow 8
  array=${ARRAY:-1-12%1} slots=1
  read_arguments 2 "EXPERIMENT RUN [--seed K] [--ds FILE]" "$@"
  stop_file=$(run_folder "${words[@]}")/STOP
  start "grow ${words[0]}, run ${words[1]}${flags[*]:+ ${flags[*]}}: one slot of the growth"
  work "$host_python" -m inheritune grow "${words[0]}" --run "${words[1]}" --slot ${flags[@]+"${flags[@]}"}
}

baselines() {
  defaults baselines 8
  read_arguments 1 "EXPERIMENT [--seed K]" "$@"
  over_runs baselines
  if ! in_job && [ -z "${ARRAY:-}" ]; then submit_in_order; fi
  start "baselines of ${words[0]}"
  run_of_task baselines
  check "${words[0]}" "$run" ${flags[@]+"${flags[@]}"}
  launch train "${words[0]}" --run "$run" ${flags[@]+"${flags[@]}"}
}

evaluate() {
  defaults evaluate 1
  TASKS=1 cpu_tasks=1
  read_arguments 1 "EXPERIMENT [--run RUN] [--seed K] [--tasks A,B]" "$@"
  if [ -n "$(flag run)" ]; then
    start "evaluate ${words[0]}, run $(flag run)"
  else
    over_runs all
    start "evaluate the runs of ${words[0]}"
    run_of_task all
    if ! runs_of "${words[0]}" finished "$(flag seed 0)" | grep -Fxq -- "$run"; then
      say "nothing to evaluate: run $run is not finished"
      exit 0
    fi
    flags+=(--run "$run")
  fi
  launch evaluate "${words[0]}" "${flags[@]}"
}

analyze() {
  defaults analyze 1
  TASKS=1 cpu_tasks=1
  read_arguments 2 "MODEL EXPERIMENT [--out FOLDER] [--sequences N] [--length N] [--seed K]" "$@"
  start "analyze ${words[0]} with the data of ${words[1]}"
  launch analyze --model "${words[0]}" --data "${words[1]}" ${flags[@]+"${flags[@]}"}
}

prepare() {
  defaults prepare 0
  TASKS=1 cpu_tasks=1 cpus_per_task=${CPUS:-$(rehearsing && echo 1 || echo 16)} needs_gpu=0
  read_arguments 1 "EXPERIMENT [--workers N]" "$@"
  start "prepare the data of ${words[0]}"
  launch prepare "${words[0]}" ${flags[@]+"${flags[@]}"}
}

# On a login node, without a job: compute nodes often have no internet.
fetch() {
  kind=fetch
  read_arguments 1 "EXPERIMENT" "$@"
  load_software
  # shellcheck disable=SC2086 # a list of plain words
  $image python -m inheritune fetch "${words[0]}" ${flags[@]+"${flags[@]}"}
}
