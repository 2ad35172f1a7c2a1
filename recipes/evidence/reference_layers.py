"""The reference's layers at its end, of each seed: rank, column mass and cost, and the hypotheses about them.

These need no other run than the reference, so they are judged before a seed has the others."""

from pathlib import Path

import hypotheses
from evidence_rows import select_attention
from evidence_seeds import find_model

from inheritune.analysis.thresholds import NEAR_ONE
from inheritune.paper.attention_lines import list_ticks, mark_level
from inheritune.paper.canvas import COLORS, GRID_GREY, POINT_MARKERS, open_canvas
from inheritune.paper.table_files import write_table

FIELDS = (("max_rank", "MaxRank", ".2f"), ("avg_mass", "AvgMass", ".1f"), ("cost", "cost", ".4f"))
"""(key, name, form) of what is shown of each layer; the cost is the rise of the loss without the block."""


def select_measured(records: list[dict]) -> list[dict]:
    """Return the seeds whose reference has been analyzed, with costs, at its end."""
    return [
        record
        for record in records
        if (find_model(record, "reference") or {}).get("attention") and select_attention(record).get("cost")
    ]


def write_layers(folder: Path, records: list[dict], origin: str) -> list[str]:
    """Write layers.md (.csv, .tex) and layers.png of the measured seeds `records` to `folder`. Returns the
    sentences on the hypotheses. `origin` says how the numbers were made."""
    judged = hypotheses.judge(records)
    seeds = [record["seed"] for record in records]
    found = [select_attention(record) for record in records]
    headers = ["layer", *(f"{name}, seed {seed}" for seed in seeds for _, name, _ in FIELDS)]
    cells, flat = [], []
    for layer in range(len(found[0]["max_rank"])):
        values = [(key, f"{one[key][layer]:{form}}") for one in found for key, _, form in FIELDS]
        cells.append([str(layer + 1), *(value for _, value in values)])
        for seed, one in zip(seeds, found, strict=True):
            flat.append({"layer": layer + 1, "seed": seed, **{key: one[key][layer] for key, _, _ in FIELDS}})
    mark = "REHEARSAL, not a result. " if records[0]["rehearsal"] else ""
    losses = ", ".join(f"{find_model(record, 'reference')['loss']['mean']:.4f}" for record in records)
    notes = [
        *judged,
        f"Cost: how much the loss rises without the block, in nats. The validation loss: {losses}.",
        origin,
    ]
    write_table(folder / "layers", f"{mark}The reference's layers at its end", headers, cells, notes, flat)
    plot_layers(records, folder / "layers.png")
    return judged


def plot_layers(records: list[dict], path: Path) -> None:
    """Plot MaxRank and cost per layer, a line for each seed."""
    panels = (("max_rank", "MaxRank (τ = 0.90)"), ("cost", "cost of the block (nats)"))
    with open_canvas(path, 7, 6, records[0]["rehearsal"]) as figure:
        for axes, (key, name) in zip(figure.subplots(2, 1), panels, strict=True):
            for index, record in enumerate(records):
                values = select_attention(record)[key]
                axes.plot(
                    range(1, len(values) + 1),
                    values,
                    color=COLORS[index],
                    marker=POINT_MARKERS[index],
                    markersize=4,
                    label=f"seed {record['seed']}",
                )
            if key == "cost" and axes.dataLim.y0 > 0:  # the first block's is far above the others
                axes.set_yscale("log")
            else:
                axes.set_ylim(min(0.0, axes.dataLim.y0), 1.05 * axes.dataLim.y1)
            axes.set_xticks(list_ticks(len(values)))
            axes.set_xlabel("layer")
            axes.set_ylabel(name)
            axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)
            if key == "max_rank":
                mark_level(axes, NEAR_ONE, f"below {NEAR_ONE}: lazy in H1")
                axes.set_title("The reference's layers at its end")
            else:
                axes.legend(frameon=False, fontsize=9)
