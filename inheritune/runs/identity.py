"""Whether the files in a run's folder belong to the run that was requested.

A folder may hold the start of a model that the experiment no longer describes, a checkpoint that was copied
from another run, or stages that were grown under other settings. Training would continue from each of them
without an error, as another run than its experiment.yaml describes. So a checkpoint's marker names its run
(`describe_run`), and every start compares.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from inheritune.config.layers import repeat_middle
from inheritune.config.run import External
from inheritune.config.sections import Train
from inheritune.errors import UserError
from inheritune.files.advice import describe_other_origin
from inheritune.files.json_files import read_json
from inheritune.files.markers import COMPLETE
from inheritune.files.rundir import find_weights, get_results_dir
from inheritune.models.architectures import find_architecture
from inheritune.models.layer_facts import cut_config
from inheritune.models.networks import build_config
from inheritune.models.surgery import INCIDENTAL, halve_config
from inheritune.runs.changes import (
    FREE_BETWEEN_STAGES,
    find_changes_of_run,
    find_changes_since,
    find_differences,
)
from inheritune.runs.job import Job


def describe_run(job: Job, train: Train, data_fingerprint: str) -> dict:
    """Return all that distinguishes a run (with `train` as resolved) from other runs, as JSON holds it."""
    return {**job.resolved(train), "data_fingerprint": data_fingerprint}


def check_unchanged(job: Job, train: Train, free: tuple[str, ...] = ()) -> None:
    """Raise UserError if the run was started under other settings than `job` has now, except for the keys
    `free`."""
    if changes := find_changes_since(job.dir.experiment, job, train, free):
        key, old, new = changes[0]
        raise UserError(
            f"{job.dir.path} was started with {key} = {old}, now it is {new}; go back to it, or start a run "
            f"of another name"
        )


def check_checkpoint(job: Job, train: Train, data_fingerprint: str, step: int) -> None:
    """Raise UserError if checkpoint `step` was written by another run than `job`. Markers of older versions
    do not name their run."""
    folder = job.dir.checkpoint(step)
    before = read_json(folder / COMPLETE).get("run")
    changes = find_changes_of_run(before, describe_run(job, train, data_fingerprint)) if before else []
    if changes:
        key, old, new = changes[0]
        raise UserError(
            f"checkpoint {folder} is of another run: {key} is {old} there and {new} here; move it away, or "
            "go back to that value"
        )


def is_kept(folder: Path, run: dict) -> bool:
    """Return whether `folder` holds weights that the run described by `run` has kept. Weights of an earlier
    attempt under other settings do not count."""
    marker = folder / COMPLETE
    before = read_json(marker).get("run") if marker.is_file() else None
    if not before:
        return False
    return not find_changes_of_run(before, run)


def check_first_stage(job: Job, train: Train) -> None:
    """Raise UserError if a stage of a grown run would be trained under other settings than the first was."""
    first = job.root.stage(1).experiment
    if not job.stage or job.stage == 1 or not first.is_file():
        return
    if job.root.stage(1).provenance.is_file():
        check_origin(job, job.root.stage(1).read_starts()[0].get("start_weights") or {})
    changes = find_changes_since(first, job, train, FREE_BETWEEN_STAGES)
    if changes:
        key, old, new = changes[0]
        raise UserError(
            f"stage 1 of {job.root.path} was trained with {key} = {old}, now it is {new}; go back to it, or "
            "grow a run of another name"
        )


def describe_origin(job: Job) -> dict[str, str]:
    """Return {run: hash of its weights} of the finished runs of the same file that the job's start is copied
    from, and of evaluated ones that are the same third-party model."""
    origin: dict[str, str] = {}
    copied = job.run.init.copied
    same = External(source=copied.source, revision=copied.revision) if copied else None
    for name, run in job.experiment.runs.items():
        if same and run.init.external == same and (known := job.sibling(name).identify_weights()):
            origin[name] = known
    if copied and copied.source in job.experiment.runs:
        weights = find_weights(job.experiment, copied.source, job.seed)
        if weights is not None:
            origin[copied.source] = get_results_dir(weights).weights_hash()
    if job.stage and job.continues_stage:
        before = job.root.stage(job.stage - 1)
        if before.is_done():
            origin[f"{job.name}/stage{job.stage - 1}"] = before.weights_hash()
    return origin


def check_origin(job: Job, before: dict[str, str]) -> None:
    """Raise UserError if a run that the job's start was copied from has other weights now, with which the
    result would be compared. `before` is what `describe_origin` returned at that start. A run that no longer
    exists is not an error."""
    now = describe_origin(job)
    for name, weights in before.items():
        if now.get(name, weights) != weights:
            raise UserError(describe_other_origin(job.root.path, name))


def check_start_model(job: Job, config: Any, folder: Path) -> None:
    """Raise UserError if the start in `folder`, of configuration `config`, is not the model that the
    experiment describes.

    It is checked only if the experiment defines the shape: for a random start, and for a copy of a run of the
    same file."""
    copied = job.run.init.copied
    if copied and copied.source not in job.experiment.runs:
        return
    model, grow = job.experiment.model, job.run.grow
    wanted = build_config(model, getattr(config, find_architecture(config).layers))
    if job.run.init.half_width:
        wanted = halve_config(wanted)
    elif job.stage and grow and grow.from_ == "middle":
        depths = job.depths()[: job.stage]
        wanted = build_config(model, depths[0])
        for before, after in pairwise(depths):
            wanted = cut_config(wanted, repeat_middle(before, after - before))
    stored, asked = ({k: v for k, v in c.to_dict().items() if k not in INCIDENTAL} for c in (config, wanted))
    changes = find_differences(
        json.loads(json.dumps(stored, default=str)), json.loads(json.dumps(asked, default=str))
    )
    changes = [c for c in changes if c[0] in asked]
    if changes:
        key, old, new = changes[0]
        raise UserError(
            f"{folder} holds another model than {job.experiment.name} describes: its {key} is {old}, the "
            f"experiment's {new}; go back to that, or delete the folder if it is left from before, or "
            "give the experiment another name"
        )
