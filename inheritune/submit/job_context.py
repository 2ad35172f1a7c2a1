"""A running job: what it is, what it works on, and what it says."""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import xxhash

from inheritune.cluster.job_records import Key
from inheritune.cluster.record_tail import read_last_rows
from inheritune.cluster.slurm_queue import STATE
from inheritune.config import names
from inheritune.files.processes import get_node_name
from inheritune.files.rundir import get_seed_dir
from inheritune.files.storage import find_root
from inheritune.submit.slurm_commands import ask_slurm, get_this_job

MESSAGES = ("more", "stopped", "failure")


@dataclass(frozen=True)
class JobContext:
    """What `begin` has found out, and `end` reads."""

    verb: str
    again: str
    """The line to paste that does the same again."""
    slots: bool = False
    """Whether the tasks of its array take turns on one run."""
    keys: tuple[Key, ...] = ()
    restarts: int = 0
    progress: str = ""
    """What was finished when it began."""
    node: str = ""
    nodes: str = ""
    job: str = field(default_factory=get_this_job)

    @property
    def array(self) -> str:
        """The id of the job's array; empty for a single job."""
        return self.job.partition("_")[0] if "_" in self.job else ""

    @property
    def task(self) -> str:
        return self.job.partition("_")[2]

    @property
    def folder(self) -> Path:
        """The folder in which the job's script and its program exchange messages."""
        return find_jobs_folder() / self.job

    @property
    def last_failure(self) -> Path:
        """Cause and progress of the array's last failed slot."""
        return find_jobs_folder() / f"{self.array}.failed"

    @property
    def array_stopped(self) -> Path:
        """Why the rest of the array must not run."""
        return find_jobs_folder() / f"{self.array}.stopped"

    @property
    def stalls(self) -> Path:
        """How many restarts in a row came to nothing."""
        return find_jobs_folder() / f"{self.array or self.job}.stalls"

    def say(self, text: str) -> None:
        """Print a line of the job's log."""
        print(f"{time.strftime('%F %T')} job {self.job}: {text}", file=sys.stderr, flush=True)

    def read_message(self, name: str) -> str | None:
        """Return what the program left under `name` in this start; None if nothing."""
        with suppress(OSError):
            return (self.folder / name).read_text(encoding="utf-8", errors="replace").strip()
        return None

    def write(self) -> None:
        """Keep this for `end`. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in MESSAGES:
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / STATE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def list_run_folders(self) -> list[Path]:
        """Return the folders of the runs that the job trains; none where it trains nothing."""
        found = []
        for seed, key in self._list_seed_folders():
            stage = f"stage{key.stage}" if key.stage else ""
            found += [seed / run / stage for run in key.run.split(",")]
        return found

    def _list_seed_folders(self) -> list[tuple[Path, Key]]:
        """Return (folder of all runs of the seed, key) for each run that the job trains."""
        return [
            (get_seed_dir(key.experiment, key.seed, key.rehearsal), key)
            for key in self.keys
            if key.verb == "train" and key.run
        ]

    def measure_progress(self) -> str:
        """Return a text that changes with every step, checkpoint and run that the job's experiment has
        finished; empty for a job that trains nothing."""
        found = {seed for seed, _ in self._list_seed_folders()}
        parts = []
        for seed in sorted(found):
            for name in ("COMPLETE", "DONE"):
                parts += sorted(str(path) for path in seed.rglob(name))
            for path in sorted(seed.rglob("metrics.jsonl")):
                row = read_last_rows(path, ("step",)).get("step", {})
                parts += [f"{path} {row['step']}"] if row.get("step") else []
        return xxhash.xxh3_64_hexdigest("\n".join(parts).encode()) if found else ""


def find_jobs_folder() -> Path:
    """Return the folder of the messages and records of all jobs."""
    return find_root() / "runs" / names.JOBS


def read_context(environment: Mapping[str, str] = os.environ) -> JobContext:
    """Return what `begin` has kept. Without it, where the disk is full, a context that knows the job only."""
    with suppress(OSError, ValueError, TypeError):
        raw = json.loads((find_jobs_folder() / get_this_job() / STATE).read_text(encoding="utf-8"))
        raw["keys"] = tuple(Key(**key) for key in raw["keys"])
        return JobContext(**raw)
    return JobContext("", environment.get("INHERITUNE_AGAIN", ""), node=get_node_name())


def set_comment(job: str, text: str) -> None:
    """Put a failed job's cause where no disk is needed: `scontrol show job` and sacct print it."""
    ask_slurm("scontrol", "update", f"jobid={job}", f"comment={text[:250]}", tries=1)
