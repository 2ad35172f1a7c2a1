"""From maps to layers: a layer's row of attention.jsonl, groups of layers, how many layers to inherit.

Legend of suffixes: N = sequences, H = heads, F = fractions (tau or eta).
"""

import numpy as np

from inheritune.analysis.thresholds import ETAS, LITTLE_USE, MAIN_THRESHOLD, NEAR_ONE, TAUS, UNIFORM_WITHIN


def summarize_layer(
    layer: int, ranks_FNH: np.ndarray, masses_FNH: np.ndarray, uniform: tuple[int, int] = (1, 1)
) -> dict:
    """Return one layer's row, its numbers keyed by tau or eta.

    Rank(h) and m(h) are means over the sequences. MaxRank is the largest Rank of a head, AvgMass the mean of
    m over heads. The deviations are those over the sequences: of k* in the head with the MaxRank, and of m*
    averaged over heads. `lazy` is the paper's definition: MaxRank is exactly 1. `uniform`: most heads are
    near the rank and the mass of causal uniform attention, which the argument `uniform` gives (a rank of 1
    cannot be told from collapse)."""
    taus, etas = [f"{tau:g}" for tau in TAUS], [f"{eta:g}" for eta in ETAS]
    rank_FH, mass_FH = ranks_FNH.mean(axis=1), masses_FNH.mean(axis=1)
    top_F = rank_FH.argmax(axis=1)
    main, mass_H = rank_FH[taus.index(MAIN_THRESHOLD)], mass_FH[etas.index(MAIN_THRESHOLD)]
    near = [abs(each - k) <= UNIFORM_WITHIN * k for each, k in zip((main, mass_H), uniform, strict=True)]
    n_uniform = int((near[0] & near[1]).sum()) if uniform[0] > 1 else 0
    return {
        "kind": "layer",
        "layer": layer,
        "lazy": bool(main.max() == 1),
        "near_lazy": bool(main.max() < NEAR_ONE),
        "heads_rank_1": int((main == 1).sum()),
        "heads_near_1": int((main < NEAR_ONE).sum()),
        "heads_uniform": n_uniform,
        "uniform": 2 * n_uniform > len(main),
        "max_rank": {tau: float(rank_FH[f].max()) for f, tau in enumerate(taus)},
        "max_rank_std": {tau: round(float(ranks_FNH[f, :, top_F[f]].std()), 6) for f, tau in enumerate(taus)},
        "avg_mass": {eta: round(float(mass_FH[f].mean()), 6) for f, eta in enumerate(etas)},
        "avg_mass_std": {
            eta: round(float(masses_FNH[f].mean(axis=1).std()), 6) for f, eta in enumerate(etas)
        },
        "rank": {tau: rank_FH[f].tolist() for f, tau in enumerate(taus)},
        "mass": {eta: mass_FH[f].tolist() for f, eta in enumerate(etas)},
    }


def average_rank(layers: list[dict], first: int, end: int) -> float:
    """Return AvgRank, the mean MaxRank (tau 0.90) of the layers [first, end)."""
    return float(np.mean([row["max_rank"][MAIN_THRESHOLD] for row in layers[first:end]]))


def summarize_groups(layers: list[dict]) -> list[dict]:
    """Return rows with the AvgRank of the halves and the thirds of the model (the paper's Table 4 uses thirds
    of 12 layers), over half-open ranges. `lazy` is the paper's definition of a lazy group: floor(AvgRank) =
    1."""
    rows = []
    for parts, word in ((2, "half"), (3, "third")):
        ends = [len(layers) * part // parts for part in range(parts + 1)]
        for part, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
            if end > first:
                average = average_rank(layers, first, end)
                name = f"{word} {part + 1} of {parts}"
                rows.append(
                    {"kind": "group", "name": name, "first": first, "end": end, "avg_rank": round(average, 6)}
                )
                rows[-1]["lazy"] = int(average) == 1
    return rows


def suggest_layers(rows: list[dict]) -> tuple[int, str]:
    """Return how many of the first layers to inherit, and the reason in one sentence.

    n is the smallest number >= 1 such that the layers left out, [n, L), are a lazy group (floor(AvgRank) = 1)
    that begins with a layer of floor(MaxRank) = 1. Without the second condition, the mean of a long tail
    would hide potent layers at its head. If no such group runs to the last layer, n is the paper's choice,
    L / 2 (at least 1)."""
    layers = [row for row in rows if row["kind"] == "layer"]
    n_layers = len(layers)
    half = max(1, n_layers // 2)
    for n in range(1, n_layers):
        average = average_rank(layers, n, n_layers)
        if int(layers[n]["max_rank"][MAIN_THRESHOLD]) == 1 and int(average) == 1:
            return n, (
                f"inherit the first {n} of {n_layers} layers (--layers 0:{n}): the {n_layers - n} after them "
                f"are the first lazy group that runs to the last layer (AvgRank {average:.2f}); the paper "
                f"starts at half, {half}"
            )
    return half, (
        f"inherit the first {half} of {n_layers} layers (--layers 0:{half}), the paper's choice of half: no "
        f"lazy group runs to the last layer (its MaxRank is {layers[-1]['max_rank'][MAIN_THRESHOLD]:.2f})"
    )


def is_of_little_use(row: dict, loss: float) -> bool:
    """Return whether the loss without the block of a layer's row is higher by less than 1% of `loss`."""
    return row["cost"]["block"] < LITTLE_USE * loss


def suggest_by_cost(layers: list[dict], loss: float) -> int:
    """Return n such that every layer after the first n is of little use, the smallest such n >= 1.

    It is the number of layers itself if the last one is of use. `loss`: of the whole model."""
    n = len(layers)
    while n > 1 and is_of_little_use(layers[n - 1], loss):
        n -= 1
    return n


def summarize_model(layers: list[dict], loss: float | None = None) -> dict:
    """Return the row of counts over the whole model, with the suggested number of layers.

    `loss`: of the whole model, where costs were measured."""
    suggested, reason = suggest_layers(layers)
    by_cost = {}
    if loss is not None:
        by_cost = {
            "little_use_layers": [row["layer"] for row in layers if is_of_little_use(row, loss)],
            "suggested_by_cost": suggest_by_cost(layers, loss),
        }
    return {
        "kind": "summary",
        "lazy_layers": [row["layer"] for row in layers if row["lazy"]],
        "near_lazy_layers": [row["layer"] for row in layers if row["near_lazy"]],
        "heads": sum(len(row["rank"][MAIN_THRESHOLD]) for row in layers),
        "heads_rank_1": sum(row["heads_rank_1"] for row in layers),
        "heads_near_1": sum(row["heads_near_1"] for row in layers),
        "heads_uniform": sum(row["heads_uniform"] for row in layers),
        "uniform_layers": [row["layer"] for row in layers if row["uniform"]],
        "suggested_layers": suggested,
        "reason": reason,
        **by_cost,
    }
