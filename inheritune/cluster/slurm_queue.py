"""The user's Slurm jobs: which are in the queue, and which job worked last on each run."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from inheritune.cluster.job_records import Key, Record, choose_keys, read_keys, read_record
from inheritune.config import names
from inheritune.files.storage import find_root, list_names

STATE = "state"
"""File in the folder of a job that has started (submit/job_context.py)."""

SQUEUE = ["squeue", "-h", "-r", "-o", "%i|%A|%T|%N|%r|%E|%o"]
"""Array tasks one by one: job (123_4), its own number, state, nodes, reason for waiting, dependency,
command. The command is last, because it may hold anything, a line break too."""
JOB_NAME = re.compile(r"[0-9]+(_[0-9]+)?")


@dataclass(frozen=True)
class QueuedJob:
    """The last Slurm job that worked on a run. `state` is squeue's; it is empty if the job has left the
    queue."""

    name: str
    failure: str = ""
    state: str = ""
    where: str = ""
    dependency: str = ""
    command: str = ""

    def describe(self) -> str:
        """Return the job's name with its place in the queue, as a cell."""
        if self.state == "RUNNING":
            return f"{self.name} on {self.where}"
        return f"{self.name} {self.state} {self.where}".rstrip()

    def describe_waiting(self) -> str:
        """Return why the job waits, as a cell: Slurm's reason, or what it depends on."""
        state = "held" if self.is_held else self.state
        depends = re.sub(r"\((?:unfulfilled|failed)\)", "", self.dependency)
        reason = f"({depends})" if depends and self.where == "(Dependency)" else self.explain_where()
        return f"{self.name} {state} {reason}".rstrip()

    def explain_where(self) -> str:
        """Return the job's nodes, or why it waits, with what lets a held job start."""
        return f"{self.where}: scontrol release {self.name}" if self.is_held else self.where

    @property
    def is_held(self) -> bool:
        """Whether the user, the site or Slurm, after starts that failed, holds the job back."""
        return self.state == "PENDING" and "held" in self.where.lower()

    @property
    def is_lost(self) -> bool:
        """Whether it waits for a job that has failed, so that it will never start."""
        return self.where == "(DependencyNeverSatisfied)"


def has_slurm(queue: dict[str, QueuedJob] | None) -> bool:
    """Return whether this machine can submit to a Slurm, given `read_queue`. Its commands alone may be
    installed."""
    return shutil.which("sbatch") is not None and queue is not None


def read_queue(everybody: bool = False, timeout_s: float = 5) -> dict[str, QueuedJob] | None:
    """Return {number or name: job} of the user's jobs in the queue; None where there is no Slurm or it does
    not answer within `timeout_s` seconds.

    `everybody`: also those of other users who work in the same $INHERITUNE_ROOT, where Slurm shows them."""
    folder = find_root() / "runs" / names.JOBS
    recorded = set(list_names(folder)) if everybody else set()
    whose = ["-a"] if everybody else ["--me"]
    try:
        done = subprocess.run(
            [*SQUEUE, *whose], capture_output=True, text=True, errors="replace", timeout=timeout_s, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = {}
    for line in done.stdout.splitlines():
        fields = line.split("|", 6)
        if len(fields) < 7 or not JOB_NAME.fullmatch(fields[0]):  # the rest of a command, or a notice
            continue
        name, number, state, nodes, reason, dependency, command = fields
        if everybody and name.partition("_")[0] not in recorded:
            continue
        where = nodes or f"({reason})"
        job = QueuedJob(name, "", state, where, dependency.replace("(null)", ""), command)
        found[name] = found[number] = job
    return found


def list_queued_work(queue: dict[str, QueuedJob] | None) -> list[tuple[Key, QueuedJob]]:
    """Return (work, job) of the user's jobs in the queue, those that run first. Tasks of an array that wait
    for the same work are one."""
    found: dict[tuple[Key, str], QueuedJob] = {}
    records: dict[str, Record | None] = {}
    for name, job in (queue or {}).items():
        if name != job.name:
            continue
        array = _name_array(name)
        if array not in records:
            records[array] = read_record(name)
        record = records[array]
        for key in choose_keys(record, name) if record else read_keys(name, job.command):
            place = (key, name if job.state == "RUNNING" else array)
            found.setdefault(place, job)
    listed = [(key, job) for (key, _), job in found.items()]
    return sorted(listed, key=lambda work: work[1].state != "RUNNING")


def list_lost_work(queue: dict[str, QueuedJob] | None) -> list[tuple[Key, str]]:
    """Return (work, sentence) of the jobs that left the queue before they started: they waited for a job that
    failed, or were cancelled. None of them where squeue does not answer."""
    folder, found = find_root() / "runs" / names.JOBS, []
    listed = set(list_names(folder)) if queue is not None else set()
    started = {name.partition("_")[0] for name in listed if (folder / name / STATE).is_file()}
    for name in sorted(filter(str.isdigit, listed), key=int):
        record = read_record(name) if name not in started and name not in (queue or {}) else None
        waits = [word for word in record.options if word.startswith("--dependency=")] if record else []
        if record and not any(_name_array(name) == _name_array(other) for other in queue or {}):
            why = f" (it waited for {waits[0].partition('=')[2]})" if waits else ""
            text = f"job {name} left the queue before it started{why}"
            found += [(key, text) for key in record.keys]
    return found


def read_jobs(queue: dict[str, QueuedJob] | None) -> dict[Path, QueuedJob]:
    """Return {run folder: the last job that worked on it}, from runs/jobs/ (job_reports.report_run,
    slurm/job.sh).

    If this job has finished and other tasks of its array wait, it is the first of these. Entries that are not
    named like a job or cannot be read are ignored."""
    queued = queue or {}
    arrays: dict[str, QueuedJob] = {}
    for name, job in queued.items():
        arrays.setdefault(_name_array(name), job)
    base, found = find_root(), {}
    folder = base / "runs" / names.JOBS
    for name, run in _list_jobs(folder):
        job = queued.get(name) or arrays.get(_name_array(name)) or QueuedJob(name)
        failure = _read_failure(folder / name / "failure")
        found[base / run] = QueuedJob(job.name, failure, job.state, job.where)
    return found


def _name_array(job: str) -> str:
    """Return the common start of the names of an array's tasks: 123_ for 123_4."""
    return job.partition("_")[0] + "_"


def _list_jobs(folder: Path) -> list[tuple[str, str]]:
    """Return (job, path of its run below $INHERITUNE_ROOT) of each folder in runs/jobs/, oldest first."""
    marks: list[tuple[int, str, str]] = []
    listed: list[str] = []
    with suppress(OSError):
        listed = os.listdir(folder)
    for name in filter(JOB_NAME.fullmatch, listed):
        with suppress(OSError):
            run = folder / name / "run"
            changed_ns = run.stat().st_mtime_ns
            marks.append((changed_ns, name, run.read_text(encoding="utf-8", errors="replace").strip()))
    return [(name, run) for _, name, run in sorted(marks)]


def _read_failure(file: Path) -> str:
    """Return the first line of a job's failure file; an empty string if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
