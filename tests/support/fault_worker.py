"""One rank of `train` that meets a real fault; started by test_faults.py.

python tests/support/fault_worker.py EXPERIMENT RUN KIND@STEP:RANK, where KIND is
    loss     the loss of one micro batch of that step is infinite, its gradient is not
    losses   the loss of every micro batch from that step on is infinite
    weight   one weight of this rank becomes nan before that step, and stays so until it is loaded again
    unsaved  one weight becomes nan between that step and its checkpoint
    slow     whatever this rank brings to disk, at any step, takes half a second per file more
    sleep, stopped, held   in that step this rank sleeps for ever, is stopped from outside, keeps the
    interpreter to itself
"""

import ctypes
import os
import signal
import sys
import time

from inheritune import cli as program
from inheritune.runtime import dist, watchdog
from inheritune.training import loop as train
from inheritune.training import losses, start

HANGS = ("sleep", "stopped", "held")
# The watch is strict only from that step on. Ranks look 1 s apart at most, and wait 2 s for each other.
START_S, HANG_S, LOOKS = 500.0, 10.0, 500

experiment, run, when = sys.argv[1:]
kind, _, place = when.partition("@")
step, _, who = place.partition(":")
engine, watch, due = None, None, False


def spoil_a_weight() -> None:
    parameter = next(iter(engine.module.parameters()))
    # at ZeRO 3 its part, and the whole
    for held in {parameter, getattr(parameter, "ds_tensor", parameter)}:
        held.data.view(-1)[:1] = float("nan")


def hang() -> None:
    print(f"struck: {when}", flush=True)
    if kind == "sleep":
        time.sleep(1000)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(START_S / LOOKS + 1)  # until the watch has become strict
        ctypes.PyDLL(None).sleep(1000)  # unlike CDLL it does not let other threads run


def wrap(module, name: str, before=None, after=None) -> None:
    """Call before(*arguments) ahead of module.name, and put after(its result) in the place of its result."""
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args)
        result = original(*args, **kwargs)
        return after(result) if after else result

    setattr(module, name, wrapped)


def at_step(order, number: int, share) -> None:
    global due
    if watch and number == int(step) - 1:
        watch.limit_s = HANG_S
    due = (
        number >= int(step) - 1 if kind == "losses" else number == int(step) - 1
    ) and dist.get_rank() == int(who)
    if due and kind == "weight":
        spoil_a_weight()
    elif due and kind in HANGS:
        hang()


def keep_engine(result):
    global engine
    engine = result
    return result


def keep_watch(result):
    global watch
    watch = result
    result.limit_s, result.LOOKS = START_S, LOOKS
    return result


def spoil_the_loss(values):
    global due
    struck, due = due and kind in ("loss", "losses"), due and kind == "losses"
    return values + float("inf") if struck else values  # a sum's gradient is 1: only the loss shows it


wrap(start, "start_engine", after=keep_engine)
wrap(train, "read_share", before=at_step)
wrap(losses, "token_losses", after=spoil_the_loss)
if kind == "unsaved":
    wrap(
        train,
        "has_finite_weights",
        before=lambda engine: spoil_a_weight() if engine.global_steps == int(step) else None,
    )
elif kind == "slow":
    wrap(os, "fsync", before=lambda file: time.sleep(0.5) if dist.get_rank() == int(who) else None)
elif kind in HANGS:
    wrap(watchdog, "Watchdog", after=keep_watch)
program.leave(program.main(["train", experiment, "--run", run]))
