"""`evaluate`: validation loss of a finished run, or of any checkpoint, on the experiment's fixed windows."""

from pathlib import Path

import numpy as np
import torch

from inheritune import dist, validate
from inheritune.batches import Tokens
from inheritune.config import UserError, load_experiment
from inheritune.engine import resolve_precision
from inheritune.log import logger, setup
from inheritune.models import build, count_parameters
from inheritune.rundir import data_dir, read_json, write_json
from inheritune.sources import Source, open_source
from inheritune.tokens import check_vocabulary
from inheritune.train import Job, compare, finished_weights


def evaluate(experiment: str, run: str | None = None, model: str | None = None, seed: int = 0, out: str | None = None,
             rehearse=None) -> None:  # fmt: skip
    """Measure `run` of `experiment`, or the checkpoint `model` (a folder or Hub id), and write results.json.

    A run's results.json keeps what training wrote; the validation and the difference to its reference are renewed."""
    loaded = load_experiment(experiment, rehearse)
    if (run is None) == (model is None):
        raise UserError("evaluate needs either --run NAME or --model CHECKPOINT")
    job = Job(loaded, run, seed) if run else None
    if job and job.run.init.external:
        external = job.run.init.external
        source, target = open_source(external.source, external.revision), job.dir.results
    elif job:
        weights = finished_weights(loaded, run, seed)
        source, target = open_source(str(weights)), weights.parent / "results.json"
    else:
        source, target = open_source(model), Path(out) if out else None
    dist.start()
    setup()
    tokens = Tokens(data_dir(loaded), "val")
    train = resolve_precision(loaded.train_of(job.run) if job else loaded.train, dist.device())
    losses = checkpoint_losses(source, tokens, loaded.data.sequence_length, train.final_windows, train.precision)
    results = read_json(target) if target and target.is_file() else {"model": str(source.folder), "layers": None, "steps": None}
    results.update(data_fingerprint=tokens.fingerprint, precision=train.precision, validation=validate.interval(losses))
    results.update(layers=source.config.num_hidden_layers, parameters=count_parameters(source.config))
    if job:
        results.update(compare(job, losses, results))
    logger.info("%s", describe(results))
    if target and dist.rank() == 0:
        write_json(target, results)


def checkpoint_losses(source: Source, tokens: Tokens, length: int, count: int, precision: str) -> np.ndarray:
    """Per-window validation losses of a checkpoint, one copy of it on each rank.  -> (n,) float64

    Raises UserError if the data's vocabulary or windows do not fit the model."""
    check_vocabulary(tokens.vocab_size, source.config.vocab_size, str(source.folder))
    positions = getattr(source.config, "max_position_embeddings", length)
    if length > positions:
        raise UserError(f"data.sequence_length ({length}) is beyond the {positions} positions of {source.folder}")
    starts = validate.final_windows(tokens, length, count)
    model = build(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.tensor(name))
    device = dist.device()
    model.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
        return validate.window_losses(model, tokens, length, starts, device)


def describe(results: dict) -> str:
    """The result in one line."""
    loss = results["validation"]
    line = f"validation loss {loss['mean']:.4f} (95% interval {loss['low']:.4f} to {loss['high']:.4f}, {loss['n']} windows)"
    if "difference" in results:
        gap = results["difference"]
        line += f"; {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}) against {results['compared_with']}"
    return line
