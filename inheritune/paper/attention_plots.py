"""Plots of the attention measures: approximate rank and column mass per layer, heat map, attention maps.

`plot_attention(folder)` draws all plots of one analyzed model. The other functions take rows of
attention.jsonl, so that several models share one figure. Rows count layers and heads from 0; the plots count
from 1, as the paper's figures do. The same rows give the same bytes.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.analysis.thresholds import MAIN_THRESHOLD
from inheritune.config import names
from inheritune.errors import UserError
from inheritune.files.escape import escape_plot_label
from inheritune.files.rundir import RunDir
from inheritune.paper.attention_lines import (
    draw_lines,
    draw_panels,
    join_title,
    list_ticks,
    mark_rank_one,
    select_layers,
)
from inheritune.paper.canvas import open_canvas, place_legend, split_labels
from inheritune.paper.worth_plot import has_costs, plot_worth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANK_COLORS = ("#0D0887", "#5302A3", "#8B0AA5", "#B83289", "#DB5C68", "#F48849", "#FEBD2A", "#F0F921")
"""matplotlib's plasma: dark blue at rank 1, then lighter and lighter to yellow, also in grey."""
FAINTEST = 1e-3
"""Attention below this is drawn like this. Most weights are far below 1, so the scale is logarithmic."""
RANK_TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100)

Series = list[tuple[str, list[dict]]]
"""(label, rows) of each line."""


def plot_max_rank(
    series: Series, path: Path, tau: str = MAIN_THRESHOLD, rehearsal: bool = False, title: str = ""
) -> None:
    """Plot MaxRank per layer, one line per (label, rows of attention.jsonl).

    These are the paper's Figures 1, 2a, 8, 13 and 15."""
    lines = [(label, select_layers(rows), "max_rank", tau) for label, rows in series]
    title = title or (series[0][0] if len(series) == 1 else "")
    with open_canvas(path, 7, 4 * len(split_labels([label for label, _ in series])), rehearsal) as figure:
        for axes in draw_panels(figure, lines):
            mark_rank_one(axes)
            axes.set_ylabel(f"MaxRank (τ = {float(tau):.2f})")
        figure.axes[0].set_title(join_title("Approximate rank of attention per layer", title))


def plot_tau_ablation(rows: list[dict], path: Path, label: str = "", rehearsal: bool = False) -> None:
    """Plot MaxRank per layer of one model at every measured tau: the paper's Figure 10."""
    layers = select_layers(rows)
    with open_canvas(path, 7, 4, rehearsal) as figure:
        axes = figure.add_subplot()
        taus = list(layers[0]["max_rank"])
        draw_lines(axes, [(f"τ = {float(tau):.2f}", layers, "max_rank", tau) for tau in taus])
        mark_rank_one(axes)
        axes.set_ylabel("MaxRank")
        axes.set_title(join_title("Approximate rank at different thresholds τ", label))
        place_legend(axes, len(taus))


def plot_avg_mass(
    series: Series, path: Path, eta: str = MAIN_THRESHOLD, rehearsal: bool = False, title: str = ""
) -> None:
    """Plot AvgMass per layer, one line per (label, rows): the paper's Figures 14 to 16."""
    lines = [(label, select_layers(rows), "avg_mass", eta) for label, rows in series]
    title = title or (series[0][0] if len(series) == 1 else "")
    with open_canvas(path, 7, 4 * len(split_labels([label for label, _ in series])), rehearsal) as figure:
        for axes in draw_panels(figure, lines):
            axes.set_ylabel(f"AvgMass (columns, {float(eta):.0%} of the mass)")
        figure.axes[0].set_title(join_title("Columns that hold the attention, per layer", title))


def plot_heat_map(
    rows: list[dict], path: Path, label: str = "", tau: str = MAIN_THRESHOLD, rehearsal: bool = False
) -> None:
    """Plot the mean rank of every head (down) in every layer (across): the paper's Figures 11, 21, 22.

    The scale is logarithmic, and begins at 1 in every plot."""
    layers = select_layers(rows)
    n_heads, n_layers = max(len(row["rank"][tau]) for row in layers), len(layers)
    grid = [
        [row["rank"][tau][head] if head < len(row["rank"][tau]) else float("nan") for row in layers]
        for head in range(n_heads)
    ]
    top = max(2.0, max(max(row["rank"][tau]) for row in layers))
    cell = min(0.3, 7 / max(n_layers, n_heads))
    size = max(4.0, cell * n_layers + 2), max(2.2, cell * n_heads + 1.2)
    with open_canvas(path, *size, rehearsal) as figure:
        _draw_heat_map(figure, grid, top, f"rank (τ = {float(tau):.2f})")
        figure.axes[0].set_title(join_title("Mean rank of each head", label))


