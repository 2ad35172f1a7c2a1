"""Rehearsals: an experiment shrunk to two CPU cores and minutes, with every step of the real one.

A rehearsal has about a third of the layers, width 64, 24 steps of 21 sequences, and the embedded corpus in
several shards. Every layer count, range and list goes through one map. Runs keep their names, starts and
growth. The result is marked `rehearsal`, so that its numbers are not taken for results.
"""

import math
from typing import Any

from inheritune.config.layers import AUTO, DROP, parse_auto, parse_drop
from inheritune.config.paths import RECIPES

REHEARSAL_STEPS = 24
REHEARSAL_WARMUP = 4
REHEARSAL_SEQUENCES = 21  # divides by neither 2 nor 4 ranks
REHEARSAL_LENGTH = 64
REHEARSAL_EVERY = 8  # steps between evaluations and between checkpoints
REHEARSAL_VOCABULARY = 1024

Section = dict[str, Any]


def shrink_layers(layers: int) -> int:
    """Return a layer count or range end of the rehearsal: a third, rounded up.

    So 12, 14 and 16 of 24 layers become 4, 5 and 6 of 8."""
    return math.ceil(layers / 3)


def shrink_experiment(raw: Section) -> Section:
    """Return the rehearsal of an experiment; both are mappings as `Experiment.model_dump` writes them."""
    steps = raw["train"]["steps"]
    return {
        **raw,
        "rehearsal": True,
        "data": _shrink_data(raw["data"]),
        "model": _shrink_model(raw["model"]),
        "train": _shrink_train(raw["train"]),
        "evaluate": _shrink_evaluate(raw["evaluate"]),
        "runs": {name: _shrink_run(run, steps) for name, run in raw["runs"].items()},
    }


def _shrink_data(data: Section) -> Section:
    return {
        "name": "rehearsal",
        "source": "embedded",
        "tokenizer": f"bpe:{REHEARSAL_VOCABULARY}",
        "end_of_text": data["end_of_text"],
        "validation": {"fraction": 0.1},
        "shard_tokens": 100_000,
        "max_tokens": 1_500_000,
        "sequence_length": REHEARSAL_LENGTH,
        "sampling": data["sampling"],
        "window_start": data["window_start"],
    }


def _shrink_model(model: Section) -> Section:
    heads = 5 if model["heads"] % 2 else 4  # an odd head count stays odd
    return {
        "size": "gpt2_tiny" if model["family"] == "gpt2" else "llama_tiny",
        "layers": shrink_layers(model["layers"]),
        "width": 16 * heads,
        "heads": heads,
        "positions": REHEARSAL_LENGTH,
        "vocab_size": REHEARSAL_VOCABULARY,
        "tied_head": model["tied_head"],
    }


def _shrink_train(train: Section) -> Section:
    """Shrink the experiment's own `train`, which has all keys."""
    return {
        **train,
        "steps": REHEARSAL_STEPS,
        "batch_tokens": REHEARSAL_SEQUENCES * REHEARSAL_LENGTH,
        "warmup_steps": REHEARSAL_WARMUP,
        "precision": "fp32",
        "deepspeed": "ds_configs/cpu.json",
        "lr": max(train["lr"], 1e-3),
        "eval_every": REHEARSAL_EVERY,
        "eval_windows": 40,
        "final_windows": 80,
        "log_every": 1,
        "checkpoint_every": REHEARSAL_EVERY,
    }


def _shrink_run_train(train: Section, steps: int) -> Section:
    """Shrink the keys of `train` that a run replaces; `steps`: those of the experiment."""
    small = {key: value for key, value in train.items() if key not in ("precision", "deepspeed")}
    if "steps" in small:
        small["steps"] = max(REHEARSAL_WARMUP, _shrink_steps(small["steps"], steps))
    if "batch_tokens" in small:
        small["batch_tokens"] = REHEARSAL_SEQUENCES * REHEARSAL_LENGTH
    if "warmup_steps" in small:
        small["warmup_steps"] = REHEARSAL_WARMUP
    for key in ("eval_every", "checkpoint_every"):
        if key in small:
            small[key] = min(REHEARSAL_EVERY, small[key])
    return small


def _shrink_steps(step: int, steps: int) -> int:
    return max(1, round(step * REHEARSAL_STEPS / steps))


def _shrink_evaluate(evaluate: Section) -> Section:
    """Replace each task by one of the same kind, on sixteen documents of the repository."""
    tasks = {
        name: {**task, "task": _rehearsal_task(task["metrics"]), "shots": min(task["shots"], 2)}
        for name, task in evaluate["tasks"].items()
    }
    return {**evaluate, "task_files": str(RECIPES / "lm_eval" / "rehearsal"), "tasks": tasks}


def _rehearsal_task(metrics: list[str]) -> str:
    if "word_perplexity" in metrics:
        return "rehearsal_text"
    if "perplexity" in metrics:
        return "rehearsal_word"
    return "rehearsal_choice"


def _shrink_run(run: Section, steps: int) -> Section:
    small = {
        **run,
        "init": {**run["init"]},
        "train": _shrink_run_train(run["train"], steps),
        "keep_at": sorted({_shrink_steps(step, steps) for step in run["keep_at"]}),
    }
    if run["layers"]:
        small["layers"] = shrink_layers(run["layers"])
    if grow := run["grow"]:
        counts = {key: shrink_layers(grow[key]) for key in ("by", "max_layers")}
        small["grow"] = {**grow, **counts}
    for kind in ("inherit", "stack"):
        if start := run["init"][kind]:
            small["init"][kind] = _shrink_start(start)
    return small


def _shrink_start(start: Section) -> Section:
    """Shrink a start that copies blocks: their range or list, and where they go."""
    small = {**start, "layers": _shrink_range(start["layers"])}
    for key in ("depth", "at"):
        if start.get(key):
            small[key] = shrink_layers(start[key])
    return small


def _shrink_range(layers: str | list[int]) -> str | list[int]:
    if isinstance(layers, list):
        return [index // 3 for index in layers[::3]]  # as many as shrink_layers gives, in their order
    if auto := parse_auto(layers):
        return f"{AUTO}{shrink_layers(auto.count)}:{auto.rule}"
    if layers.startswith(DROP):
        return DROP + ",".join(str(index // 3) for index in parse_drop(layers)[::3])
    ends = [end.strip() for end in layers.split(":")]
    return ":".join(_shrink_end(int(end)) if end else "" for end in ends)


def _shrink_end(end: int) -> str:
    return str(int(math.copysign(shrink_layers(abs(end)), end)))
