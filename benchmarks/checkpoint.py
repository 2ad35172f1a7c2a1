"""Saving a checkpoint (checkpoint.save_checkpoint: marker, hashes, generators) beside DeepSpeed's own save
of the same engine.

DeepSpeed flushes nothing, ours every file before its marker, so DeepSpeed's save is there also with a flush
of each file. The limits are a plain write of as many bytes to the same disk, and that with a flush.

The last case trains through saves in the background, beside saves that training waits for.
"""

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from statistics import mean, median

from harness import Case, Goal, clock, main, over, run, values


def setup(work: dict, folder: Path) -> None:
    from inheritune.config.sections import Model
    from inheritune.models.networks import build_config
    from inheritune.models.surgery import write_random

    write_random(build_config(Model(**work["model"])), folder / work["key"], seed=0)


def engine_of(work: dict, folder: Path):
    """(engine after one step on a few tokens, its DeepSpeed settings): masters and moments are there."""
    from inheritune.config.sections import Train
    from inheritune.engines.engine import start_engine
    from inheritune.models.sources import open_source
    from inheritune.runtime import dist

    dist.init_distributed()
    source = open_source(str(folder / work["key"]))
    settings = {"zero_optimization": work["zero"]}
    train = Train(steps=10, batch_tokens=8 * work["ranks"], lr=1e-4, warmup_steps=0, precision="fp32")
    engine = start_engine(source.config, source, settings, train, 1, 1)
    step(engine, 8)
    return engine, settings


