"""Records of submitted jobs, runs/jobs/ID/submission.json: what each does, and how it was asked for.

The queue knows a job by its name only. The record says which run it works on, so that the same work is not
queued twice, and which options it was submitted with, so that it can be submitted again as it was."""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inheritune.config import names
from inheritune.config.jobs import TRAINING, load_jobs
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.storage import find_root

RECORD = "submission.json"
SWITCHES = ("dry_run", "no_snapshot", "rehearse", "help")
"""Flags without a value that are about submitting, not about the verb."""


@dataclass(frozen=True)
class Key:
    """A piece of work: two queued jobs with keys that meet would do the same."""

    verb: str
    """train (also of a growth and of baselines), evaluate, analyze or prepare."""
    experiment: str
    run: str = ""
    """Empty for all runs, or where the verb has none."""
    stage: int | None = None
    """None for all stages."""
    seed: int = 0
    rehearsal: bool = False
    detail: str = ""
    """What else tells two pieces of work apart, such as the tasks of an evaluation; of a preparation the
    data's folder, which several experiments may share."""

    def meets(self, other: "Key") -> bool:
        """Return whether both would write the same."""
        same = ["verb", "experiment", "run", "seed", "rehearsal", "detail"]
        if self.verb == "prepare" and self.detail and other.detail:
            same = ["verb", "detail"]
        is_same = all(getattr(self, name) == getattr(other, name) for name in same)
        return is_same and (None in (self.stage, other.stage) or self.stage == other.stage)

    def describe(self) -> str:
        """Return the work in words."""
        run = f"/{self.run}" if self.run else ""
        stage = f" stage {self.stage}" if self.stage else ""
        mark = "REHEARSAL " if self.rehearsal else ""
        detail = f" {self.detail}" if self.detail else ""
        return f"{mark}{self.verb} {self.experiment}{run}{stage}, seed {self.seed}{detail}"


@dataclass(frozen=True)
class Record:
    """A submitted job."""

    job: str
    """Its name in slurm/jobs.yaml."""
    script: str
    words: tuple[str, ...]
    options: tuple[str, ...]
    """All options that sbatch was given."""
    command: tuple[str, ...]
    again: str
    """The line to paste that asks for the same again."""
    keys: tuple[Key, ...] = ()
    user_options: tuple[str, ...] = ()
    """The options after the two dashes."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The variables that shaped it, for `retry`."""
    folder: str = ""
    """The folder that it was submitted from, from which relative paths count."""
    code: str = ""
    """The snapshot that it runs; empty for the live checkout."""
    restarts: int = 0
    """Jobs before it in a chain of a site that does not requeue."""
    submitted: str = ""


def find_record(job: str) -> Path:
    """Return the path of a job's record. `job` may name a task of an array."""
    return find_root() / "runs" / names.JOBS / job.partition("_")[0] / RECORD


def write_record(job: str, record: Record) -> None:
    """Write the record of job `job`."""
    path = find_record(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(record) | {"submitted": record.submitted or time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def read_record(job: str) -> Record | None:
    """Return the record of job `job`; None if it has none or it cannot be read."""
    path = find_record(job)
    if not path.is_file():
        return None
    with suppress(UserError, TypeError, KeyError):
        raw: dict[str, Any] = read_json(path)
        keys = tuple(Key(**key) for key in raw.pop("keys"))
        lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
        return Record(**(raw | lists), keys=keys)
    return None


def make_keys(verb: str, experiment: str, runs: Iterable[str], **details: Any) -> tuple[Key, ...]:
    """Return the keys of a job of `verb` on `runs` of an experiment, given by name or path."""
    name = Path(experiment).name
    for ending in (".yaml", ".yml"):
        name = name.removesuffix(ending)
    purpose = "train" if verb in TRAINING else verb
    return tuple(Key(purpose, name, run, **details) for run in runs)


def read_keys(job: str, command: str) -> tuple[Key, ...]:
    """Return what a queued job does: from its record, or from its `command`.

    A script that trains or grows one run, and that plain sbatch queued, has no record before it starts."""
    if record := read_record(job):
        return choose_keys(record, job)
    script, *words = command.split() or [""]
    spec = load_jobs().get(Path(script).stem)
    if not spec or spec.verb not in ("train", "grow") or Path(script).parent.name != "slurm":
        return ()
    places, flags = _split_words(words)
    experiment, run = [*filter(None, (spec.experiment, spec.run)), *places, "", ""][:2]
    stage, seed = flags.get("stage", spec.stage), flags.get("seed", 0)
    with suppress(ValueError):  # a mistake, of which the job ends by itself
        details = {
            "stage": int(stage) if stage else None,
            "seed": int(seed),
            "rehearsal": "rehearse" in flags,
        }
        return make_keys(spec.verb, experiment, [run], **details) if run else ()
    return ()


def _split_words(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return (arguments by position, {flag: value}) of a job's words. A flag has a value."""
    places, flags, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            places.append(word)
        elif equals or flag[2:].replace("-", "_") in SWITCHES or not rest:
            flags[flag[2:]] = value
        else:
            flags[flag[2:]] = rest.pop(0)
    return places, flags


def choose_keys(record: Record, job: str) -> tuple[Key, ...]:
    """Return what a job of this record does: of a task of an array over runs, its own work only."""
    task = job.partition("_")[2]
    arrays = [word.partition("=")[2] for word in record.options if word.startswith("--array=")]
    if len(record.keys) > 1 and task.isdecimal() and arrays:
        indices = list_indices(arrays[0])
        if len(indices) == len(record.keys) and int(task) in indices:
            return (record.keys[indices.index(int(task))],)
    return record.keys


_TASKS = "[0-9]{1,7}(-[0-9]{1,7}(:[1-9][0-9]{0,6})?)?"
ARRAY = re.compile(f"{_TASKS}(,{_TASKS})*(%[0-9]+)?")


def list_indices(tasks: str) -> list[int]:
    """Return the sorted indices of an array such as 1-12%1 or 1,3,5-9:2. Raises UserError if it is none."""
    found: set[int] = set()
    for part in tasks.partition("%")[0].split(",") if ARRAY.fullmatch(tasks) else ():
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    if not found:
        raise UserError(f"ARRAY takes tasks such as 1-12%1 or 1,4,7, or no for a single job (got '{tasks}')")
    return sorted(found)
