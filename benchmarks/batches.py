"""Reading one step's batch: ours beside nanoGPT's loader and a DataLoader over an Arrow file of the datasets
library.

The limit is a copy in memory of the same bytes. A goal sets the time beside that of a training step of the
smallest paper model on eight GPUs at 40% of the H100's rate, of which each rank reads an eighth of the
batch."""

import itertools
import os
import time

import numpy as np
from harness import Case, Goal, clock, main, over, values, write_tokens

SECONDS = 1.5
"""Each contestant reads batches for so long, and 20 of them at least."""


def setup(work: dict, folder) -> None:
    write_tokens(folder / "tokens", work["tokens"], work["length"] + 1, 50257)
    from datasets import Dataset, Features, Sequence, Value

    tokens = np.fromfile(folder / "tokens" / "train_00000.bin", "<u2")
    rows = tokens[: len(tokens) // work["length"] * work["length"]].reshape(-1, work["length"])
    # what DataLoader code needs: torch has no 16-bit index
    features = Features({"input_ids": Sequence(Value("int64"))})
    made = Dataset.from_generator(
        lambda: ({"input_ids": row} for row in rows), features=features, cache_dir=str(folder / "cache")
    )
    made.save_to_disk(str(folder / "arrow"))


def timed(step, work: dict) -> dict:
    """Seconds of one call of `step`, in the mean over SECONDS after one call that warms up."""
    step(0)
    calls, until = 0, time.perf_counter() + SECONDS
    with clock() as measured:
        while calls < 20 or time.perf_counter() < until:
            calls += 1
            step(calls)
    each = {key: value / calls for key, value in measured.items()}
    return each | {"calls": calls, "part_of_step": each["seconds"] / step_s(work)}


def step_s(work: dict) -> float:
    """Seconds of the GPU training step that a rank reads `work["sequences"]` for."""
    from inheritune.config.catalog import GPU_SPECS
    from inheritune.config.sections import Model
    from inheritune.models.sizes import predict_flops_per_token

    flops = (
        predict_flops_per_token(Model(size="gpt2_small"), 12, work["length"])
        * work["sequences"]
        * work["length"]
    )
    return flops / (0.4 * GPU_SPECS["H100"]["tflops"] * 1e12)


def ours(work: dict, folder) -> dict:
    """What the training loop calls: the order of the step and this rank's share, as torch tensors."""
    import torch

    from inheritune.data.batches import Order, Share, Tokens, read_share

    order = Order(
        Tokens(folder / "tokens", "train"), "random_windows", work["length"], work["sequences"], seed=0
    )
    share = Share.of(work["sequences"], 0, 1, work["sequences"])
    return timed(lambda step: [torch.from_numpy(part) for part in read_share(order, step, share)], work)


def nanogpt(work: dict, folder) -> dict:
    """get_batch of nanoGPT's train.py: the file is mapped anew for each batch, two stacks of int64
    windows."""
    import torch

    def get_batch(_):
        data = np.memmap(folder / "tokens" / "train_00000.bin", dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - work["length"], (work["sequences"],))
        x = torch.stack([torch.from_numpy(data[i : i + work["length"]].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + work["length"]].astype(np.int64)) for i in ix])
        return x, y

    return timed(get_batch, work)


def arrow(work: dict, folder, workers: int = 0) -> dict:
    """A shuffled DataLoader over rows of token ids in an Arrow file, in torch's format; `workers` processes
    read ahead."""
    import torch
    from datasets import load_from_disk

    rows = load_from_disk(str(folder / "arrow")).with_format("torch")
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = torch.utils.data.DataLoader(
        rows, batch_size=work["sequences"], shuffle=True, drop_last=True, **options
    )
    batches = (batch for _ in itertools.count() for batch in loader)  # epoch after epoch
    return timed(lambda _: next(batches), work)


def arrow_ahead(work: dict, folder) -> dict:
    return arrow(work, folder, workers=len(os.sched_getaffinity(0)))


def copy(work: dict, folder) -> dict:
    source = np.ones((work["sequences"], work["length"] + 1), np.int64)
    target = np.empty_like(source)
    return timed(lambda _: np.copyto(target, source), work)


def cases(size: str) -> list[Case]:
    sequences = 60 if size != "small" else 4  # the paper's 480 of 1,024 tokens on eight ranks
    tokens = 2_000_000 if size == "small" else 100_000_000
    contestants = {"ours": ours, "nanoGPT": nanogpt, "DataLoader over Arrow": arrow}
    contestants |= {"DataLoader over Arrow, a worker per core": arrow_ahead, "limit: memory copy": copy}
    goals = [
        Goal("time of nanoGPT's loader", 1 / 5, over("ours", "nanoGPT")),
        Goal(
            "time of the DataLoader with workers",
            None,
            over("ours", "DataLoader over Arrow, a worker per core"),
        ),
        Goal("part of a training step on H100s", 0.01, values("ours", "part_of_step")),
        Goal("time of a memory copy (no goal)", None, over("ours", "limit: memory copy")),
    ]
    work = {"sequences": sequences, "length": 1024 if size != "small" else 128, "tokens": tokens}
    return [Case(f"{sequences} sequences of {work['length']}", work, contestants, goals, setup)]


if __name__ == "__main__":
    main(__file__, cases)