def step(engine, tokens: int) -> None:
    import torch

    ids = torch.arange(tokens, device=engine.device)[None]
    engine.backward(engine(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean())
    engine.step()


def empty(folder: Path) -> Path:
    """A place to save in, on which all ranks agree; nothing waits to be written."""
    from inheritune.runtime import dist

    def clear():
        shutil.rmtree(folder / "saved", ignore_errors=True)
        (folder / "saved").mkdir()
        os.sync()

    dist.run_on_rank0(clear)
    return folder / "saved"


def ours(work: dict, folder: Path) -> dict:
    from inheritune.engines import checkpoint
    from inheritune.files.rundir import RunDir
    from inheritune.runtime import dist

    engine, settings = engine_of(work, folder)
    run_dir = RunDir(empty(folder))
    with clock() as measured:
        checkpoint.save_checkpoint(engine, run_dir, {"step": 1}, settings, keep_last=2, run={})
    files = [file for file in run_dir.path.rglob("*") if file.is_file()]
    dist.run_on_rank0(
        (folder / f"{work['key']}.bytes").write_text, str(sum(file.stat().st_size for file in files))
    )
    dist.leave_group()
    return measured | {"gb": sum(file.stat().st_size for file in files) / 1e9}


def train_through_saves(work: dict, folder: Path) -> dict:
    """Steps right after a save in the background, after one that training waits for, and without one, in
    turns in this process: each round has all three, so its ratios compare one moment of a machine that others
    use too."""
    from inheritune.engines import background, checkpoint
    from inheritune.files.rundir import RunDir
    from inheritune.runtime import dist

    engine, settings = engine_of(work, folder)
    run_dir, numbers = RunDir(empty(folder)), itertools.count(1)
    ways = {"background": background.Saves(True), "waits": background.Saves(False), "none": None}

    def train(saves) -> tuple[float, float, list[float]]:
        """-> (seconds of the steps and the save, seconds for which it held training up, seconds of each step
        during it, or of all steps without one)"""
        begun, during = time.perf_counter(), []
        if saves is not None:
            checkpoint.save_checkpoint(engine, run_dir, {"step": next(numbers)}, settings, 1, {}, saves)
        held = time.perf_counter() - begun
        for _ in range(work["steps"]):
            start = time.perf_counter()
            step(engine, work["tokens"])
            if saves is None or saves._thread is not None:
                during.append(time.perf_counter() - start)
            if saves is not None:
                saves.check()
        if saves is not None:
            saves.wait()
        return time.perf_counter() - begun, held, during

    for saves in ways.values():  # the first save in the background allocates the memory of its copies
        train(saves)
    rounds = []
    with clock() as measured:
        for number in range(work["rounds"]):
            names = list(ways)[number % 3 :] + list(ways)[: number % 3]
            rounds.append({name: train(ways[name]) for name in names})
    dist.leave_group()
    ratios = {
        "over_waits": median(one["background"][0] / one["waits"][0] for one in rounds),
        "over_none": median(one["background"][0] / one["none"][0] for one in rounds),
        "waits_over_none": median(one["waits"][0] / one["none"][0] for one in rounds),
        "step": median(mean(one["background"][2]) / mean(one["none"][2]) for one in rounds),
    }
    held = {f"held_{way}": median(one[way][1] for one in rounds) for way in ("background", "waits")}
    return measured | ratios | held


def deepspeed(work: dict, folder: Path, flush: bool = False) -> dict:
    from inheritune.files.writing import sync_path as to_disk
    from inheritune.runtime import dist

    engine, _ = engine_of(work, folder)
    place = empty(folder)
    with clock() as measured:
        engine.save_checkpoint(str(place), tag="deepspeed", client_state={"run": {"step": 1}})
        dist.barrier()
        for file in sorted(place.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()] if flush else ():
            to_disk(file)
        dist.barrier()
    dist.leave_group()
    return measured | {"gb": sum(file.stat().st_size for file in place.rglob("*.pt")) / 1e9}


def deepspeed_flushed(work: dict, folder: Path) -> dict:
    return deepspeed(work, folder, flush=True)


def write(work: dict, folder: Path, flush: bool = False) -> dict:
    """One rank writes ours' bytes (of the turn before) in blocks of 16 MB; the others have nothing to do."""
    if int(os.environ.get("RANK") or 0):
        return {"cpu_seconds": 0.0}
    block, left = os.urandom(1 << 24), int((folder / f"{work['key']}.bytes").read_text())
    shutil.rmtree(folder / "saved", ignore_errors=True)
    (folder / "saved").mkdir()
    os.sync()
    with clock() as measured:
        with open(folder / "saved" / "bytes", "wb") as file:
            while left:
                left -= file.write(block[:left])
        run("sync", folder / "saved" / "bytes") if flush else None
    return measured


def write_flushed(work: dict, folder: Path) -> dict:
    return write(work, folder, flush=True)


def case(name: str, model: dict, stage: int, ranks: int) -> Case:
    work = {"key": f"zero{stage}_{ranks}", "model": model, "zero": {"stage": stage}, "ranks": ranks}
    contestants = {
        "ours": ours,
        "DeepSpeed's save_checkpoint": deepspeed,
        "DeepSpeed's save_checkpoint, fsync": deepspeed_flushed,
        "limit: write": write,
        "limit: write, fsync": write_flushed,
    }
    goals = [
        Goal("time of DeepSpeed's save", 1.0, over("ours", "DeepSpeed's save_checkpoint")),
        Goal(
            "time of DeepSpeed's save with a flush, as ours",
            1.0,
            over("ours", "DeepSpeed's save_checkpoint, fsync"),
        ),
        Goal("time of a plain write", None, over("ours", "limit: write")),
        Goal("GB written", None, values("ours", "gb")),
    ]
    return Case(name, json.loads(json.dumps(work)), contestants, goals, setup, ranks=ranks)


def training_case(name: str, model: dict, stage: int, ranks: int, **size: int) -> Case:
    work = {"key": f"train_zero{stage}_{ranks}", "model": model, "zero": {"stage": stage}, "ranks": ranks}
    ours = "ours"
    goals = [
        Goal(
            "steps and a save in the background, over one that training waits for",
            1.0,
            values(ours, "over_waits"),
        ),
        Goal("the same, over no save", None, values(ours, "over_none")),
        Goal("steps and a save that training waits for, over no save", None, values(ours, "waits_over_none")),
        Goal("a step during a save in the background, over one without a save", None, values(ours, "step")),
        Goal(
            "seconds for which a save in the background holds training up",
            None,
            values(ours, "held_background"),
        ),
        Goal("seconds of a save that training waits for", None, values(ours, "held_waits")),
    ]
    contestants = {ours: train_through_saves}
    return Case(name, json.loads(json.dumps(work | size)), contestants, goals, setup, ranks=ranks)


def cases(size: str) -> list[Case]:
    if size == "small":
        toy = {"size": "gpt2_tiny", "layers": 2, "width": 64, "heads": 4, "positions": 64, "vocab_size": 512}
        return [
            case("toy, ZeRO 1, one rank", toy, 1, 1),
            case("toy, ZeRO 3, two ranks", toy, 3, 2),
            training_case("toy, training", toy, 1, 1, tokens=64, steps=4, rounds=3),
        ]
    small = {"size": "gpt2_small"}
    middle = {
        "size": "gpt2_tiny",
        "layers": 6,
        "width": 256,
        "heads": 4,
        "positions": 64,
        "vocab_size": 8192,
    }
    return [
        case("GPT-2 124M, ZeRO 1, one rank", small, 1, 1),
        case("GPT-2 124M, ZeRO 3, two ranks", small, 3, 2),
        training_case("GPT-2 of 7M, training, one rank", middle, 1, 1, tokens=64, steps=4, rounds=9),
    ]


if __name__ == "__main__":
    main(__file__, cases)
