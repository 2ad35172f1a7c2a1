"""What a start knows of its run before there is a model: settings, data, this rank's share of a batch, the
validation windows. `check_same_files` sees to it that all ranks know the same."""

import json
from dataclasses import dataclass

import numpy as np
import torch

from inheritune.config.sections import Train
from inheritune.data.batches import Order, Share, Tokens
from inheritune.engines.deepspeed_json import resolve_precision
from inheritune.errors import UserError
from inheritune.files.processes import get_node_name
from inheritune.runs import identity
from inheritune.runs.job import Job
from inheritune.runtime import dist
from inheritune.training import validate


@dataclass(frozen=True)
class RunInputs:
    """Everything that decides a run on this rank, but for its first weights."""

    job: Job
    deepspeed: dict
    """The DeepSpeed JSON, without what the experiment owns."""
    train: Train
    """Settings of the run, with the precision resolved."""
    device: torch.device
    tokens: Tokens
    order: Order
    share: Share
    val_tokens: Tokens
    val_starts: np.ndarray
    """First tokens of the validation windows, all of them.  (n,) int64"""
    batch_arithmetic: str
    """How the global batch is cut over the ranks, in one line."""

    @classmethod
    def of(cls, job: Job, deepspeed: dict, tokens: Tokens) -> "RunInputs":
        """Raise UserError if the data does not suffice for the run, or the batch for the ranks."""
        device = dist.get_device()
        train = resolve_precision(job.settings, device)
        length = job.experiment.data.sequence_length
        batch = train.batch_tokens // length
        order = Order(tokens, job.experiment.data.sampling, length, batch, job.seed)
        order.check_steps(train.steps)
        val_tokens = Tokens(tokens.folder, "val").begin_windows(job.experiment)
        val_starts = validate.final_windows(val_tokens, length, train.final_windows)
        ceiling = deepspeed["train_micro_batch_size_per_gpu"]
        share = Share.of(batch, dist.get_rank(), dist.get_world_size(), ceiling)
        arithmetic = share.describe(batch, dist.get_world_size(), ceiling, length)
        return cls(job, deepspeed, train, device, tokens, order, share, val_tokens, val_starts, arithmetic)

    @property
    def length(self) -> int:
        """Length of a sequence in tokens."""
        return self.order.length

    @property
    def step_tokens(self) -> int:
        """Tokens of one step, over all ranks."""
        return self.order.batch * self.order.length

    def describe_run(self) -> dict:
        """Return what tells this run from all others (`identity.describe_run`)."""
        return identity.describe_run(self.job, self.train, self.tokens.fingerprint)


def check_same_files(job: Job, deepspeed: dict, path: str) -> None:
    """Raise UserError on every rank unless all ranks read the same experiment and the same DeepSpeed JSON
    `path`: a file on each node's own disk may differ, and nothing later would show it."""
    read = {
        f"experiment {job.experiment.name}": job.resolved(job.settings),
        f"DeepSpeed JSON {path}": deepspeed,
    }
    for name, content in read.items():
        texts = dist.gather_objects(json.dumps(content, sort_keys=True))
        other = next((r for r, text in enumerate(texts) if text != texts[0]), None)
        if other is not None:
            nodes = dist.gather_objects(get_node_name())
            raise UserError(
                f"the {name} that rank {other} on {nodes[other]} reads is not that of rank 0 on {nodes[0]}; "
                f"put the file on a disk that all nodes share, and start again"
            )
