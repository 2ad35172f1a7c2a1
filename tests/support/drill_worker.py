"""One process of a verb that is struck at a named point; started by drill.py.

python tests/support/drill_worker.py TRACE POINT N SIGNAL RANK|all VERB ARGUMENTS...

At the N-th passage of POINT the process writes a line to TRACE, which shows that it was alive there, and
sends itself (`all`: its process group, all ranks) the signal. A process whose rank is not meant does nothing
of the kind."""

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from inheritune import cli as program
from inheritune.runtime import dist


def no_gradient() -> bool:
    import torch

    return not torch.is_grad_enabled()


def named(name: str):
    return lambda path, *_: path.name == name


def writes(folder: str):
    return lambda writer, *_: writer.folder is not None and folder in writer.folder.name


# point: (module, what is about to be called, whether these arguments are meant)
POINTS = {
    "prepare: writing tokens": ("data.token_shards", "Shards.write", lambda *_: True),
    "prepare: noting the progress": ("data.preparation", "write_json", named("progress.json")),
    "prepare: before the manifest": ("data.preparation", "write_json", named("manifest.json")),
    "inherit: writing tensors": ("models.writer", "CheckpointWriter.add", lambda *_: True),
    "inherit: before the manifest": ("files.json_files", "write_json", named("inherited.json")),
    "export: writing tensors": ("models.writer", "CheckpointWriter.add", lambda *_: True),
    "export: before the rename": ("evaluation.export", "format_card", lambda *_: True),
    "train: in a step": ("training.loop", "read_share", lambda *_: True),
    "train: in validation": ("training.losses", "token_losses", lambda *_: no_gradient()),
    "train: in saving": ("engines.checkpoint", "read_generators", lambda: True),
    "train: between rename and marker": ("engines.checkpoint", "write_json", named("COMPLETE")),
    "train: pruning old checkpoints": ("engines.checkpoint", "remove_path", lambda path: path.is_dir()),
    "train: writing the start": ("models.writer", "CheckpointWriter.add", writes("init")),
    "train: writing final/": ("models.writer", "CheckpointWriter.add", writes(".final")),
    "train: before DONE": ("training.results", "write_json", named("DONE")),
    "resize: reading the old states": ("engines.resize", "read_tensor", lambda *_: True),
    "resize: restoring the generators": ("engines.resize", "restore_generators", lambda *_: True),
}


def strike(trace: str, point: str, sign: str, who: str) -> None:
    with open(trace, "a", encoding="utf-8") as file:
        file.write(
            json.dumps(
                {"point": point, "signal": sign, "who": who, "pid": os.getpid(), "rank": dist.get_rank()}
            )
            + "\n"
        )
        file.flush()
        os.fsync(file.fileno())
    number = getattr(signal, sign)
    os.killpg(0, number) if who == "all" else os.kill(os.getpid(), number)


def arm(trace: str, point: str, n: int, sign: str, who: str) -> None:
    module, path, is_meant = POINTS[point]
    owner = importlib.import_module(f"inheritune.{module}")
    *inside, name = path.split(".")
    owner = functools.reduce(getattr, inside, owner)
    original, passed = getattr(owner, name), 0

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        nonlocal passed
        # all ranks: the first one that comes here strikes for all
        if is_meant(*args) and (who == "all" or dist.get_rank() == int(who)):
            passed += 1
            if passed == n and not Path(trace).exists():
                strike(trace, point, sign, who)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    arm(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:6])
    program.leave(program.main(sys.argv[6:]))
