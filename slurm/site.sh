# shellcheck shell=bash
# The one file to edit for your cluster. Every script of this folder reads it. What is left empty is guessed from sinfo or left
# to the site's default; a value set in the environment wins (SITE_TIME=04:00:00 bash slurm/train.sh ...).
# `source slurm/site.sh` in a login shell (bash or zsh) also exports them as the SBATCH_* variables that plain `sbatch slurm/X.sh`
# reads. After editing, source it in a new shell.
# Several clusters or partitions: SITE=name reads slurm/sites/name.sh first, whose values go before those of this file.
if [ -n "${SITE:-}" ]; then
  _site_folder=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)/sites
  # a path could lead back to this file
  if [ "${SITE#*/}" != "$SITE" ] || [ ! -f "$_site_folder/$SITE.sh" ]; then
    echo "inheritune: SITE=$SITE names no file of $_site_folder ($(cd "$_site_folder" && echo *.sh)); copy example.sh to $SITE.sh there" >&2
    return 2
  fi
  # shellcheck source=slurm/sites/example.sh
  . "$_site_folder/$SITE.sh"
fi

# --- what is asked of Slurm
: "${SITE_ACCOUNT:=${SBATCH_ACCOUNT:-}}"       # whom the hours are charged to; `sacctmgr show associations user=$USER` lists yours
: "${SITE_PARTITION:=${SBATCH_PARTITION:-}}"   # empty: the default one, or the one with the most GPU nodes if that has none
: "${SITE_QOS:=${SBATCH_QOS:-}}"               # quality of service, where the site has several
: "${SITE_CONSTRAINT:=${SBATCH_CONSTRAINT:-}}" # node feature, for example "a100&80gb"
: "${SITE_GPU_TYPE:=}"                         # type in `sinfo -o %G` (gpu:h200:8 is type h200); empty: any
: "${SITE_GPUS_PER_NODE:=}"                    # most GPUs to take of one node; empty: as many as most GPU nodes have
: "${SITE_CPUS_PER_GPU:=}"                     # empty: a GPU's share of its node, at most 12
: "${SITE_MEM_PER_GPU:=}"                      # with unit, for example 60G; empty: 90% of a GPU's share, at most 120 GB
: "${SITE_CPU_PARTITION:=}"                    # for prepare.sh and rehearsals, without GPU; empty: SITE_PARTITION, or the default
: "${SITE_TIME:=${SBATCH_TIMELIMIT:-}}"        # of one job; the work goes on in the next. Empty: 24 h, or the partition's limit
: "${SITE_LEAD:=300}"                          # seconds before that limit at which a job begins to save and stop
: "${SITE_MAIL:=}"                             # address for mail at the end, failure and requeue of a job; empty: none
: "${SITE_REQUEUE:=yes}"                       # no: the site does not let jobs requeue themselves; they submit themselves again

# --- what a job finds on the nodes
: "${SITE_MODULES:=}"                          # modules to load, separated by spaces: "python/3.11 cuda/12.8"
: "${SITE_CONDA:=}"                            # conda environment (name or folder) made from slurm/environment.yml
: "${SITE_APPTAINER:=}"                        # image made from slurm/inheritune.def; its path may hold no spaces
: "${SITE_INTERFACE:=}"                        # network interface between the nodes, for example ib0; empty: InfiniBand's, or the one that reaches the other nodes
: "${INHERITUNE_ROOT:=${SCRATCH:+$SCRATCH/inheritune}}"   # runs/ and data/: a large shared disk; empty: the repository itself
: "${HF_HOME:=${INHERITUNE_ROOT:+$INHERITUNE_ROOT/huggingface}}"   # downloads of fetch.sh; empty: ~/.cache/huggingface

