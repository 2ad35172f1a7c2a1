"""The three plots of the evidence: curves, attention over training, and what a start is worth by rank."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from evidence_rows import average_seeds, select_attention
from evidence_seeds import CORE, WINDOWS, find_model

from inheritune.paper.canvas import COLORS, GRID_GREY, POINT_MARKERS, REFERENCE_GREY, open_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTENTION_FIELDS = (("max_rank", "MaxRank (τ = 0.90)"), ("avg_mass", "AvgMass (η = 0.90)"))


@dataclass(frozen=True)
class _Curve:
    """The validation losses of one model over seeds."""

    row: dict
    steps: np.ndarray  # (points,)
    losses: np.ndarray  # (seeds, points)
    reference: np.ndarray  # (seeds, points of the reference)

    def lines(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (steps, values of each seed) of the losses, and of the losses minus the reference's."""
        n_shared = len(self.steps[: self.reference.shape[1]])
        gaps = self.losses[:, :n_shared] - self.reference[:, :n_shared]
        return [(self.steps, self.losses), (self.steps[:n_shared], gaps)]


def plot_curves(records: list[dict], rows: list[dict], path: Path) -> None:
    """Plot mean curves of validation loss with the range over seeds; below, the same minus the reference's
    loss at that step, paired by seed.

    The core models are on the left, the others on the right; of grown runs the first stage. The range of the
    upper axis is that of the losses after the first quarter of the reference's steps, the range of the lower
    axis that after half of them."""
    curves = _select_curves(records, rows)
    core = [curve for curve in curves if curve.row["run"] in CORE]
    others = [curve for curve in curves if curve.row["run"] not in CORE]
    panels = [panel for panel in (core, others) if panel]
    last_step = curves[0].steps[-1]
    begins = last_step / 4, last_step / 2
    end = curves[0].losses[:, -1].mean()
    with open_canvas(path, 6.2 * len(panels), 8, records[0]["rehearsal"]) as figure:
        grid = figure.subplots(
            2, len(panels), squeeze=False, sharey="row", sharex="col", height_ratios=(3, 2)
        )
        shown: tuple[list, list] = ([], [])
        for column, panel in enumerate(panels):
            for index, curve in enumerate(panel):
                for line, (steps, values) in enumerate(curve.lines()):
                    _draw_curve(grid[line, column], steps, values, index, _make_label(curve.row))
                    shown[line].append(values[:, steps >= begins[line]])
            grid[0, column].axhline(end, color=REFERENCE_GREY, lw=1, ls=":", label="end of the reference")
            grid[1, column].set_xlabel("step of its own training")
            grid[1, column].legend(
                *grid[0, column].get_legend_handles_labels(),
                loc="upper center",
                frameon=False,
                bbox_to_anchor=(0.5, -0.18),
                fontsize=8,
            )
        _set_loss_axes(grid, shown)
        figure.suptitle("Validation loss: mean and range over seeds")


def _select_curves(records: list[dict], rows: list[dict]) -> list[_Curve]:
    """Return the curve of each row, of grown runs that of the first stage."""
    curves = []
    for row in rows:
        if row["stage"] not in (None, 1):
            continue
        pairs = [(find_model(r, row["run"], row["stage"]), find_model(r, "reference")) for r in records]
        pairs = [(model, reference) for model, reference in pairs if model]
        ours = np.array([model["curve"] for model, _ in pairs])[:, 1:]  # (seeds, points, (step, loss))
        theirs = np.array([reference["curve"] for _, reference in pairs])[:, 1:]
        curves.append(_Curve(row, ours[0, :, 0], ours[:, :, 1], theirs[:, :, 1]))
    return curves


def _make_label(row: dict) -> str:
    return f"{row['label']} ({row['layers'][0]} layers, {len(row['seeds'])} seeds)"


def _draw_curve(axes: "Axes", steps: np.ndarray, values: np.ndarray, index: int, label: str) -> None:
    """Draw the mean over seeds with their range; `values` are (seeds, points)."""
    color, dashes = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axes.plot(
        steps,
        values.mean(axis=0),
        dashes,
        color=color,
        marker=POINT_MARKERS[index % len(POINT_MARKERS)],
        markersize=3,
        label=label,
    )


