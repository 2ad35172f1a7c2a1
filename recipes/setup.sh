# Sourced by quickstart.sh, tests/run.sh and slurm/job.sh. It activates an environment in which this checkout is installed
# (pip install -e), with the versions of requirements.txt as constraints.
#   An active virtual or conda environment is used as it is. Otherwise .venv is created once, under $INHERITUNE_ROOT (a scratch
#   file system) or in the repository, and reused while the requirements stay the same.
# shellcheck shell=bash
set -euo pipefail
umask o-w # other users must not write what is run or loaded again

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# setup_environment [EXTRA]: EXTRA is a name of pyproject.toml's optional dependencies (dev).
setup_environment() {
  local venv wanted ready extra=${1:-} files=("$repository/requirements.txt") pins=("$repository/requirements.txt" "$repository/tests/requirements.txt")
  if [ "$extra" = dev ]; then files=("${pins[@]}"); fi
  if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    python - "$repository" "$extra" "${files[@]}" <<'PY' || exit 2
import importlib.metadata as m, os, re, shlex, sys
repository, extra, *files = sys.argv[1:]
lines = [line.split("#")[0].strip() for path in files for line in open(path)]
wrong = []
for name, pin in (re.match(r"([\w.-]+)==(\S+)", line).groups() for line in lines if line):
    try:
        have = m.version(name).split("+")[0]
    except m.PackageNotFoundError:
        have = "missing"
    if have == "missing":
        wrong.append(f"{name}=={pin} ({have})")
    elif have != pin:
        print(f"note: the active environment has {name} {have}, this repository is tested with {pin}")
sys.path = [place for place in sys.path if place]  # not the current folder
try:
    import inheritune
    here = os.path.dirname(os.path.dirname(os.path.realpath(inheritune.__file__)))
    if here != os.path.realpath(repository) and not os.path.exists(os.path.join(here, "COMMIT")):  # a snapshot of it
        print(f"note: the active environment has this package from {here}, not from {repository}")
except ImportError:
    wrong.append("this package")
if wrong:
    what = shlex.quote(repository + (f"[{extra}]" if extra else ""))
    sys.exit(f"the active environment {sys.prefix} lacks {', '.join(wrong)}; install them with 'pip install "
             f"{' '.join('-c ' + shlex.quote(path) for path in files)} -e {what}', or deactivate it and a .venv is created for you")
PY
    return
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed (found $(python3 --version 2>&1)); put one first on the PATH" >&2
    exit 2
  }
  venv="${INHERITUNE_ROOT:-$repository}/.venv"
  wanted=$(cat "$repository/pyproject.toml" "${pins[@]}" <(echo "$repository") | cksum | tr ' ' -)
  ready=$venv/ready-$wanted${extra:+-$extra}
  if [ ! -f "$ready" ] && { [ -n "$extra" ] || [ ! -f "$ready-dev" ]; }; then
    if [ -n "${INHERITUNE_NO_BUILD:-}" ]; then # in a job of slurm/, whose node may have no internet
      echo "inheritune: there is no environment on node $(hostname): neither an active one nor $venv; make it on the login node (bash slurm/fetch.sh EXPERIMENT does), and do not submit with --export=NONE" >&2
      exit 2
    fi
    echo "Setting up $venv (once; 2 to 4 minutes, about 2 GB) ..."
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    forget_half_installed "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]/#/--constraint=}" --editable "$repository${extra:+[$extra]}"
    touch "$ready"
    echo "to use it in a shell: source $(printf %q "$venv")/bin/activate"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
}

# A package that pip was stopped in counts as installed for pip, though files of it are missing: forget_half_installed VENV.
# pip writes INSTALLER after all of them.
forget_half_installed() {
  local info
  for info in "$1"/lib/python*/site-packages/*.dist-info; do
    [ -e "$info/INSTALLER" ] || rm -rf "$info"
  done
}

# Stop if there is a GPU that the installed torch cannot use: training would run on the CPU without a word.
check_gpu() {
  command -v nvidia-smi > /dev/null || return 0
  [ "${DS_ACCELERATOR:-}" = cpu ] && return 0
  python -c 'from inheritune.errors import UserError
from inheritune.runtime.devices import get_device
import sys
try: print("device:", get_device())
except UserError as error: sys.exit(f"inheritune: {error}")' || exit 2
}

# Print the default number of processes: two, or one on a machine with a single GPU.
fitting_procs() {
  local gpus=0
  if command -v nvidia-smi > /dev/null && [ "${DS_ACCELERATOR:-}" != cpu ]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  fi
  if [ "$gpus" = 1 ]; then echo 1; else echo 2; fi
}

# Run a verb, and note for print_times how long it took.
times=()
run_step() {
  local start=$SECONDS
  echo "\$ python -m inheritune $*"
  python -m inheritune "$@"
  times+=("$((SECONDS - start)) s  $1")
}
print_times() {
  echo "done in $SECONDS s:"
  printf '  %s\n' "${times[@]}"
}

# For a script that works in the folder of its caller: stop on a login node, then make this checkout's package importable there.
# setup_for_caller SRUN_OPTIONS ...
setup_for_caller() {
  refuse_login_node "$@"
  setup_environment
  export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
}

on_login_node() { [ -z "${SLURM_JOB_ID:-}" ] && command -v srun > /dev/null && sinfo -h > /dev/null 2>&1; }

# Stop on a login node, since training belongs on a compute node: refuse_login_node SRUN_OPTIONS ...
refuse_login_node() {
  if on_login_node; then
    echo "This looks like a Slurm login node. Run it on a compute node instead:" >&2
    echo "  srun --ntasks=1 --mem=8G $* bash recipes/$(basename "$0")" >&2
    exit 2
  fi
}
