"""The rows of attention.jsonl on what layers are worth: costs, the loss of the first n blocks, and the loss
after cuts by each rule."""

from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from inheritune.analysis.costs import CostMeter, Costs, find_windows
from inheritune.analysis.layers import suggest_by_cost, suggest_layers
from inheritune.config.layers import RULES, AutoLayers
from inheritune.models.choice import pick_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SIZES = 3  # half, the suggestion by rank, the one by cost


def measure_worth(
    model: "PreTrainedModel", windows_NT: torch.Tensor, batch: int, layers: list[dict], progress: bool
) -> tuple[dict, list[dict]]:
    """Return (keys of the header, more rows), and add the costs to the rows `layers`.

    Where nothing can be measured, the header says why in `costs_missing`, and there are no more rows. Rows:
    `first` (the loss of the first n blocks, n = 0 to L), `window` (find_windows), `cut` (the loss with the
    blocks that a rule keeps), `without_lazy` (the loss without all blocks of MaxRank below NEAR_ONE, if there
    are some)."""
    meter = CostMeter(model, windows_NT, batch)
    if meter.missing:
        return {"costs_missing": {"all": meter.missing}}, []
    hidden = None if progress else True
    total = meter.count_forwards(MAX_SIZES * len(RULES) + 1)
    with tqdm(total=total, desc="costs", unit=" forwards", leave=False, disable=hidden) as bar:
        meter.advance = bar.update
        costs = meter.measure()
        for row in layers:
            row |= costs.layer_keys(row["layer"])
        rows = [_describe_first(costs), *find_windows(costs.distance)]
        loss = costs.loss_N.mean().item()
        for n in _list_sizes(layers, loss):
            rows.append({"kind": "cut", "n": n, "rule": "first", "layers": list(range(n))})
            rows[-1]["loss"] = rows[0]["loss"][n]
            for rule in RULES:
                kept = pick_layers([*layers, *rows], AutoLayers(n, rule))
                lost = round(meter.measure_cut(kept), 6)
                rows.append({"kind": "cut", "n": n, "rule": rule, "layers": kept, "loss": lost})
        if lazy := [row["layer"] for row in layers if row["near_lazy"]]:
            lost = round(meter.measure_cut([row["layer"] for row in layers if not row["near_lazy"]]), 6)
            rows.append({"kind": "without_lazy", "layers": lazy, "loss": lost})
    missing = {part: found for part, found in costs.missing.items() if found}
    return {"loss": round(loss, 6), "costs_missing": missing}, rows


def _describe_first(costs: Costs) -> dict:
    return {"kind": "first", "loss": [round(loss_N.mean().item(), 6) for loss_N in costs.first]}


def _list_sizes(layers: list[dict], loss: float) -> list[int]:
    """Return the numbers of layers to which cuts are measured: the paper's half, the suggestions by rank and
    by cost; no number twice, none that leaves nothing out."""
    depth = len(layers)
    found = {max(1, depth // 2), suggest_layers(layers)[0], suggest_by_cost(layers, loss)}
    return sorted(n for n in found if n < depth)
