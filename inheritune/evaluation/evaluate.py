"""`evaluate`: validation loss of a finished run, or of any checkpoint, on the experiment's fixed windows, and
the scores of the experiment's downstream tasks (downstream.py), all with one copy of the model on each
rank."""

import time
from pathlib import Path

import numpy as np
import torch
import xxhash

from inheritune.config.experiment import Data, Experiment, Task, Train, load_experiment
from inheritune.data.batches import Tokens
from inheritune.data.tokenizer_files import TOKENIZER_FILES
from inheritune.data.tokens import PROBE, check_vocabulary, load_tokenizer
from inheritune.engines.engine import resolve_precision
from inheritune.errors import Stopped, UserError
from inheritune.evaluation import downstream
from inheritune.evaluation.taskcode import refuse_task_code
from inheritune.files.outputs import check_new_file, resolve_output
from inheritune.files.rundir import (
    RunDir,
    beside,
    finished_weights,
    hash_folder,
    parse_weights_name,
    read_json,
    write_json,
)
from inheritune.models.architectures import build, count_parameters
from inheritune.models.sources import Source, open_source
from inheritune.runs.comparison import compare, interval
from inheritune.runs.identity import find_changes_since
from inheritune.runs.job import Job
from inheritune.runs.starts import random_start
from inheritune.runtime import dist, signals
from inheritune.runtime.log import logger, setup
from inheritune.training import validate


def evaluate(
    experiment: str,
    run: str | None = None,
    model: str | None = None,
    tasks: str | None = None,
    seed: int = 0,
    out: str | None = None,
    rehearse=None,
    allow_task_code: bool = False,
) -> None:
    """Measure `run` of `experiment` (RUN, RUN/stage2, RUN@10000, or several: 'a,b'), or the checkpoint
    `model` (a folder or Hub id), and write results.json beside the weights, or at `out`.

    A run's results.json keeps what training wrote; the validation and the difference to its reference are
    renewed. The experiment's downstream `tasks` ('a,b'; default all; 'none') are added one by one as each is
    scored; one that is there already for these weights is not scored again. Code that task files name is run
    only with `allow_task_code`.

    Raises UserError, before any work, for an `out` that goes with a run or holds anything but results of
    `model`."""
    loaded = load_experiment(experiment, rehearse)
    if (run is None) == (model is None):
        raise UserError("evaluate needs either --run NAME or --model CHECKPOINT")
    chosen = downstream.choose(loaded.evaluate, tasks)
    refuse_task_code(loaded.evaluate.task_files if chosen else None, allow_task_code)
    if run and out:
        raise UserError(
            "evaluate: --out goes with --model only: the results of a run lie in its own folder; leave --out "
            "away"
        )
    found = [weights_of(loaded, name, seed) for name in run.split(",")] if run else []
    named = resolve_output(out) if out else None
    if named:
        check_new_file(named)
    source = open_source(model) if model else None
    if named:
        check_results(named, source.origin)
    for job, weights, target in found or [(None, source, named)]:
        measure(loaded, chosen, job, weights, target, allow_task_code)


def check_results(file: Path, model: str) -> None:
    """Raises UserError if `file` is there and holds anything but results of `model`: they would be lost, or
    would stand under another model's name."""
    if not file.exists():
        return
    held = read_json(file)
    if not (isinstance(held, dict) and isinstance(held.get("model"), str) and "experiment" in held):
        raise UserError(
            f"{file} holds no results of evaluate --model, and is left as it is; give another --out"
        )
    if held["model"] != model:
        raise UserError(f"{file} holds the results of {held['model']}, not of {model}; give another --out")


def weights_of(experiment: Experiment, name: str, seed: int) -> tuple[Job, Source, Path]:
    """The job, weights and results.json of the weights called `name`. Raises UserError if they are not
    there."""
    job = Job(experiment, parse_weights_name(name)[0], seed)
    external = job.run.init.external
    if external and experiment.rehearsal:  # the public model has not the rehearsal's size
        return job, open_source(random_start(job, experiment.model.layers)), job.dir.results
    if external:
        return job, open_source(external.source, external.revision), job.dir.results
    weights = finished_weights(experiment, name, seed)
    check_measured_alike(job, weights.parent)
    return job, open_source(str(weights)), beside(weights).results


def check_measured_alike(job: Job, folder: Path) -> None:
    """Raises UserError if the run in `folder` was trained on other data or windows than `job` has now: its
    results could not be compared with those of before."""
    for key, was, is_now in find_changes_since(RunDir(folder).experiment, job, job.settings):
        if key.partition(".")[0] == "data" or key in ("train", "train.final_windows"):
            raise UserError(
                f"{folder} was trained with {key} = {was}, the experiment now has {is_now}, so it cannot be "
                f"measured beside "
                f"the others; go back to that value, or evaluate --model {folder / 'final'}"
            )


