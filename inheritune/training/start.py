"""The start of a run, up to its first step: checks, the first weights or a checkpoint, and the engine that
holds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from inheritune.engines import checkpoint, resize
from inheritune.engines.deepspeed_json import get_zero_stage
from inheritune.engines.engine import start_engine
from inheritune.engines.generators import seed_generators
from inheritune.errors import Stopped, UserError
from inheritune.files import writing
from inheritune.files.json_files import read_json
from inheritune.files.markers import INHERITED
from inheritune.files.writing import write_text
from inheritune.models.networks import clear_dropout
from inheritune.models.sources import Source, open_source
from inheritune.models.targets import check_start
from inheritune.runs import identity
from inheritune.runs.comparison import compare_with_reference
from inheritune.runs.job import Job
from inheritune.runs.starts import find_foreign_tokenizer, find_source, prepare_start
from inheritune.runtime import dist, watchdog
from inheritune.runtime.devices import read_gpu_name
from inheritune.runtime.log import logger, set_up_logging
from inheritune.training import validate
from inheritune.training.clocks import StartClock
from inheritune.training.distil import Teacher
from inheritune.training.inputs import RunInputs
from inheritune.training.provenance import record_provenance
from inheritune.training.state import TrainState
from inheritune.training.stopping import StopRequests

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class StartedRun:
    """A run that is ready for its next step."""

    engine: Any
    """deepspeed.DeepSpeedEngine, its weights loaded."""
    config: "PretrainedConfig"
    state: TrainState
    resumed_at: int | None
    """Step of the checkpoint that was loaded; None for a run that starts anew."""
    teacher: Teacher | None


def start_run(
    inputs: RunInputs, stops: StopRequests, clock: StartClock, watch: watchdog.Watchdog
) -> StartedRun:
    """Check the run, then load its newest complete checkpoint, or its first weights where it has none.

    Raises UserError if the run cannot be trained as asked, Stopped when asked to stop before it is loaded."""
    job, run_dir = inputs.job, inputs.job.dir
    teacher = _open_teacher(job)
    dist.run_on_rank0(_check_same_experiment, inputs, teacher)
    dist.run_on_rank0(_check_reference, inputs)
    if request := stops.ask():
        raise Stopped(f"{job.title()} did not start: {request}", again=request.may_restart)
    resumed_at, is_resized = _find_checkpoint(inputs)
    clock.end("hashes of checkpoints")
    dist.run_on_rank0(writing.remove_leftovers, run_dir.path)
    if resumed_at is not None:
        dist.run_on_rank0(checkpoint.prune_checkpoints, run_dir, resumed_at, inputs.train.keep_last)

    watch.at("loading the start or a checkpoint")
    folder, source = _open_start(job)
    foreign = (
        dist.run_on_rank0(find_foreign_tokenizer, job, inputs.val_tokens) if resumed_at is None else None
    )
    clock.end("making the start")
    if teacher:
        teacher.load(source.config, inputs.length, inputs.train.precision, inputs.device)
    set_up_logging(run_dir)
    cleared = clear_dropout(source.config)
    if cleared:
        rates = ", ".join(f"{key} {rate}" for key, rate in cleared.items())
        logger.info("dropout of the start is off, as in every run: %s", rates)
    dist.run_on_rank0(_record_start, inputs, teacher, folder, resumed_at)
    where = (job.title(), dist.get_world_size(), inputs.device, get_zero_stage(inputs.deepspeed))
    logger.info("%s on %d rank(s), %s, ZeRO %s", *where)
    logger.info("%s", inputs.batch_arithmetic)
    if foreign:
        logger.warning("%s", foreign)

    seed_generators(job.seed)
    engine = _build_engine(inputs, source, resumed_at, is_resized)
    clock.end("engine")
    state = TrainState(data=inputs.tokens.fingerprint)
    if resumed_at is not None:
        restore = resize.restore_resized if is_resized else checkpoint.restore_checkpoint
        state = TrainState.from_dict(restore(engine, run_dir, resumed_at))
        logger.info("resumed at step %d of %d", state.step, inputs.train.steps)
    clock.end("checkpoint")
    if state.step < inputs.train.steps:
        checkpoint.check_room(engine, run_dir)  # now, not after the first thousand steps
    return StartedRun(engine, source.config, state, resumed_at, teacher)


def _open_teacher(job: Job) -> Teacher | None:
    distil = job.run.distil
    if distil is None:
        return None
    return Teacher(distil, *dist.run_on_rank0(find_source, job, distil.teacher, distil.revision))


def _find_checkpoint(inputs: RunInputs) -> tuple[int | None, bool]:
    """Return the step of the newest complete checkpoint, or None, and whether it must be resized."""
    run_dir = inputs.job.dir
    step = checkpoint.find_newest_checkpoint(run_dir)
    if step is None:
        return None, False
    dist.run_on_rank0(identity.check_checkpoint, inputs.job, inputs.train, inputs.tokens.fingerprint, step)
    return step, resize.is_resize(run_dir, step, inputs.deepspeed)


def _open_start(job: Job) -> tuple[Path, Source]:
    """Return the folder of the first weights, made if it does not exist, and its opened content."""
    folder = dist.run_on_rank0(prepare_start, job)
    dist.run_on_rank0(check_start, folder)
    source = open_source(str(folder), check=False)
    identity.check_start_model(job, source.config, folder)
    return folder, source


def _build_engine(inputs: RunInputs, source: Source, resumed_at: int | None, is_resized: bool) -> Any:
    """Build the engine and fill it: from the start, from a checkpoint that must be resized, or not at all
    where DeepSpeed will load the checkpoint."""
    weights: Source | None = None
    if resumed_at is None:
        weights = source
    elif is_resized:
        weights = open_source(str(inputs.job.dir.checkpoint(resumed_at)), check=False)
    share = inputs.share
    return start_engine(
        source.config, weights, inputs.deepspeed, inputs.train, share.micro_batch, share.accumulation
    )


def _check_reference(inputs: RunInputs) -> None:
    """Raise UserError now, not after the training, if the result could not be compared with the
    reference."""
    here = {
        "data_fingerprint": inputs.tokens.fingerprint,
        "precision": inputs.train.precision,
        "windows": validate.describe_windows(inputs.val_tokens, inputs.val_starts, inputs.length),
    }
    compare_with_reference(inputs.job, np.zeros(len(inputs.val_starts)), here)


def _check_same_experiment(inputs: RunInputs, teacher: Teacher | None) -> None:
    """Raise UserError if the run folder belongs to another experiment or other data than asked for now."""
    job, tokens, run_dir = inputs.job, inputs.tokens, inputs.job.dir
    identity.check_unchanged(job, inputs.train)
    identity.check_first_stage(job, inputs.train)
    if not run_dir.provenance.is_file():
        return
    first = run_dir.read_starts("data_fingerprint")[0]
    identity.check_origin(job, first.get("start_weights") or {})
    if teacher and teacher.files != (first.get("teacher") or {}).get("files"):
        raise UserError(
            f"{run_dir.path} was taught by {first['teacher']['folder']}, whose weights are not those of "
            f"{teacher.source.folder} now; restore them or start a run of another name"
        )
    data = first["data_fingerprint"]
    if data != tokens.fingerprint:
        raise UserError(
            f"{run_dir.path} was trained on data {data}, {tokens.folder} now holds {tokens.fingerprint}; "
            f"restore that data or start a run of another name"
        )


def _record_start(inputs: RunInputs, teacher: Teacher | None, folder: Path, resumed_at: int | None) -> None:
    """Write experiment.yaml, and add this start to provenance.json."""
    job, run_dir = inputs.job, inputs.job.dir
    run_dir.stopped.unlink(missing_ok=True)
    write_text(run_dir.experiment, yaml.safe_dump(job.resolved(inputs.train), sort_keys=False))
    record_provenance(
        run_dir,
        data_fingerprint=inputs.tokens.fingerprint,
        start=str(folder),
        start_source=read_json(folder / INHERITED).get("source"),
        start_weights=identity.describe_origin(job),
        resumed_at=resumed_at,
        teacher=teacher and {"folder": str(teacher.source.folder), "files": teacher.files},
        device=str(inputs.device),
        gpu=read_gpu_name(inputs.device),
        precision=inputs.train.precision,
        deepspeed=inputs.deepspeed,
        batch=inputs.batch_arithmetic,
    )