def _draw_heat_map(figure: "Figure", grid: list[list[float]], top: float, label: str) -> None:
    """Draw `grid` (head, layer) with its colour bar, whose scale is 1 to `top`."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    n_heads, n_layers = len(grid), len(grid[0])
    axes = figure.add_subplot()
    image = axes.pcolormesh(
        [index + 0.5 for index in range(n_layers + 1)],
        [index + 0.5 for index in range(n_heads + 1)],
        grid,
        cmap=LinearSegmentedColormap.from_list("rank", list(RANK_COLORS)),
        norm=LogNorm(1, top),
        edgecolors="white",
        linewidth=0.3,
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(FixedLocator(list_ticks(n_layers)))
    axes.yaxis.set_major_locator(FixedLocator(list_ticks(n_heads)))
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    bar = figure.colorbar(image, ax=axes, label=label)
    bar.ax.yaxis.set_major_locator(FixedLocator([tick for tick in RANK_TICKS if tick <= top]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def plot_attention_maps(rows: list[dict], path: Path, label: str = "", rehearsal: bool = False) -> None:
    """Plot the `map` rows side by side, with each head's rank: the paper's Figures 9 and 12.

    The scale is logarithmic: on a linear one, all but the first rows are black. The maps are causal. The
    paper shows maps without the mask, which is not what the model computes."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    maps = [row for row in rows if row["kind"] == "map"]
    if not maps:
        raise UserError("no attention maps to draw; give 'maps' to analyze")
    rank = {row["layer"]: row["rank"][MAIN_THRESHOLD] for row in select_layers(rows)}
    faintest = find_faintest([row["mean"] for row in maps])
    n_columns = min(5, len(maps))
    n_lines = -(-len(maps) // n_columns)
    with open_canvas(path, 2.5 * n_columns + 0.9, 2.35 * n_lines + 0.85, rehearsal) as figure:
        grid = figure.subplots(n_lines, n_columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for axes, row in zip(grid.flat, maps, strict=False):
            axes.set_visible(True)
            n_tokens = len(row["mean"])
            shown = [
                [max(weight, faintest) if key <= query else float("nan") for key, weight in enumerate(line)]
                for query, line in enumerate(row["mean"])
            ]
            norm = LogNorm(faintest, 1)
            image = axes.imshow(shown, cmap="viridis", norm=norm, interpolation="nearest")
            axes.set_title(
                f"layer {row['layer'] + 1}, head {row['head'] + 1}\nrank "
                f"{rank[row['layer']][row['head']]:.2f}",
                size=10,
            )
            axes.set_xticks([0, n_tokens - 1], ["1", str(n_tokens)])
            axes.set_yticks([0, n_tokens - 1], ["1", str(n_tokens)])
            axes.set_xlabel("key token", labelpad=-8)
        for axes in grid[:, 0]:
            axes.set_ylabel("query token", labelpad=-8)
        bar = figure.colorbar(image, ax=grid.ravel().tolist(), label="attention", fraction=0.03)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda weight, _: f"{weight:g}"))
        figure.suptitle(join_title("Attention maps", label))
        figure.supxlabel(
            f"causal; mean of {maps[0]['sequences']} sequences, first {len(maps[0]['mean'])} tokens", size=8
        )


def find_faintest(maps: Iterable[list[list[float]]]) -> float:
    """Return the lower end of the scale of attention maps: the power of ten below their least weight that is
    not masked, but at least FAINTEST."""
    least = min(min(line[: query + 1]) for one in maps for query, line in enumerate(one))
    return max(FAINTEST, 10.0 ** math.floor(math.log10(least))) if least > 0 else FAINTEST


def plot_attention(folder: str | Path) -> list[Path]:
    """Draw all plots of one analyzed model into the folder of its attention.jsonl. Returns their paths."""
    run = RunDir(folder)
    rows = run.read_attention()
    if not rows:
        raise UserError(
            f"{run.attention} is missing or empty; run 'python -m inheritune analyze --model M --data D' "
            f"first"
        )
    header = rows[0]
    label = escape_plot_label("/".join(Path(header["model"]).parts[-2:]))
    rehearsal = header.get("rehearsal", False)
    paths = [run.path / name for name in names.PLOTS]
    plot_max_rank([(label, rows)], paths[0], rehearsal=rehearsal)
    plot_tau_ablation(rows, paths[1], label, rehearsal)
    plot_avg_mass([(label, rows)], paths[2], rehearsal=rehearsal)
    plot_heat_map(rows, paths[3], label, rehearsal=rehearsal)
    drawn = paths[:4]
    if has_costs(rows):
        plot_worth(rows, paths[4], label, rehearsal)
        drawn.append(paths[4])
    if any(row["kind"] == "map" for row in rows):
        plot_attention_maps(rows, paths[5], label, rehearsal)
        drawn.append(paths[5])
    return drawn