# --- nothing to edit below
: "${SITE_GUESSED_PARTITION:=}" "${SITE_GUESSED_TIME:=}" # what was guessed is for jobs with GPUs
_site_time=$SITE_TIME
if [ -z "${SLURM_JOB_ID:-}" ] && command -v sinfo > /dev/null; then
  # of the partition: its name (if it must be asked for), GPUs a node, CPUs and MB a GPU, minutes a job
  _site_guess=$({ sinfo -h -e -o '%P|%D|%c|%m|%l|%G' 2> /dev/null || true; } | awk -F'|' -v wanted="$SITE_PARTITION" -v type="$SITE_GPU_TYPE" '
    { name = $1; standard = sub(/\*$/, "", name); gpus = 0; rest = $6
      while (match(rest, /gpu(:[^:,(]+)?:[0-9]+/)) {
        entry = substr(rest, RSTART, RLENGTH); rest = substr(rest, RSTART + RLENGTH); count = entry; sub(/.*:/, "", count)
        if (type == "" || index(entry, ":" type ":")) gpus += count
      }
      minutes = 0
      if ($5 != "infinite" && $5 != "n/a") {
        n = split($5, t, /[-:]/)
        if ($5 ~ /-/) minutes = t[1] * 1440 + t[2] * 60 + t[3]
        else if (n == 3) minutes = t[1] * 60 + t[2]
        else minutes = t[1]
      }
      if (wanted != "" && !index("," wanted ",", "," name ",")) next   # sbatch takes several, with commas
      if (gpus == 0) next
      rank = $2 + (standard ? 1000000 : 0)      # the default partition first, then what most nodes are like
      if (rank > best) { best = rank; line = (standard || wanted != "" ? "-" : name) " " gpus " " int($3 / gpus) " " int(0.9 * $4 / gpus) " " minutes }
    }
    END { print line }')
  if [ -n "$_site_guess" ]; then
    _site_field() { echo "$_site_guess" | cut -d' ' -f"$1"; }
    _site_least() { if [ "$1" -lt "$2" ]; then echo "$1"; else echo "$2"; fi; }
    if [ "$(_site_field 1)" != - ]; then SITE_PARTITION=$(_site_field 1) SITE_GUESSED_PARTITION=$(_site_field 1); fi
    : "${SITE_GPUS_PER_NODE:=$(_site_field 2)}"
    : "${SITE_CPUS_PER_GPU:=$(_site_least "$(_site_field 3)" 12)}"
    : "${SITE_MEM_PER_GPU:=$(_site_least "$(_site_field 4)" 120000)M}"
    if [ "$(_site_field 5)" -gt 0 ]; then : "${SITE_TIME:=$(_site_least "$(_site_field 5)" 1440)}"; fi
  fi
fi
: "${SITE_TIME:=24:00:00}"
[ -n "$_site_time" ] || SITE_GUESSED_TIME=$SITE_TIME

export HF_HOME INHERITUNE_ROOT
[ -n "$INHERITUNE_ROOT" ] || unset INHERITUNE_ROOT
[ -n "$HF_HOME" ] || unset HF_HOME
_site_export() { if [ -n "$2" ]; then export "$1=$2"; fi; }
_site_export SITE_GUESSED_PARTITION "$SITE_GUESSED_PARTITION"
_site_export SITE_GUESSED_TIME "$SITE_GUESSED_TIME"
_site_export SBATCH_ACCOUNT "$SITE_ACCOUNT"
_site_export SBATCH_PARTITION "$SITE_PARTITION"
_site_export SBATCH_QOS "$SITE_QOS"
_site_export SBATCH_CONSTRAINT "$SITE_CONSTRAINT"
_site_export SBATCH_GPUS_PER_NODE "${SITE_GPUS_PER_NODE:+${SITE_GPU_TYPE:+$SITE_GPU_TYPE:}$SITE_GPUS_PER_NODE}"
_site_export SBATCH_CPUS_PER_GPU "$SITE_CPUS_PER_GPU"
_site_export SBATCH_MEM_PER_GPU "$SITE_MEM_PER_GPU"
_site_export SBATCH_TIMELIMIT "$SITE_TIME"
_site_export SBATCH_SIGNAL "B:USR1@$SITE_LEAD"
if [ "$SITE_REQUEUE" = yes ]; then export SBATCH_REQUEUE=1; else export SBATCH_NO_REQUEUE=1; fi
