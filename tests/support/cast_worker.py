"""Trains runs of an experiment and prints how many weights were rounded to bf16 in each:

    python cast_worker.py EXPERIMENT RUN ...

Runs whose names end in `anew` keep no rounded weight."""

import contextlib
import json
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inheritune.training import loop


class CastCounter(TorchDispatchMode):
    """Counts the matrices that are rounded to bf16 within a training step."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += isinstance(args[0], torch.nn.Parameter) and args[0].dim() == 2
        return func(*args, **kwargs)


def main(experiment: str, *runs: str) -> None:
    keep, train_step, counts = loop.keep_casts, loop.Trainer.train_step, {}
    for run in runs:
        counter = CastCounter()

        def counted(trainer, state, counter=counter):
            with counter:
                return train_step(trainer, state)

        loop.Trainer.train_step = counted
        loop.keep_casts = (lambda engine: contextlib.nullcontext()) if run.endswith("anew") else keep
        loop.train(experiment, run)
        counts[run] = counter.count
    print(json.dumps(counts))


main(*sys.argv[1:])
