"""The three plots of the evidence: curves, attention over training, and what a start is worth by rank."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from evidence_rows import average_seeds, select_attention
from evidence_seeds import CORE, WINDOWS, find_model

from inheritune.paper.attention_lines import mark_level, mark_rank_one
from inheritune.paper.canvas import COLORS, CURVES_PER_PANEL, GRID_GREY, POINT_MARKERS, open_canvas

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
    """Plot mean curves of validation loss with the range over seeds, on the left, and the same minus the
    reference's loss at that step, paired by seed, on the right.

    The core models are in the first line of plots, the others in the next ones, at most six in each; of grown
    runs the first stage. The range of the losses is that after the first quarter of the reference's steps,
    that of the differences after half of them. Lines are drawn from there on, so that none is cut off."""
    curves = _select_curves(records, rows)
    core = [curve for curve in curves if curve.row["run"] in CORE]
    others = [curve for curve in curves if curve.row["run"] not in CORE]
    panels = [core, *(others[i : i + CURVES_PER_PANEL] for i in range(0, len(others), CURVES_PER_PANEL))]
    last_step, end = curves[0].steps[-1], curves[0].losses[:, -1].mean()
    begins = last_step / 4, last_step / 2
    heights = [3.3 + 0.2 * len(panel) for panel in panels]
    with open_canvas(path, 9, sum(heights), records[0]["rehearsal"]) as figure:
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        lines = []
        for part, panel in zip(parts, panels, strict=True):
            lines.append(part.subplots(1, 2))
            for index, curve in enumerate(panel):
                for axes, begin, (steps, values) in zip(lines[-1], begins, curve.lines(), strict=True):
                    from_there = steps >= begin
                    _draw_curve(axes, steps[from_there], values[:, from_there], index, _make_label(curve.row))
            mark_level(lines[-1][0], end, "")  # its name would lie over the other axes
            mark_level(lines[-1][1], 0, "reference")
            handles = lines[-1][0].get_legend_handles_labels()
            part.legend(*handles, loc="outside lower center", ncols=1, frameon=False, fontsize=9)
        _set_loss_axes(np.array(lines))
        figure.suptitle("Validation loss: mean and range over seeds; dotted: the reference's end")


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
    color = COLORS[index]
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axes.plot(
        steps,
        values.mean(axis=0),
        color=color,
        marker=POINT_MARKERS[index],
        markersize=3,
        label=label,
    )


def _set_loss_axes(grid: np.ndarray) -> None:
    """Give the axes of a column (all losses, all differences) one range, with ticks and labels."""
    from matplotlib.ticker import MaxNLocator

    names = ("validation loss (nats per token)", "less the reference's at that step")
    for column, name in zip(grid.T, names, strict=True):
        low, high = min(axes.dataLim.y0 for axes in column), max(axes.dataLim.y1 for axes in column)
        for axes in column:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)
            axes.set_ylabel(name)
            axes.set_xlabel("step of its own training")


def plot_attention(records: list[dict], path: Path) -> None:
    """Plot MaxRank and AvgMass per layer, a line for each measured step: the mean over seeds, at the end with
    the range."""
    models = [
        (find_model(records[0], run, stage), stage) for run, stage in (("reference", None), ("inheritune", 1))
    ]
    with open_canvas(path, 4.5 * len(models), 7.2, records[0]["rehearsal"]) as figure:
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
            mark_rank_one(grid[0, column])
            grid[-1, column].set_xlabel("layer")
        for line in grid:
            line[0].set_ylim(0, 1.05 * max(axes.dataLim.y1 for axes in line))
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), frameon=False, fontsize=9)
        figure.suptitle(f"Attention over training: mean of {len(records)} seeds, at the end with their range")


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
    axes.set_xticks(x)
    axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)


def plot_worth(records: list[dict], path: Path) -> dict:
    """Plot what a start from a window of the reference's layers is worth, by the rank of these layers.

    Returns {points, slope: of the line through each seed's points, in nats per rank, over seeds}."""
    points = _list_points(records)
    with open_canvas(path, 6.4, 4.8, records[0]["rehearsal"]) as figure:
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
        mark_level(axes, 0, "random start")
        axes.set_xlabel("mean MaxRank of the copied layers in the reference")
        axes.set_ylabel("final loss, difference to the random start (nats)")
        axes.set_title("What a start from these layers is worth; a mark per seed")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
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
