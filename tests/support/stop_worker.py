"""One rank of `train` that sends itself a real signal, or loses its disk's room, at a named moment; started
by test_stop.py.

python tests/support/stop_worker.py EXPERIMENT RUN SIGNAL@MOMENT:RANK      MOMENT: step=K, saving=0,
validation=N (N-th forward); TAKEN in place of a signal: another job takes the run over
"""

import os
import signal
import sys

from inheritune import cli as program
from inheritune.config.experiment import load_experiment
from inheritune.engines import checkpoint
from inheritune.files.rundir import RunDir
from inheritune.runtime import dist
from inheritune.training import loop as train
from inheritune.training import losses

experiment, run, when = sys.argv[1:]
name, _, moment = when.partition("@")
moment, _, who = moment.partition(":")
moment, _, count = moment.partition("=")
seen = 0


def strike() -> None:
    if dist.get_rank() == int(who):
        print(f"struck: {when}", flush=True)
        if name == "TAKEN":
            for file in RunDir.of(load_experiment(experiment), run).path.parent.glob(".*.lock.*"):
                file.unlink()
        else:
            os.kill(os.getpid(), getattr(signal, name))


def before(module, function: str, is_it) -> None:
    original = getattr(module, function)

    def wrapped(*args, **kwargs):
        if is_it(*args, **kwargs):
            strike()
        return original(*args, **kwargs)

    setattr(module, function, wrapped)


def is_nth_validation_forward(*_) -> bool:
    import torch

    global seen
    seen += not torch.is_grad_enabled()
    return seen == int(count) and not torch.is_grad_enabled()


if moment == "step":  # between reading the batch of step K and its forward
    before(train, "read_share", lambda order, step, share: step == int(count) - 1)
elif moment == "saving":
    before(checkpoint, "read_generators", lambda: True)
elif moment == "validation":
    before(losses, "token_losses", is_nth_validation_forward)
elif moment == "unchecked":  # the disk fills up between the look at it and the write
    checkpoint.count_checkpoint_bytes = lambda *sizes: 0
program.leave(program.main(["train", experiment, "--run", run]))
