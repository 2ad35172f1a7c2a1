"""`evaluate`: measure a finished run, or any checkpoint.

The validation loss is measured on the experiment's fixed windows; downstream.py scores the experiment's
downstream tasks.
"""

import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash

from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.sections import Task, Train
from inheritune.data.batches import Tokens
from inheritune.data.tokenizer import check_vocabulary
from inheritune.data.tokenizer_comparison import encode_with, has_same_ids
from inheritune.data.tokenizer_files import TOKENIZER_FILES
from inheritune.engines.deepspeed_json import resolve_precision
from inheritune.errors import Stopped, UserError
from inheritune.evaluation import downstream, loading, task_metrics
from inheritune.evaluation.reference import describe_other_ids
from inheritune.evaluation.taskcode import refuse_task_code
from inheritune.files.json_files import read_json, write_json
from inheritune.files.lock import Lock
from inheritune.files.markers import hash_folder, stamp_weights
from inheritune.files.outputs import check_new_file, resolve_output
from inheritune.files.rundir import (
    WINDOW_LOSSES,
    RunDir,
    check_has_parts,
    get_results_dir,
    parse_weights_name,
    require_weights,
)
from inheritune.models.networks import build_meta_model, count_trained
from inheritune.models.sources import Source, open_source
from inheritune.runs.changes import check_own_run, describe_change_since, find_changes_since, find_job
from inheritune.runs.comparison import compare_with_reference, compute_interval
from inheritune.runs.identity import check_origin
from inheritune.runs.job import Job
from inheritune.runs.pins import pin_revision
from inheritune.runs.starts import make_random_start
from inheritune.runtime import dist, signals
from inheritune.runtime.log import logger, set_up_logging
from inheritune.training import validate


def evaluate(
    experiment: str,
    run: str | None = None,
    model: str | None = None,
    tasks: str | None = None,
    seed: int = 0,
    out: str | None = None,
    rehearse: bool | None = None,
    allow_task_code: bool = False,
    ds: str | None = None,
) -> None:
    """Measure `run` of `experiment`, or the checkpoint `model` (a folder or Hub id).

    `run` is RUN, RUN/stage2, RUN@10000, or several of them: 'a,b'. results.json is written beside the
    weights, or to `out`. A run's results.json keeps what training wrote; the validation loss and the
    difference from its reference are renewed.

    The experiment's downstream `tasks` ('a,b'; default all; 'none') are added one by one as each is scored. A
    task that already has a score for these weights is not scored again. Code that task files name is run only
    with `allow_task_code`. With a DeepSpeed JSON `ds` at ZeRO 3 the model is divided over the ranks
    (loading.choose_shards).

    Raises UserError, before any work, for an `out` that is given with a run or holds anything but results of
    `model`."""
    loaded = load_experiment(experiment, rehearse)
    if (run is None) == (model is None):
        raise UserError("evaluate needs either --run NAME or --model CHECKPOINT")
    chosen = downstream.choose_tasks(loaded.evaluate, tasks)
    refuse_task_code(loaded.evaluate.task_files if chosen else None, allow_task_code)
    if run and out:
        raise UserError(
            "evaluate: --out goes with --model only, because the results of a run are stored in its own "
            "folder; leave out --out"
        )
    found: list[tuple[Job | None, Source, Path | None]] = []
    if run is not None:
        found += [open_weights(loaded, name, seed) for name in run.split(",")]
    elif model is not None:
        found.append((None, *_open_checkpoint(model, out)))
    for job, source, target in found:
        measure_checkpoint(loaded, chosen, job, source, target, allow_task_code, ds)


def _open_checkpoint(model: str, out: str | None) -> tuple[Source, Path | None]:
    """Return (the checkpoint, the file for its results). Raises UserError if the file cannot take them."""
    target = resolve_output(out) if out else None
    if target:
        check_new_file(target)
    source = open_source(model)
    if target:
        check_results(target, source.origin)
    return source, target


def check_results(file: Path, model: str) -> None:
    """Raise UserError if `file` exists and holds anything but results of `model`.

    They would be lost, or be listed under another model's name."""
    if not file.exists():
        return
    held = read_json(file)
    if not (isinstance(held, dict) and isinstance(held.get("model"), str) and "experiment" in held):
        raise UserError(
            f"{file} holds no results of evaluate --model, and is left as it is; give another --out"
        )
    if held["model"] != model:
        raise UserError(f"{file} holds the results of {held['model']}, not of {model}; give another --out")


