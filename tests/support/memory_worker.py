"""What DeepSpeed really holds: `torchrun --nproc-per-node R tests/support/memory_worker.py OUT CASES`.

CASES is a JSON file, a list of {name, model, layers, precision, settings, sequences, length, accumulation}.
Each trains three steps on the CPU with the project's own engine; OUT/<name>_ranks<R>_<rank>.json gets the
bytes held just before a step, the size of its checkpoint, and the peak of all allocations over the last two
steps, temporary ones included."""

import gc
import json
import os
import sys
from pathlib import Path

from inheritune.engines import memory
from inheritune.models import initialization, networks

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from inheritune.cli import leave
from inheritune.config.sections import Model, Train
from inheritune.engines import engine as engines
from inheritune.training.losses import token_losses


def peak_bytes(work) -> int:
    """Largest sum of the bytes that are made and alive at once while `work` runs, from the allocator's own
    events."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    change = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            change += event.nbytes()
            peak = max(peak, change)
    return peak


class Fresh:
    """Initial weights by name, as a checkpoint would give them."""

    def __init__(self, config):
        self.shapes, self.config = networks.list_model_shapes(config), config

    def tensor(self, name: str) -> torch.Tensor:
        return initialization.make_fresh_tensor(name, self.shapes[name], self.config, seed=0)


def run(case: dict, out: Path) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = Model(**case["model"])
    train = Train(steps=10, batch_tokens=1, lr=1e-3, warmup_steps=0, precision=case["precision"])
    config = networks.build_config(model, case["layers"])
    shape = (case["sequences"], case["length"] + 1)
    held, kept = {}, []

    def work():
        engine = engines.start_engine(
            config, Fresh(config), case["settings"], train, case["sequences"], case["accumulation"]
        )
        kept.append(engine)
        for _ in range(3):
            for micro in range(case["accumulation"]):
                window = torch.randint(0, model.vocab_size, shape)
                losses = token_losses(engine(input_ids=window[:, :-1], use_cache=False).logits, window[:, 1:])
                engine.backward(losses.mean())
                if micro == case["accumulation"] - 1:
                    held.update(memory.count_held_bytes(engine))
                engine.step()

    peak = peak_bytes(work)
    engine = kept.pop()
    folder = out / f"{case['name']}_ranks{world}"
    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
    torch.distributed.barrier()
    stored = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    result = {"held": held, "peak": peak, "checkpoint": stored}
    (out / f"{folder.name}_{rank}.json").write_text(json.dumps(result))
    engine.destroy()
    del engine, work
    gc.collect()


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for half a minute
    deepspeed.init_distributed("gloo")
    for case in json.loads(Path(sys.argv[2]).read_text()):
        run(case, Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave(0)
