"""The end of a run: results.json, and DONE, which makes the run a finished one."""

from typing import TYPE_CHECKING

import numpy as np

from inheritune.files import json_files, markers
from inheritune.files.json_files import write_json
from inheritune.models.networks import count_parameters
from inheritune.runs.comparison import compare_with_reference, compute_interval
from inheritune.training import validate
from inheritune.training.inputs import RunInputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def write_results(
    inputs: RunInputs,
    config: "PretrainedConfig",
    losses: np.ndarray,
    flops_per_token: float,
    memory: list[dict],
) -> None:
    """Write results.json and then DONE, on rank 0. `losses` are those of all validation windows; `memory` is
    the memory of each rank in bytes."""
    job, run_dir, train = inputs.job, inputs.job.dir, inputs.train
    tokens = train.steps * train.batch_tokens
    results = {
        "experiment": job.experiment.name,
        "rehearsal": job.experiment.rehearsal,
        "run": job.name,
        "stage": job.stage,
        "seed": job.seed,
        "layers": config.num_hidden_layers,
        "parameters": count_parameters(config),
        "steps": train.steps,
        "tokens": tokens,
        "train_flops": flops_per_token * train.steps * train.batch_tokens,
        "precision": train.precision,
        "data_fingerprint": inputs.tokens.fingerprint,
        "windows": validate.describe_windows(inputs.val_tokens, inputs.val_starts, inputs.length),
        "validation": compute_interval(losses),
        "memory": memory,
    }
    results.update(compare_with_reference(job, losses, results))
    record = ("metrics.jsonl", f"validation/step_{train.steps}.npy")
    results["record"] = markers.hash_folder(run_dir.path, only=record)
    done = {"final": markers.hash_folder(run_dir.final)}
    write_json(run_dir.results, {**results, "weights": json_files.compute_seal(done["final"])})
    write_json(run_dir.done, done)