def open_weights(experiment: Experiment, name: str, seed: int) -> tuple[Job, Source, Path]:
    """Return the job, weights and results.json of the weights called `name`.

    Raises UserError if they do not exist."""
    check_has_parts(experiment, name)
    job = Job(experiment, parse_weights_name(name)[0], seed)
    external = job.run.init.external
    if external and experiment.rehearsal:  # the public model does not have the rehearsal's size
        return job, open_source(make_random_start(job, experiment.model.layers)), job.dir.results
    if external:
        commit = pin_revision(experiment, external.source, external.revision)
        return job, open_source(external.source, commit), job.dir.results
    weights = require_weights(experiment, name, seed)
    run_dir = RunDir(weights.parent)
    own = find_job(experiment, job.name, seed, run_dir)
    check_same_data(own, run_dir.path)
    check_own_run(run_dir, own)
    check_reference(run_dir, own)
    return job, open_source(str(weights)), get_results_dir(weights).results


def check_reference(run_dir: RunDir, job: Job) -> None:
    """Raise UserError if the run in `run_dir` was started from weights of its reference, and the reference
    has other weights by now: the two would no longer be an original and its cut."""
    name = job.experiment.reference_of(job.run)
    if name and run_dir.provenance.is_file():
        before = run_dir.read_starts()[0].get("start_weights") or {}
        check_origin(job, {run: weights for run, weights in before.items() if run == name})


def check_same_data(job: Job, folder: Path) -> None:
    """Raise UserError if the run in `folder` was trained on other data or windows than `job` has now.

    Its results could not be compared with the earlier ones."""
    for key, was, is_now in find_changes_since(RunDir(folder).experiment, job, job.settings):
        if key.partition(".")[0] == "data" or key in ("train", "train.final_windows"):
            raise UserError(
                f"{folder} was trained with {key} = {was}, the experiment now has {is_now}, so it cannot be "
                f"compared with the others; restore that value, or evaluate --model {folder / 'final'}"
            )


def measure_checkpoint(
    loaded: Experiment,
    chosen: dict[str, Task],
    job: Job | None,
    source: Source,
    target: Path | None,
    allow_code: bool = False,
    ds: str | None = None,
) -> None:
    """Measure the validation loss and the `chosen` tasks of `source`, and write them to `target`.

    Raises UserError if `target` has results of other weights of a model of that name."""
    dist.init_distributed()
    set_up_logging()
    if job and not job.run.init.external:
        run_dir = RunDir(source.folder.parent)
        if note := describe_change_since(run_dir, find_job(loaded, job.name, job.seed, run_dir)):
            logger.info("%s: %s", run_dir.path, note)
    tokens, foreign = Tokens.of(loaded, "val"), job is None or job.run.init.external is not None
    # All that can be refused comes before the work.
    train = resolve_precision(loaded.train_of(job.run) if job else loaded.train, dist.get_device())
    zero = loading.choose_shards(ds, loaded.model, train)
    shape = build_meta_model(source.config)
    loading.check_room(source, shape, zero, train.precision, loaded.data.sequence_length)
    if target:
        check_new_file(target)
    benchmarks = downstream.load_tasks(chosen, loaded.evaluate.task_files, allow_code)
    results = _read_earlier_results(job, source, target)
    identity = _identify_weights(job, source, target, bool(chosen), results)
    missing = downstream.list_unscored(chosen, benchmarks, results, identity)
    if scored := [name for name in chosen if name not in missing]:
        logger.info("already scored, and kept: %s", ", ".join(scored))
    tokenizer = _open_tokenizer(loaded, source, tokens, foreign, bool(chosen)) if chosen or foreign else None
    has_ids = not (foreign and tokenizer) or has_same_ids(encode_with(tokenizer), tokens, loaded.data)
    if job and not has_ids and loaded.is_reference(job.name):
        raise UserError(describe_other_ids(loaded, job.name, source.origin))
    if has_ids:
        check_fits(source, tokens, loaded.data.sequence_length)
    results.update(experiment=loaded.name, rehearsal=loaded.rehearsal, precision=train.precision)
    results.update(layers=source.config.num_hidden_layers, parameters=count_trained(shape))
    with loading.load_model(source, zero) as network:
        if has_ids:
            _measure_losses(network, loaded, job, source, tokens, train, results)
        else:
            logger.info(
                "no validation loss: the tokenizer of %s is not that of the experiment's data", source.origin
            )
        if target:
            dist.run_on_rank0(merge_results, target, results, identity)
        if missing:
            batch, precision = loaded.evaluate.batch, train.precision
            model = downstream.wrap_model(network, tokenizer, batch, precision, zero is not None)
            settings = {"precision": precision, "checkpoint": identity}
            unscored = {name: chosen[name] for name in missing}
            _score_tasks(model, unscored, benchmarks, settings, results, target)


