"""The plot of loss curves: loss over steps and tokens, a line per run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.errors import UserError
from inheritune.paper.canvas import GRID_GREY, POINT_MARKERS, REFERENCE_GREY, open_canvas, style_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

    Rows without `val_loss` are ignored. The loss axis is logarithmic, and its range is that of the losses
    after a tenth of the longest run, as in the paper's Figures 5 and 6. `reference_loss` is a dotted line.
    `smooth` draws trailing means of that many evaluations (10 in the paper's Figure 5c), without those that
    would include the first evaluation. Rows that say `smoothed` are drawn as they are. `steps` are the first
    and the last step drawn. Tokens are a second axis if all runs share one batch size. The legend gives the
    loss at the end of each line, as drawn.

    Raises UserError if a run has no validation loss, or none has reached the first step."""
    curves = [curve for label, rows in series if (curve := _select_curve(label, rows, smooth, steps))]
    if not curves:
        raise UserError(f"no run has come to step {steps[0]} yet: nothing to draw in '{title}'")
    longest = max(curve.rows[-1]["step"] for curve in curves)
    with open_canvas(path, 9, 4.4, rehearsal) as figure:
        axes = figure.add_subplot()
        _draw_curves(axes, curves)
        if reference_loss is not None:
            label = f"reference ({reference_loss:.3f})"
            axes.axhline(reference_loss, color=REFERENCE_GREY, linestyle=":", label=label)
        _set_loss_axis(axes, curves, longest, reference_loss)
        _set_step_axis(axes, steps[0], longest)
        trailing = f"\ntrailing mean of {smooth} evaluations" if smooth > 1 else ""
        axes.set_ylabel(f"{what} (nats per token)" + trailing)
        axes.grid(color=GRID_GREY, linewidth=0.6)
        _add_token_axis(axes, curves, longest)
        axes.set_title(title)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            frameon=False,
            title="run (loss at the end of the line)",
            alignment="left",
        )


def _select_curve(label: str, rows: list[dict], smooth: int, steps: tuple[int, int | None]) -> _Curve | None:
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
    """Draw a line per curve, labelled with the loss at its end."""
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


def _set_loss_axis(axes: "Axes", curves: list[_Curve], longest: int, reference_loss: float | None) -> None:
    """Set the range and ticks of the loss axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    late = [
        loss
        for curve in curves
        for row, loss in zip(curve.rows, curve.losses, strict=True)
        if row["step"] >= 0.1 * longest
    ]
    shown = late + ([reference_loss] if reference_loss else [])
    low, high = min(shown), max(shown)
    axes.set_yscale("log")
    axes.set_ylim(low * (low / high) ** 0.06, high * (high / low) ** 0.06 if high > low else high * 1.01)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:.4g}"))


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
    units = ((1e9, "billion"), (1e6, "million"), (1, ""))
    unit, name = next((unit, name) for unit, name in units if tokens >= unit)
    per_step = min(batches) / unit
    second = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    second.set_xlabel(f"training tokens ({name})" if name else "training tokens")
    second.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