def measure(
    loaded: Experiment,
    chosen: dict[str, Task],
    job: Job | None,
    source: Source,
    target: Path | None,
    allow_code: bool = False,
) -> None:
    """Validation loss and `chosen` tasks of `source`, into `target`. Raises UserError if `target` was
    measured on other weights of a model of that name."""
    dist.start()
    setup()
    tokens, foreign = Tokens.of(loaded, "val"), job is None or job.run.init.external
    benchmarks = downstream.load_tasks(
        chosen, loaded.evaluate.task_files, allow_code
    )  # all that can be refused comes before the work
    results = {"model": source.origin, "layers": None, "steps": None}
    if target and (target.is_file() or (job and RunDir(target.parent).is_done())):
        results = (
            RunDir(target.parent).read_results(to_renew=True)
            if target.name == "results.json"
            else read_json(target)
        )
    named = target is not None and job is None
    identity = dist.on_rank0(checkpoint_hash, source) if chosen or named else None
    if named:
        if results.get("checkpoint", identity) != identity:  # those of before would stand beside those of now
            were = f"weights {results['checkpoint']} of {source.origin}, which now has {identity}"
            raise UserError(f"{target} holds the results of the {were}; give another --out")
        results["checkpoint"] = identity
    elif "model" in results:
        results["model"] = source.origin  # of a run whose public model was changed
    missing = downstream.unscored(chosen, benchmarks, results, identity)
    tokenizer = downstream.open_tokenizer(source.folder) if chosen or foreign else None
    if tokenizer is None and foreign and loaded.rehearsal:
        tokenizer = downstream.open_tokenizer(tokens.folder / "tokenizer")
    if tokenizer is None and chosen:
        raise UserError(
            f"{source.folder} holds no tokenizer, which the tasks need; put its files there, or give --tasks "
            f"none"
        )

    train = resolve_precision(loaded.train_of(job.run) if job else loaded.train, dist.device())
    results.update(experiment=loaded.name, rehearsal=loaded.rehearsal, precision=train.precision)
    results.update(layers=source.config.num_hidden_layers, parameters=count_parameters(source.config))
    network = load_weights(source)
    if foreign and tokenizer and not same_ids(tokenizer, loaded.data, tokens.folder):
        logger.info(
            "no validation loss: the tokenizer of %s is not that of the experiment's data", source.origin
        )
    else:
        length = loaded.data.sequence_length
        starts = validate.final_windows(tokens, length, train.final_windows)
        losses = checkpoint_losses(network, source, tokens, length, starts, train)
        results.update(data_fingerprint=tokens.fingerprint, windows=validate.describe_windows(starts, length))
        results.update(validation=interval(losses))
        results.update(compare(job, losses, results) if job else {})
        logger.info("%s", describe(results))
    dist.on_rank0(write_json, target, results) if target else None
    lm = downstream.harness(network, tokenizer, loaded.evaluate.batch, train.precision) if missing else None
    for number, name in enumerate(missing):
        if why := dist.agree(signals.asked_to_stop()):
            raise Stopped(
                f"{len(missing) - number} tasks are left to score ({why}); the same command goes on with them"
            )
        start_time = time.monotonic()
        row = downstream.score(lm, chosen[name], benchmarks[name])
        dist.on_rank0(downstream.check_finite, name, row, chosen[name])
        if row:  # rank 0
            results["tasks"][name] = row | {"precision": train.precision, "checkpoint": identity}
            write_json(target, results) if target else None
            dt = time.monotonic() - start_time
            logger.info(
                "%s (%d of %d, %.0f s)",
                downstream.describe(name, row, chosen[name]),
                number + 1,
                len(missing),
                dt,
            )


def load_weights(source: Source) -> torch.nn.Module:
    """The model of a checkpoint in fp32, one copy on each rank's device, in evaluation mode. Raises UserError
    for a weight that is nan or inf."""
    model = build(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.finite_tensor(name))
    return model.eval().to(dist.device())


def checkpoint_losses(
    model, source: Source, tokens: Tokens, length: int, starts: np.ndarray, train: Train
) -> np.ndarray:
    """Validation losses of `source`, loaded as `model`, at the windows `starts` (n,).  -> (n,) float64

    Raises UserError if the data's vocabulary or windows do not fit the model, and if a loss is not finite."""
    check_vocabulary(tokens.vocab_size, source.config.vocab_size, str(source.folder))
    positions = getattr(source.config, "max_position_embeddings", length)
    if length > positions:
        raise UserError(
            f"data.sequence_length ({length}) is beyond the {positions} positions of {source.folder}"
        )
    device = dist.device()
    with torch.autocast(device.type, torch.bfloat16, enabled=train.precision != "fp32"):
        losses = validate.window_losses(model, tokens, length, starts, device)
    if not np.isfinite(losses).all():
        raise UserError(
            f"the validation loss of {source.folder} is not finite: its weights are damaged; restore them"
        )
    return losses


def same_ids(tokenizer, data: Data, folder: Path) -> bool:
    """Whether a checkpoint's tokenizer gives the ids of the prepared data's on a probe text."""
    (ids,) = load_tokenizer(data, folder / "tokenizer").encode_batch([PROBE])
    return tokenizer.encode(PROBE, add_special_tokens=False) == ids.tolist()


def checkpoint_hash(source: Source) -> str:
    """What tells a checkpoint from another: the Hub's commit, or a hash of weights, config and tokenizer."""
    files = [*source.files(), "config.json", *TOKENIZER_FILES]
    return source.revision or xxhash.xxh3_128_hexdigest(repr(hash_folder(source.folder, only=files)).encode())


def describe(results: dict) -> str:
    """The result in one line."""
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