def _set_loss_axes(grid: np.ndarray, shown: tuple[list, list]) -> None:
    """Set ranges, ticks and labels of the loss axes; `shown` are the values that each row of plots fits."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    grid[0, 0].set_yscale("log")
    for line, values in zip(grid, shown, strict=True):
        low, high = min(one.min() for one in values), max(one.max() for one in values)
        line[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        line[0].yaxis.set_major_locator(MaxNLocator(8))
        line[0].yaxis.set_minor_locator(NullLocator())
        line[0].yaxis.set_major_formatter("{x:g}")
        for axes in line:
            axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)
    grid[0, 0].set_ylabel("validation loss (nats per token)")
    grid[1, 0].set_ylabel("less the reference's at that step")


def plot_attention(records: list[dict], path: Path) -> None:
    """Plot MaxRank and AvgMass per layer, a line for each measured step: the mean over seeds, at the end with
    the range."""
    models = [
        (find_model(records[0], run, stage), stage) for run, stage in (("reference", None), ("inheritune", 1))
    ]
    with open_canvas(path, 5 * len(models), 7, records[0]["rehearsal"]) as figure:
        grid = figure.subplots(2, len(models), squeeze=False, sharey="row")
        for column, (model, stage) in enumerate(models):
            for line, (field, name) in enumerate(ATTENTION_FIELDS):
                measured = {
                    step: np.array(
                        [find_model(r, model["run"], stage)["attention"][step][field] for r in records]
                    )
                    for step in sorted(model["attention"], key=int)
                }
                _draw_measure(grid[line, column], measured)
                if column == 0:
                    grid[line, column].set_ylabel(name)
            grid[0, column].set_title(f"{model['label']} ({model['layers']} layers)")
            grid[-1, column].set_xlabel("layer")
        for line in grid:
            line[0].set_ylim(0, 1.05 * max(axes.dataLim.y1 for axes in line))
        grid[0, 0].legend(frameon=False, fontsize=8)
        figure.suptitle(
            f"Attention over training: mean of {len(records)} seeds, at the end with their range; dotted: "
            f"rank 1"
        )


def _draw_measure(axes: "Axes", measured: dict[str, np.ndarray]) -> None:
    """Draw one measure per layer; `measured` are {step: (seeds, layers)}."""
    from matplotlib import colormaps

    last = len(measured) - 1
    for index, (step, values) in enumerate(measured.items()):
        x = np.arange(1, values.shape[1] + 1)
        color = colormaps["viridis_r"]((index + 1) / len(measured))
        axes.plot(
            x, values.mean(0), marker=POINT_MARKERS[index], markersize=4, color=color, label=f"step {step}"
        )
        if index == last:
            axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.axhline(1, color=REFERENCE_GREY, linewidth=1, linestyle=":")
    axes.set_xticks(x)
    axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)


def plot_worth(records: list[dict], path: Path) -> dict:
    """Plot what a start from a window of the reference's layers is worth, by the rank of these layers.

    Returns {points, slope: of the line through each seed's points, in nats per rank, over seeds}."""
    points = _list_points(records)
    with open_canvas(path, 6, 4.4, records[0]["rehearsal"]) as figure:
        axes = figure.add_subplot()
        for index, run in enumerate(dict.fromkeys(point["run"] for point in points)):
            of_run = [point for point in points if point["run"] == run]
            axes.scatter(
                [point["avg_rank"] for point in of_run],
                [point["to_random"] for point in of_run],
                color=COLORS[index],
                marker=POINT_MARKERS[index],
                label=f"layers {of_run[0]['layers'][0] + 1} to {of_run[0]['layers'][-1] + 1}",
            )
        axes.axhline(0, color=REFERENCE_GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("mean MaxRank of the copied layers in the reference")
        axes.set_ylabel("final loss, difference to the random start (nats)")
        axes.set_title("What a start from these layers is worth; a mark per seed")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    slopes = []
    for record in records:
        of_seed = [(p["avg_rank"], p["to_random"]) for p in points if p["seed"] == record["seed"]]
        if len({rank for rank, _ in of_seed}) > 1:
            slopes.append(float(np.polyfit(*zip(*of_seed, strict=True), 1)[0]))
    return {"points": points, "slope": average_seeds(slopes) if slopes else None}


def _list_points(records: list[dict]) -> list[dict]:
    """Return a point for each run that starts from a window, and each seed."""
    points = []
    for run in WINDOWS:
        for record in records:
            model = find_model(record, run, 1) or find_model(record, run)
            if not model:
                continue
            ranks = select_attention(record)["max_rank"]
            points.append(
                {
                    "run": run,
                    "seed": record["seed"],
                    "layers": model["window"],
                    "avg_rank": statistics.fmean(ranks[layer] for layer in model["window"]),
                    "to_random": model["loss"]["mean"] - find_model(record, "random")["loss"]["mean"],
                }
            )
    return points
