"""The plot of loss curves: loss over steps and tokens, a line per run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.errors import UserError
from inheritune.paper.attention_lines import mark_level
from inheritune.paper.canvas import (
    GRID_GREY,
    POINT_MARKERS,
    open_canvas,
    place_legend,
    split_labels,
    style_lines,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RANGE = 2
"""Losses are all shown if the largest is at most so many times the least."""
LINE_PT = 10
"""Height of a line of small text, in points."""
FEW_POINTS = 25
"""A curve with at most so many points also shows a marker for each."""


@dataclass(frozen=True)
class _Curve:
    """The drawn part of a run's record: its evaluation rows and the losses to draw for them."""

    label: str
    rows: list[dict]
    losses: list[float]


def compute_trailing_mean(values: list[float], count: int) -> list[float]:
    """Return each value averaged with up to `count` - 1 values before it."""
    windows = [values[max(0, i + 1 - count) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot_loss_curves(
    series: list[tuple[str, list[dict]]],
    path: Path,
    reference_loss: float | None = None,
    title: str = "Validation loss",
    smooth: int = 1,
    rehearsal: bool = False,
    steps: tuple[int, int | None] = (0, None),
    what: str = "validation loss",
) -> None:
    """Plot the validation loss over steps, one line per (label, rows of metrics.jsonl).

    Rows without `val_loss` are ignored. `choose_loss_range` has the range of the loss axis.
    `reference_loss` is a dotted line. More than six runs are in several panels.
    `smooth` draws trailing means of that many evaluations (10 in the paper's Figure 5c), without those that
    would include the first evaluation. Rows that say `smoothed` are drawn as they are. `steps` are the first
    and the last step drawn. Tokens are a second axis if all runs share one batch size. The loss at the end of
    each line, as drawn, is beside it and in the legend.

    Raises UserError if a run has no validation loss, or none has reached the first step."""
    curves = [curve for label, rows in series if (curve := select_curve(label, rows, smooth, steps))]
    if not curves:
        raise UserError(f"no run has come to step {steps[0]} yet: nothing to draw in '{title}'")
    longest = max(curve.rows[-1]["step"] for curve in curves)
    panels = split_labels([curve.label for curve in curves])
    n_names = max(map(len, panels))
    with open_canvas(path, 8, (4.2 + 0.2 * n_names) * len(panels), rehearsal) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        is_cut = _set_loss_axis(grid, curves, reference_loss)
        for axes, panel in zip(grid, panels, strict=True):
            drawn = [curves[i] for i in panel]
            _set_step_axis(axes, steps[0], longest)
            _draw_curves(axes, drawn)
            if reference_loss is not None:
                mark_level(axes, reference_loss, "reference")
            _add_token_axis(axes, curves, longest)
            trailing = f"\ntrailing mean of {smooth} evaluations" if smooth > 1 else ""
            axes.set_ylabel(f"{what} (nats per token)" + trailing)
            axes.grid(color=GRID_GREY, linewidth=0.6)
            place_legend(axes, len(drawn), least=1)
        figure.suptitle(title + ("; the first steps lie above" if is_cut else ""))
        figure.draw_without_rendering()  # gives the axes their size
        for axes, panel in zip(grid, panels, strict=True):
            _label_ends(axes, [curves[i] for i in panel])


def choose_loss_range(
    points: list[tuple[float, float]], reference_loss: float | None = None
) -> tuple[float, float, bool]:
    """Return (lower end, upper end, whether losses lie above it) of a loss axis for points (step, loss).

    All losses are shown, unless the largest is more than twice the least: then those after a tenth of the
    longest run are, as in the paper's Figures 5 and 6."""
    extra = [reference_loss] if reference_loss else []
    losses = [loss for _, loss in points] + extra
    longest = max(step for step, _ in points)
    is_cut = max(losses) > MOST_RANGE * min(losses)
    if is_cut:
        losses = [loss for step, loss in points if step >= 0.1 * longest] + extra
        is_cut = max(losses) < max(loss for _, loss in points)
    low, high = min(losses), max(losses)
    edge = 0.06 * (high - low) or 0.01 * high
    return low - edge, high + edge, is_cut


def select_curve(label: str, rows: list[dict], smooth: int, steps: tuple[int, int | None]) -> _Curve | None:
    """Return the part of a run's curve to draw; None if the run has not reached the first step.

    Raises UserError if the run has no validation loss."""
    rows = sorted((row for row in rows if row.get("val_loss") is not None), key=lambda row: row["step"])
    if not rows:
        raise UserError(f"run '{label}' has no validation loss to draw; train it first, or leave it out")
    window = 1 if rows[-1].get("smoothed") else smooth
    losses = compute_trailing_mean([row["val_loss"] for row in rows], window)
    begin = window if 1 < window < len(rows) else 0
    first, last = steps
    drawn = [i for i, row in enumerate(rows) if i >= begin and first <= row["step"] <= (last or row["step"])]
    return _Curve(label, [rows[i] for i in drawn], [losses[i] for i in drawn]) if drawn else None


def _draw_curves(axes: "Axes", curves: list[_Curve]) -> None:
    """Draw a line per curve, with the loss at its end in its label."""
    styles = style_lines([curve.label for curve in curves])
    for index, curve in enumerate(curves):
        axes.plot(
            [row["step"] for row in curve.rows],
            curve.losses,
            marker=POINT_MARKERS[index % len(POINT_MARKERS)] if len(curve.rows) <= FEW_POINTS else None,
            markersize=3.5,
            label=f"{curve.label} ({curve.losses[-1]:.3f})",
            **styles[index],
        )


def _label_ends(axes: "Axes", curves: list[_Curve]) -> None:
    """Write the loss at the end of each line beside it, in the line's colour.

    Numbers of lines that end at the same step are moved apart. The axes have their final ranges and size."""
    from matplotlib.patheffects import withStroke

    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes belong to a figure"
    height_pt = axes.get_window_extent().height * 72 / figure.dpi
    scale = height_pt / (high - low)
    lowest: dict[float, float] = {}
    colors = [style["color"] for style in style_lines([curve.label for curve in curves])]
    ends = [(curve.rows[-1]["step"], curve.losses[-1]) for curve in curves]
    for (step, loss), color in sorted(zip(ends, colors, strict=True), key=lambda one: -one[0][1]):
        natural = (loss - low) * scale
        place = min(natural, lowest.get(step, math.inf) - LINE_PT)
        lowest[step] = place
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            xytext=(5, place - natural),
            textcoords="offset points",
            fontsize=8,
            color=color,
            va="center",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def _set_loss_axis(grid: Iterable["Axes"], curves: list[_Curve], reference_loss: float | None) -> bool:
    """Set the range and ticks of the loss axes. Returns whether losses lie above it."""
    from matplotlib.ticker import MaxNLocator

    points = [
        (row["step"], loss) for curve in curves for row, loss in zip(curve.rows, curve.losses, strict=True)
    ]
    low, high, is_cut = choose_loss_range(points, reference_loss)
    for axes in grid:
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter("{x:.4g}")
    return is_cut


def _set_step_axis(axes: "Axes", first: int, longest: int) -> None:
    """Set the range and ticks of the step axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    in_thousands = longest >= 10_000
    axes.set_xlim(first, max(first + 1, longest) * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1000:g}K" if in_thousands and step else f"{step:g}")
    )
    axes.set_xlabel("step")


def _add_token_axis(axes: "Axes", curves: list[_Curve], longest: int) -> None:
    """Add an axis of training tokens above the plot if all runs share one batch size."""
    from matplotlib.ticker import MaxNLocator

    last = [curve.rows[-1] for curve in curves]
    batches = {round(row["tokens"] / row["step"]) for row in last if row.get("tokens") and row["step"]}
    if len(batches) != 1:
        return
    tokens = longest * min(batches)
    units = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, ""))
    unit, name = next((unit, name) for unit, name in units if tokens >= unit)
    per_step = min(batches) / unit
    second = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    second.set_xlabel(f"training tokens ({name})" if name else "training tokens")
    second.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
