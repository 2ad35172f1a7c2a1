"""What the plots of attention measures share: lines per layer, ticks, the line of rank 1."""

from typing import TYPE_CHECKING

from inheritune.errors import UserError
from inheritune.paper.canvas import (
    GRID_GREY,
    POINT_MARKERS,
    REFERENCE_GREY,
    place_legend,
    split_labels,
    style_lines,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def select_layers(rows: list[dict]) -> list[dict]:
    """Return the layer rows. Raises UserError if there are none."""
    layers = [row for row in rows if row["kind"] == "layer"]
    if not layers:
        raise UserError("no layer rows to draw; run 'python -m inheritune analyze --model M --data D' first")
    return layers


def list_ticks(last: int) -> list[int]:
    """Return the ticks of an axis that counts from 1 to `last`: all of them, or 1 and, from 4 on, multiples
    of 2 or 4."""
    if last <= 12:
        return list(range(1, last + 1))
    return [1, *range(4, last + 1, 2 if last <= 24 else 4)]


def draw_lines(axes: "Axes", lines: list[tuple[str, list[dict], str, str]]) -> None:
    """Draw one line with a band of one standard deviation per (label, layer rows, field, key).

    A row without a deviation, such as one read off the paper's figures, has no band."""
    styles = style_lines([line[0] for line in lines])
    for index, (label, layers, field, key) in enumerate(lines):
        x = [row["layer"] + 1 for row in layers]
        y = [row[field][key] for row in layers]
        std = [row.get(f"{field}_std", {}).get(key, 0.0) for row in layers]
        axes.fill_between(
            x,
            [max(1.0, m - s) for m, s in zip(y, std, strict=True)],
            [m + s for m, s in zip(y, std, strict=True)],
            color=styles[index]["color"],
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            x, y, marker=POINT_MARKERS[index % len(POINT_MARKERS)], markersize=4, label=label, **styles[index]
        )
    last = max(row["layer"] + 1 for _, layers, _, _ in lines for row in layers)
    axes.set_xticks(list_ticks(last))
    axes.set_xlim(0.5, last + 0.5)
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)  # a margin of the data's own range cuts flat lines off
    axes.set_xlabel("layer")
    axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_panels(figure: "Figure", lines: list[tuple[str, list[dict], str, str]]) -> list["Axes"]:
    """Draw lines as `draw_lines` does, in panels of at most six models below each other. Returns the axes."""
    panels = split_labels([line[0] for line in lines])
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        draw_lines(axes, [lines[i] for i in panel])
        place_legend(axes, len(panel))
    return list(grid)


def mark_rank_one(axes: "Axes") -> None:
    """Draw the line of rank 1, with its name at the right."""
    mark_level(axes, 1, "rank 1 = lazy")


def mark_level(axes: "Axes", level: float, name: str) -> None:
    """Draw a dotted line at `level`, with its name at the right."""
    axes.axhline(level, color=REFERENCE_GREY, linewidth=1, linestyle=":")
    axes.annotate(
        name,
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=REFERENCE_GREY,
        va="center",
        annotation_clip=False,
    )


def join_title(title: str, label: str) -> str:
    """Return a plot's title, with the model's label if there is one."""
    return f"{title}: {label}" if label else title
