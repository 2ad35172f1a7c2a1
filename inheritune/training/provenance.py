"""provenance.json: when, where and with what each start of a run was made."""

import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from inheritune.config.paths import COMMIT, REPOSITORY
from inheritune.files.json_files import write_json
from inheritune.files.rundir import RunDir
from inheritune.runtime.dist import get_world_size

GIT_PATIENCE_S = 30


def record_provenance(run_dir: RunDir, **facts: Any) -> None:
    """Add this start of the run to provenance.json: its time, machine, code and versions, and `facts` (data,
    parents)."""
    starts = run_dir.read_starts() if run_dir.provenance.is_file() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "host": socket.gethostname(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "ranks": get_world_size(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in ("torch", "deepspeed", "transformers", "numpy")},
            **facts,
        }
    )
    write_json(run_dir.provenance, {"starts": starts})


def git_commit() -> str | None:
    """Return the commit of the repository, with '+changes' if files differ from it.

    Returns None outside a git checkout, without git, and where git refuses or does not answer: a checkout
    that another user owns, a network disk that hangs. A snapshot of the checkout names the commit itself."""
    if (REPOSITORY / COMMIT).is_file():
        return (REPOSITORY / COMMIT).read_text(encoding="utf-8").strip()
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "-uno") else "")


def _git(*words: str) -> str | None:
    """Return the output of a git command in the repository, or None if it fails. It takes no lock: others may
    be working in the checkout."""
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=GIT_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
