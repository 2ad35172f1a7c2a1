"""What an experiment describes now, compared with what a run's experiment.yaml says that it was trained as.

Nothing here imports torch: tables and figures compare too.
"""

import re
from pathlib import Path
from typing import Any

from inheritune.config.experiment import Experiment
from inheritune.config.reading import read_yaml
from inheritune.config.sections import RESUMABLE_KEYS, Train
from inheritune.config.source_shape import is_commit
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import RunDir
from inheritune.runs.job import Job

UNRESOLVED = ("train.precision",)
"""Keys that may be `auto` before the device is known."""

IDENTIFYING = ("experiment", "rehearsal", "run_name", "seed", "stage")
"""Keys that name a run."""

SHAPING = ("model", "run.layers", "run.init", "run.distil")
"""Keys (with all below them) that say which model a run is and where it came from. A change of another key,
such as a learning rate, leaves it the run of that name."""


FREE_BETWEEN_STAGES = ("stage", "run.grow.max_layers", "run.grow.margin")
"""Keys that may change between two stages: how far growth may go, and when it ends. They change no stage."""


def find_differences(before: Any, now: Any, path: str = "") -> list[tuple[str, object, object]]:
    """Return (key path, old, new) wherever two nested dicts differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            d
            for key in keys
            for d in find_differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == now else [(path, before, now)]


def find_changes_of_run(
    before: dict, now: dict, free: tuple[str, ...] = ()
) -> list[tuple[str, object, object]]:
    """Return the differences that make `now` another run: all but those of RESUMABLE_KEYS and `free`."""
    changes = find_differences(before, now)
    return [
        c
        for c in changes
        if c[0].removeprefix("train.") not in RESUMABLE_KEYS and c[0] not in free and not _names_commit(c)
    ]


def _names_commit(change: tuple[str, object, object]) -> bool:
    """Return whether a change gives the model's commit in place of a branch, as pins.check_model advises.
    Another shape is a change of its own."""
    key, before, now = change
    return key == "model.revision" and not is_commit(str(before)) and is_commit(str(now))


def find_changes_since(
    file: Path, job: Job, train: Train, free: tuple[str, ...] = ()
) -> list[tuple[str, object, object]]:
    """Return `find_changes_of_run` from `file`, the experiment.yaml of a run, to `job` (`train` resolved);
    [] if it does not exist."""
    if not file.is_file():
        return []
    return find_changes_of_run(read_yaml(file), job.resolved(train), free)


def describe_change_since(run_dir: RunDir, job: Job) -> str:
    """Return a sentence that names a change of the experiment since the finished run in `run_dir` was
    trained, or ""."""
    return _describe(find_changes_since(run_dir.experiment, job, job.settings, UNRESOLVED))


def _describe(changes: list[tuple[str, object, object]]) -> str:
    if not changes:
        return ""
    key, old, new = changes[0]
    return f"it was trained with {key} = {old}, the experiment now has {new}"


def find_job(experiment: Experiment, name: str, seed: int, run_dir: RunDir) -> Job:
    """Return the job of run `name` whose files are in `run_dir`, which may be the folder of a stage."""
    stage = re.fullmatch(r"stage(\d+)", run_dir.path.name) if experiment.run(name).grow else None
    return Job(experiment, name, seed, int(stage[1]) if stage else None)


def check_kind(folder: RunDir, is_grown: bool) -> None:
    """Raise UserError if `folder` holds a run without stages where the experiment describes a grown one
    (`is_grown`), or a grown run where it describes one without stages."""
    if is_grown and folder.experiment.is_file():
        raise UserError(
            f"{folder.path} holds a run that was trained without a 'grow' section: leave that out again, "
            f"give the run another name, or move the folder away"
        )
    if not is_grown and folder.stage(1).path.is_dir():
        raise UserError(
            f"{folder.path} holds a grown run, and the experiment has no 'grow' section for it: restore "
            f"that, give the run another name, or move the folder away"
        )


def check_own_run(run_dir: RunDir, job: Job) -> str:
    """Return `describe_change_since`; raise UserError if the finished run in `run_dir` is another one than
    `job`: of another name or seed, as after its folder or its results were copied, or of another model or
    start."""
    if not run_dir.experiment.is_file():
        raise UserError(
            f"{run_dir.path} has no experiment.yaml, which says what was trained there; restore it, or move "
            f"the folder away and train the run"
        )
    changes = find_changes_since(run_dir.experiment, job, job.settings, UNRESOLVED)
    for key, old, new in changes:
        if key in IDENTIFYING or any(key == shape or key.startswith(f"{shape}.") for shape in SHAPING):
            raise UserError(
                f"{run_dir.path} holds another run than {job.experiment.name} describes: its {key} is {old}, "
                f"the experiment's is {new}; restore that value, or move the folder away and train the run"
            )
    check_own_results(run_dir, job)
    return _describe(changes)


def check_own_results(run_dir: RunDir, job: Job) -> None:
    """Raise UserError if results.json in `run_dir` has another experiment, run, seed or stage than `job`."""
    results = read_json(run_dir.results) if run_dir.results.is_file() else {}
    own = {"experiment": job.experiment.name, "run": job.name, "seed": job.seed, "stage": job.stage}
    for key, value in own.items():
        if isinstance(results, dict) and results.get(key, value) != value:
            raise UserError(
                f"{run_dir.results} holds the results of another run: its {key} is {results[key]}, this "
                f"run's is {value}; restore the file, or move the folder away and train the run"
            )
