"""The plot of a table of the paper: the paper's numbers and this repository's, with their noise."""

from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.paper.canvas import COLORS, GRID_GREY, REFERENCE_GREY, open_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDES = (
    ("paper", "paper_noise", {"color": REFERENCE_GREY, "mfc": "white", "zorder": 4, "label": "paper"}),
    ("ours", "noise", {"color": COLORS[0], "label": "this repository"}),
)
"""(column of the number, column of its noise, look) of each mark."""


def plot_cells(records: list[dict], path: Path, title: str, rehearsal: bool = False) -> None:
    """Plot a panel per column of a table of the paper and a line per model: the paper's number hollow,
    this repository's filled.

    `records` are the rows of the table's CSV file. A cell without either number is left empty."""
    columns = list(dict.fromkeys(record["column"] for record in records))
    models = list(dict.fromkeys(record["row"] for record in records))
    with open_canvas(path, 3.2 + 3.4 * len(columns), 1.2 + 0.27 * len(models), rehearsal) as figure:
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            _draw_column(axes, [record for record in records if record["column"] == column], models)
            axes.set_xlabel(column)
        figure.suptitle(title, size=11)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )


def _draw_column(axes: "Axes", records: list[dict], models: list[str]) -> None:
    """Draw the numbers of one column, a line per model."""
    for side, noise, look in SIDES:
        known = [record for record in records if record[side] not in ("", None)]
        axes.errorbar(
            [float(record[side]) for record in known],
            [models.index(record["row"]) for record in known],
            xerr=[record[noise] or 0 for record in known],
            fmt="o",
            markersize=5,
            linewidth=1.2,
            **look,
        )
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(color=GRID_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
