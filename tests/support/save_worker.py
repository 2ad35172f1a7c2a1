"""One state saved twice, at ZeRO 0 to 3: `torchrun --nproc-per-node R save_worker.py START OUT`.

OUT/zero<stage>/waiting was saved while training waited. OUT/zero<stage>/background was saved by a thread that
wrote only when the engine was two steps further."""

import sys
import threading
from pathlib import Path

import torch

from inheritune.cli import leave
from inheritune.config.sections import Train
from inheritune.engines import background, checkpoint
from inheritune.engines.engine import start_engine
from inheritune.files.rundir import RunDir
from inheritune.models.sources import open_source
from inheritune.runtime import dist

further = threading.Event()


def write_copies(files) -> None:
    assert not files._copies or further.wait(60)
    original(files)


def train_step(engine, step: int) -> None:
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(step + 100 * dist.get_rank()))
    engine.backward(engine(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean())
    engine.step()


def save_twice(source, folder: Path, stage: int) -> None:
    zero = {"stage": stage, "sub_group_size": 2000, "stage3_param_persistence_threshold": 40}
    settings = {"zero_optimization": zero}
    train = Train(steps=10, batch_tokens=96, lr=1e-2, warmup_steps=0, precision="fp32")
    engine = start_engine(source.config, source, settings, train, 2, 1)
    train_step(engine, 0)
    saves = background.Saves(in_background=True)
    for name, how in (("waiting", None), ("background", saves)):
        checkpoint.save_checkpoint(engine, RunDir(folder / name), {"step": 1}, settings, 2, {}, how)
    train_step(engine, 1)
    train_step(engine, 2)
    further.set()
    saves.wait()
    further.clear()
    engine.destroy()


if __name__ == "__main__":
    dist.init_distributed()
    original, checkpoint._Files.write_copies = checkpoint._Files.write_copies, write_copies
    for stage in (0, 1, 2, 3):
        save_twice(open_source(sys.argv[1]), Path(sys.argv[2]) / f"zero{stage}", stage)
    dist.leave_group()
    leave(0)