def _read_earlier_results(job: Job | None, source: Source, target: Path | None) -> dict[str, Any]:
    """Return the results that `target` holds, or those of a checkpoint that was not measured yet."""
    if target and (target.is_file() or (job and RunDir(target.parent).is_done())):
        if target.name == "results.json":
            return RunDir(target.parent).read_results(to_renew=True)
        return read_json(target)
    return {"model": source.origin, "layers": None, "steps": None}


def _identify_weights(
    job: Job | None, source: Source, target: Path | None, has_tasks: bool, results: dict[str, Any]
) -> str | None:
    """Return what `hash_checkpoint` does where the tasks or `results` need it, and record it in `results`.

    Raises UserError if `results` are those of other weights of `source`."""
    named = target is not None and job is None
    external = job is not None and job.run.init.external is not None
    identity = dist.run_on_rank0(hash_checkpoint, source) if has_tasks or named or external else None
    if target and named:
        _check_same_weights(target, results, source.origin, identity)
        results["checkpoint"] = identity
    elif job and external:
        results.update(model=source.origin, weights=identity, run=job.name, seed=job.seed)
        results["files"] = {} if source.revision else stamp_weights(source.origin)
    elif "model" in results:
        results["model"] = source.origin
    return identity


def _check_same_weights(target: Path, held: dict[str, Any], model: str, identity: str | None) -> None:
    """Raise UserError if `held`, the content of `target`, are results of other weights of `model`."""
    if held.get("checkpoint", identity) != identity:  # earlier results would be mixed with new ones
        were = f"weights {held['checkpoint']} of {model}, which now has {identity}"
        raise UserError(f"{target} holds the results of the {were}; give another --out")


def merge_results(target: Path, results: dict[str, Any], identity: str | None, scored: str = "") -> None:
    """Write `results` of the weights `identity` to `target`, with the rows of tasks that it has by now.

    Another process may have scored other tasks of these weights since `results` were read; of the rows in
    memory, only that of the task `scored` is newer. Raises UserError, and leaves `target` as it is, if it has
    results of another model or of other weights by now."""
    with Lock(target):
        held = read_json(target) if target.is_file() else {}
        if held and "checkpoint" in results:  # of evaluate --model
            check_results(target, results["model"])
            _check_same_weights(target, held, results["model"], identity)
        if "tasks" in results or "tasks" in held:
            rows = {
                name: row
                for name, row in held.get("tasks", {}).items()
                if identity in (None, row["checkpoint"]) and name != scored
            }
            results["tasks"] = rows | ({scored: results["tasks"][scored]} if scored else {})
        write_json(target, results)


def _open_tokenizer(
    loaded: Experiment, source: Source, tokens: Tokens, foreign: bool, has_tasks: bool
) -> Any:
    """Return the checkpoint's tokenizer, or None.

    In a rehearsal a checkpoint from elsewhere without one is measured with the tokenizer of the data. Raises
    UserError if tasks need one that is not there."""
    tokenizer = downstream.open_tokenizer(source.folder)
    if tokenizer is None and foreign and loaded.rehearsal:
        tokenizer = downstream.open_tokenizer(tokens.folder / "tokenizer")
    if tokenizer is None and has_tasks:
        way = "put its files there, or give --tasks none"
        raise UserError(f"{source.folder} holds no tokenizer, which the tasks need; {way}")
    if tokenizer is None and foreign:
        logger.warning(
            "%s holds no tokenizer: its token ids are taken to be those of the experiment's data",
            source.origin,
        )
    return tokenizer


