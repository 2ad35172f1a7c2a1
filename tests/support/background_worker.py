"""One rank of `train`, one of whose saves in the background is held and struck; started by
test_background_saves.py.

python tests/support/background_worker.py EXPERIMENT RUN KIND@SAVE:RANK

The threads of the SAVE-th save write only once training is two steps further or waits for them. On RANK the
thread then meets KIND:
    SIGKILL, SIGUSR1   that signal to this process; after SIGUSR1 it writes once training waits for it
    FULL               no file may become larger than 10,000 bytes
    LITTLE             no host memory is left for copies, at any save: so there is no thread
    NONE               nothing; all threads write only once training waits for them"""

import os
import resource
import signal
import sys
import time

from inheritune import cli as program
from inheritune.engines import background, checkpoint, host_copies, weight_export
from inheritune.runtime import dist
from inheritune.training import loop

experiment, run, when = sys.argv[1:]
kind, _, place = when.partition("@")
number, _, who = place.partition(":")
n_saves = n_batches = 0
is_waiting = False


def hold(is_over) -> None:
    deadline = time.monotonic() + 60
    while not is_over():
        assert time.monotonic() < deadline, "training neither went on nor waited"
        time.sleep(0.01)


def write_copies(files) -> None:
    global n_saves
    n_saves += 1
    if n_saves == int(number):
        begun = n_batches
        hold(lambda: is_waiting or (kind != "NONE" and n_batches >= begun + 2))
        print(
            f"rank {dist.get_rank()} read {n_batches - begun} batches while save {number} was held",
            flush=True,
        )
        if dist.get_rank() == int(who):
            strike()
    original_write(files)


def strike() -> None:
    print(f"struck: {when}", flush=True)
    if kind == "FULL":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    elif kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
        hold(lambda: is_waiting)


def count_batches(*args):
    global n_batches
    n_batches += 1
    return original_read(*args)


def wait(saves) -> None:
    global is_waiting
    is_waiting = True
    original_wait(saves)
    is_waiting = False


def before(module, function: str) -> None:
    """Print which checkpoints are complete when `function` is called."""
    original = getattr(module, function)

    def wrapped(engine, *args, **kwargs):
        if dist.get_rank() == 0:
            run_dir = args[0] if function == "check_room" else checkpoint.RunDir(args[0].parent)
            print(f"complete at {function}: {run_dir.complete_checkpoints()}", flush=True)
        return original(engine, *args, **kwargs)

    setattr(module, function, wrapped)


background.GRACE_S = 2.0
original_write, checkpoint._Files.write_copies = checkpoint._Files.write_copies, write_copies
original_read, loop.read_share = loop.read_share, count_batches
original_wait, background.Saves.wait = background.Saves.wait, wait
before(checkpoint, "check_room")
before(weight_export, "export_weights")
if kind == "LITTLE":
    host_copies.find_available_memory = lambda: 1000
program.leave(program.main(["train", experiment, "--run", run]))
