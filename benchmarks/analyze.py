"""Rank and column mass of every head: the code of the `analyze` verb beside output_attentions with an SVD of
each map.

The model is loaded before the clock starts. The limit is the forward pass alone, of the same attention form
(eager, which is what makes maps at all) and of the fused one. Every contestant that has ranks writes them
down, and they must be equal. The SVDs, which find ranks only and no masses, take minutes: they have a case of
fewer sequences for themselves.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Case, Goal, clock, main, over, write_tokens

BATCH = 20  # of attention.analyze


def setup(work: dict, folder: Path) -> None:
    from inheritune.config.sections import Model
    from inheritune.models.networks import build_config
    from inheritune.models.surgery import write_random

    config = build_config(Model(**work["model"]))
    write_random(config, folder / work["key"], seed=0)
    write_tokens(folder / "tokens", 1000, 40 * work["length"] * work["sequences"], 2000)


def loaded(work: dict, folder: Path, attention: str = "eager"):
    """(model, windows (N, T))"""
    from inheritune.analysis import attention as measures
    from inheritune.data.batches import Tokens

    tokens = Tokens(folder / "tokens", "val")
    windows = measures.read_windows(tokens, work["sequences"], work["length"], seed=0)
    return measures.load_model(str(folder / work["key"]), attention=attention), windows


def ours(work: dict, folder: Path) -> dict:
    """attention.analyze, to the rows of attention.jsonl; only loading the model is taken out of its time."""
    from inheritune.analysis import attention as measures
    from inheritune.data.batches import Tokens

    model, _ = loaded(work, folder)
    measures.load_model = lambda *_: model
    with clock() as measured:
        rows = measures.measure_model(
            str(folder / work["key"]), Tokens(folder / "tokens", "val"), work["sequences"], work["length"]
        )
    ranks = [row["rank"]["0.9"] for row in rows if row["kind"] == "layer"]  # (L, H), means over the sequences
    (folder / "ranks_ours.json").write_text(json.dumps(ranks))
    return measured


def by_svd(work: dict, folder: Path) -> dict:
    """output_attentions=True and torch.linalg.svd, head by head; k* by the definition."""
    import torch

    return by_maps(work, folder, lambda layer: [[torch.linalg.svd(head)[1] for head in one] for one in layer])


def batched(work: dict, folder: Path) -> dict:
    """output_attentions=True and one svdvals per layer."""
    import torch

    return by_maps(work, folder, torch.linalg.svdvals)


def by_maps(work: dict, folder: Path, spectra: Callable) -> dict:
    """Ranks from the maps that the model returns. `spectra`: (N, H, T, T) of a layer -> singular values (N,
    H, T)."""
    import torch

    model, windows = loaded(work, folder)
    ranks = []
    with clock() as measured, torch.inference_mode():
        for batch in windows.split(BATCH):
            maps = model.base_model(input_ids=batch, use_cache=False, output_attentions=True).attentions
            ranks.append([[[_k_star(head) for head in one] for one in spectra(layer)] for layer in maps])
    means = np.concatenate(ranks, axis=1).mean(axis=1)  # (L, N, H) -> (L, H)
    return measured | compared(folder, means)


def _k_star(singular) -> int:
    energy = singular.double().square().cumsum(0)
    return int((energy < (0.9 - 1e-9) * energy[-1]).sum()) + 1


def compared(folder: Path, ranks: np.ndarray) -> dict:
    """Heads whose mean k* is not ours (of the turn before; ours runs first)."""
    ours = np.array(json.loads((folder / "ranks_ours.json").read_text()))
    return {"heads_that_differ": int((np.abs(ours - ranks) > 1e-9).sum())}


def forward(work: dict, folder: Path, attention: str = "eager") -> dict:
    import torch

    model, windows = loaded(work, folder, attention)
    with clock() as measured, torch.inference_mode():
        for batch in windows.split(BATCH):
            model.base_model(input_ids=batch, use_cache=False)
    return measured


def forward_fused(work: dict, folder: Path) -> dict:
    return forward(work, folder, "sdpa")


def case(name: str, model: dict, sequences: int, length: int = 100) -> Case:
    work = {"key": "model", "model": model, "sequences": sequences, "length": length}
    contestants = {
        "ours": ours,
        "limit: forward pass": forward,
        "limit: forward pass, fused attention": forward_fused,
    }
    goals = [
        Goal("time of the forward pass", 1.3, over("ours", "limit: forward pass")),
        Goal("CPU time of the forward pass", None, over("ours", "limit: forward pass", key="cpu_seconds")),
    ]
    return Case(name, work, contestants, goals, setup)


def svd_case(name: str, model: dict, sequences: int, length: int = 100) -> Case:
    work = {"key": "model", "model": model, "sequences": sequences, "length": length}
    contestants = {
        "ours": ours,
        "output_attentions, svd by head": by_svd,
        "output_attentions, batched svdvals": batched,
    }

    def apart(name):
        return lambda turns: [
            turn["heads_that_differ"] for turn in turns[name] if "heads_that_differ" in turn
        ]

    goals = [
        Goal("time of svd by head", 1.0, over("ours", "output_attentions, svd by head")),
        Goal("time of batched svdvals", 1.0, over("ours", "output_attentions, batched svdvals")),
        Goal("heads whose k* differs, svd by head", 0, apart("output_attentions, svd by head")),
        Goal("heads whose k* differs, batched svdvals", 0, apart("output_attentions, batched svdvals")),
        Goal(
            "memory of output_attentions",
            1.0,
            over("ours", "output_attentions, batched svdvals", key="peak_mb"),
        ),
    ]
    rare = ("output_attentions, svd by head", "output_attentions, batched svdvals")
    return Case(name, work, contestants, goals, setup, rare)


def cases(size: str) -> list[Case]:
    if size == "small":
        model = {
            "size": "gpt2_tiny",
            "layers": 2,
            "width": 64,
            "heads": 4,
            "positions": 128,
            "vocab_size": 2048,
        }
        return [case("a toy, N = 4, T = 100", model, 4), svd_case("a toy by SVD, N = 4, T = 100", model, 4)]
    medium = {"size": "gpt2_medium"}
    return [
        case("GPT-2 Medium's shape, N = T = 100", medium, 100),
        svd_case("GPT-2 Medium by SVD, N = 20, T = 100", medium, 20),
    ]


if __name__ == "__main__":
    main(__file__, cases)
