"""Writes the scripts of slurm/ from slurm/jobs.yaml: python tools/job_stubs.py. A test says if they are
stale."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from inheritune.config.jobs import JobSpec, load_jobs
from inheritune.submit.request import KINDS, format_usage

STUB = """#!/usr/bin/env bash
#SBATCH --job-name={name} {header}
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --kill-on-invalid-dep=yes{array}
# {about} {gpus}
#   bash slurm/{name}.sh {usage}
# Made from jobs.yaml by tools/job_stubs.py.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # in a job of plain sbatch this is Slurm's spool folder
if [ ! -f "$here/job.sh" ] && [ -n "${{SLURM_JOB_ID:-}}" ]; then
  here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||; t found; b; :found; s|\\.sh .*|.sh|; p; q')
  here=$(dirname "$(readlink -f "$here")")
fi
[ -f "$here/job.sh" ] || here=${{INHERITUNE_REPOSITORY:-${{SLURM_SUBMIT_DIR:-.}}}}/slurm
[ -f "$here/job.sh" ] || {{ echo "inheritune: $0 is a copy outside the repository; set INHERITUNE_REPOSITORY to the repository, or link the script" >&2 && exit 2; }}
# shellcheck source=slurm/job.sh
source "$here/job.sh"
run_job {name} "$@"
"""  # noqa: E501 - the text is written as it stands


def make_stub(job: JobSpec) -> str:
    """The text of slurm/NAME.sh."""
    kind = KINDS[job.verb]
    array = {"runs": " --array=1-32", None: ""}.get(kind.array, f" --array={kind.array}")
    gpus = f"{job.gpus} GPU{'s' if job.gpus > 1 else ''}." if job.gpus else "On CPUs."
    return STUB.format(
        name=job.name, header=job.header, array=array, about=job.about, gpus=gpus, usage=format_usage(job)
    )


def main() -> None:
    for job in load_jobs().values():
        job.script.write_text(make_stub(job), encoding="utf-8")
        job.script.chmod(0o755)


if __name__ == "__main__":
    main()