def _measure_losses(
    network: torch.nn.Module,
    loaded: Experiment,
    job: Job | None,
    source: Source,
    tokens: Tokens,
    train: Train,
    results: dict[str, Any],
) -> None:
    """Add the validation loss of `source`, loaded as `network`, and its comparison to `results`."""
    length = loaded.data.sequence_length
    starts = validate.final_windows(tokens, length, train.final_windows)
    losses = compute_losses(network, source, tokens, length, starts, train)
    results.update(
        data_fingerprint=tokens.fingerprint, windows=validate.describe_windows(tokens, starts, length)
    )
    results.update(validation=compute_interval(losses))
    if job:
        results.update(compare_with_reference(job, losses, results))
    if job and job.run.init.external:
        curve = validate.curve_windows(len(losses), train.eval_windows)
        results.update({WINDOW_LOSSES: losses.tolist(), "curve_loss": float(losses[curve].mean())})
    logger.info("%s", describe_losses(results))


def _score_tasks(
    model: Any,
    unscored: dict[str, Task],
    benchmarks: dict,
    settings: dict[str, Any],
    results: dict[str, Any],
    target: Path | None,
) -> None:
    """Score each task with lm-eval's `model`, and add its row to `results` and to `target` at once.

    `settings` are stored in each row. Raises Stopped if a signal asks to stop."""
    for number, (name, task) in enumerate(unscored.items()):
        if why := dist.agree_on_stop(signals.get_stop_signal()):
            raise Stopped(
                f"{len(unscored) - number} tasks are left to score ({why}); the same command resumes with "
                f"them"
            )
        start_time = time.monotonic()
        row = downstream.score_task(model, task, benchmarks[name])
        dist.run_on_rank0(task_metrics.check_scores, name, row, task)
        if row:  # rank 0
            results["tasks"][name] = row | settings
        if target:
            dist.run_on_rank0(merge_results, target, results, settings["checkpoint"], name)
        if row:
            dt = time.monotonic() - start_time
            line = task_metrics.describe_scores(name, row, task)
            logger.info("%s (%d of %d, %.0f s)", line, number + 1, len(unscored), dt)


def check_fits(source: Source, tokens: Tokens, length: int) -> None:
    """Raise UserError if the data's vocabulary or windows of `length` tokens do not fit the model."""
    check_vocabulary(tokens.vocab_size, source.config.vocab_size, str(source.folder))
    positions = getattr(source.config, "max_position_embeddings", length)
    if length > positions:
        raise UserError(
            f"data.sequence_length ({length}) is beyond the {positions} positions of {source.folder}"
        )


def compute_losses(
    model: torch.nn.Module, source: Source, tokens: Tokens, length: int, starts: np.ndarray, train: Train
) -> np.ndarray:
    """Return the validation losses of `source`, loaded as `model`, at the windows `starts` (n,).

    They are (n,) float64. Raises UserError if a loss is not finite."""
    device = dist.get_device()
    with torch.autocast(device.type, torch.bfloat16, enabled=train.precision != "fp32"):
        losses = validate.window_losses(model, tokens, length, starts, device)
    losses = cast(np.ndarray, losses)  # it is None only where it may be stopped
    if not np.isfinite(losses).all():
        raise UserError(
            f"the validation loss of {source.folder} is not finite: its weights are damaged; restore them"
        )
    return losses


def hash_checkpoint(source: Source) -> str:
    """Return what tells a checkpoint from another: the Hub's commit, or a hash of weights, config and
    tokenizer."""
    files = [*source.files(), "config.json", *TOKENIZER_FILES]
    return source.revision or xxhash.xxh3_128_hexdigest(repr(hash_folder(source.folder, only=files)).encode())


def describe_losses(results: dict) -> str:
    """Describe the validation loss, and the difference from the reference, in one line."""
    loss = results["validation"]
    line = (
        f"validation loss {loss['mean']:.4f} (95% interval {loss['low']:.4f} to {loss['high']:.4f}, "
        f"{loss['n']} windows)"
    )
    if "difference" in results:
        gap = results["difference"]
        line += (
            f"; {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}) against "
            f"{results['compared_with']}"
        )
    return line
