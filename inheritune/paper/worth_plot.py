"""One page per model: rank, column mass and cost of every layer, one above the other.

Rows are those of attention.jsonl, which count layers from 0; the plot counts from 1.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.analysis.thresholds import LITTLE_USE, MAIN_THRESHOLD
from inheritune.paper.attention_lines import draw_lines, join_title, mark_level, mark_rank_one, select_layers
from inheritune.paper.canvas import (
    COLORS,
    GRID_GREY,
    POINT_MARKERS,
    open_canvas,
    place_legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {"block": "without the block", "attn": "without its attention", "mlp": "without its MLP"}
LINEAR_BELOW = 0.01
"""Costs in nats per token up to here are drawn on a linear scale, larger ones on a logarithmic one: they lie
between some nats and less than nothing."""


def has_costs(rows: list[dict]) -> bool:
    """Return whether the costs of layers were measured."""
    return any("cost" in row for row in rows)


def plot_worth(rows: list[dict], path: Path, label: str = "", rehearsal: bool = False) -> None:
    """Plot MaxRank, AvgMass and the three costs of every layer. Lazy layers are shaded."""
    layers = select_layers(rows)
    with open_canvas(path, 7, 8.5, rehearsal) as figure:
        rank, mass, cost = figure.subplots(3, 1)
        draw_lines(rank, [("MaxRank", layers, "max_rank", MAIN_THRESHOLD)])
        mark_rank_one(rank)
        rank.set_ylabel(f"MaxRank (τ = {float(MAIN_THRESHOLD):.2f})")
        rank.set_title(join_title("Rank, mass and cost per layer", label))
        draw_lines(mass, [("AvgMass", layers, "avg_mass", MAIN_THRESHOLD)])
        mass.set_ylabel("AvgMass (columns)")
        _draw_costs(cost, layers, rows[0]["loss"])
        cost.set_xlim(*rank.get_xlim())
        cost.set_xticks(rank.get_xticks())
        for axes in (rank, mass, cost):
            for row in layers:
                if row["lazy"]:
                    axes.axvspan(
                        row["layer"] + 0.5, row["layer"] + 1.5, color="#F3D9D9", linewidth=0, zorder=0
                    )


def _draw_costs(axes: "Axes", layers: list[dict], loss: float) -> None:
    """Draw how much the loss rises without each layer and its parts, with the line of little use."""
    from matplotlib.ticker import FuncFormatter

    for index, (kind, name) in enumerate(KINDS.items()):
        known = [row for row in layers if row["cost"][kind] is not None]
        axes.plot(
            [row["layer"] + 1 for row in known],
            [row["cost"][kind] for row in known],
            color=COLORS[index],
            marker=POINT_MARKERS[index],
            markersize=4,
            linewidth=1.5 if kind == "block" else 1,
            label=name,
        )
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    mark_level(axes, LITTLE_USE * loss, "little use")
    axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"rise of the loss ({loss:.2f}), nats")
    place_legend(axes, 2)
