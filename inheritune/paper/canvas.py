"""The look of all plots: colours, line styles, the canvas and its REHEARSAL mark. No torch, no pyplot."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.files.writing import replace_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; markers and dashes differ too."""
POINT_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
REFERENCE_GREY = "#555555"
GRID_GREY = "#DDDDDD"
CURVES_PER_PANEL = 6
"""More models than this share no plot: readers cannot tell them apart."""
BELOW_LABEL = 3.8
"""Distance of a legend below its axes, in units of the font's size: ticks and label are between."""
LONG_LABEL = 42
"""Names longer than this have a line of the legend each."""
PAPER_SUFFIX = ": paper"
"""The end of the label of a line with the paper's numbers."""


def style_lines(labels: list[str]) -> list[dict]:
    """Return colour, dashes and width of each line: one colour for a model, thin for the paper's numbers."""
    models = list(dict.fromkeys(label.removesuffix(PAPER_SUFFIX) for label in labels))
    look = {
        model: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i, model in enumerate(models)
    }
    return [
        look[label.removesuffix(PAPER_SUFFIX)] | {"linewidth": 0.7 if label.endswith(PAPER_SUFFIX) else 1.5}
        for label in labels
    ]


@contextmanager
def open_canvas(path: Path, width: float, height: float, rehearsal: bool) -> "Iterator[Figure]":
    """Yield an empty figure of `width` x `height` inches, and write it as a PNG when the block ends.

    matplotlib's defaults are used inside the block, and the file has no version or date: the same numbers
    give the same bytes. Text is shown as it is: a label with two dollar signs is not a formula."""
    from matplotlib import style
    from matplotlib.figure import Figure

    look = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with style.context(["default", look]):
        figure = Figure(figsize=(width, height), layout="constrained")  # without pyplot: the Agg canvas
        yield figure
        if rehearsal:
            _mark_rehearsal(figure, width, height)
        with replace_atomically(Path(path)) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def _mark_rehearsal(figure: "Figure", width: float, height: float) -> None:
    """Write REHEARSAL across the figure."""
    from matplotlib import patheffects

    figure.text(
        0.5,
        0.5,
        "REHEARSAL",
        fontsize=min(8 * width, 13 * height),
        color="#B00000",
        alpha=0.18,
        rotation=25,
        weight="bold",
        ha="center",
        va="center",
        zorder=10,
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
    )


def place_legend(axes: "Axes", n_lines: int, least: int = 2) -> None:
    """Place the legend below the axes and their label, where it covers no data; none for fewer lines than
    `least`, whose name is in the title."""
    if n_lines >= least:
        longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=BELOW_LABEL,
            ncols=2 if longest <= LONG_LABEL else 1,
            frameon=False,
        )


def split_labels(labels: list[str]) -> list[list[int]]:
    """Return the indices of the lines of each panel: at most six models, the first of them in each.

    The paper's line of a model has the model's colour and is in its panel."""
    models = [label.removesuffix(PAPER_SUFFIX) for label in labels]
    first, *rest = dict.fromkeys(models)
    size = CURVES_PER_PANEL if len(rest) < CURVES_PER_PANEL else CURVES_PER_PANEL - 1
    panels = [{first, *rest[i : i + size]} for i in range(0, max(1, len(rest)), size)]
    return [[i for i, model in enumerate(models) if model in panel] for panel in panels]
