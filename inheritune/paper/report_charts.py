"""The charts of a report, as plotly's figures in plain dicts: curves, measures per layer, heat maps, maps.

plotly reads a few HTML tags in names, so every word of a user is escaped here. The colours are those of the
plots; report.js replaces them by brighter ones on a dark page.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from inheritune.analysis.thresholds import LITTLE_USE, MAIN_THRESHOLD
from inheritune.files.escape import join_lines
from inheritune.paper.attention_lines import list_ticks, select_layers
from inheritune.paper.attention_plots import RANK_COLORS, RANK_TICKS, find_faintest
from inheritune.paper.canvas import REFERENCE_GREY, split_labels, style_lines
from inheritune.paper.loss_plots import choose_loss_range
from inheritune.paper.worth_plot import KINDS, LINEAR_BELOW

DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
"""matplotlib's dashes -> plotly's."""
COST_TICKS = (-1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10)
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")


@dataclass(frozen=True)
class Chart:
    """A figure of plotly with its heading, and a sentence on how to read it."""

    title: str
    figure: dict
    note: str = ""
    height: int = 380
    narrow: bool = False
    """Whether several fit side by side."""


@dataclass(frozen=True)
class Curve:
    """A line: the points (x, y) and, where there is one, the range of y."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    end: str = ""
    """What the legend says of the line's end."""

    @property
    def name(self) -> str:
        """The line's name in the legend."""
        return f"{self.label} ({self.end})" if self.end else self.label


def escape_label(words: str) -> str:
    """Return words as plotly shows them unchanged."""
    return html.escape(join_lines(words), quote=False)


def split_panels(curves: list[Curve]) -> list[list[Curve]]:
    """Return the curves in panels of at most six models. The first is the reference, and is in each."""
    return [[curves[i] for i in panel] for panel in split_labels([curve.label for curve in curves])]


def draw_losses(
    title: str, curves: list[Curve], reference: float | None, what: str, note: str = "", unit: str = "step"
) -> list[Chart]:
    """Return charts of losses over steps, in panels of at most six curves. `reference` is a dotted line.

    The range of the losses is that of the plots."""
    longest = max(max(curve.x) for curve in curves)
    points = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
    low, high, is_cut = choose_loss_range(points, reference)
    if is_cut:
        note = f"{note} The first steps lie above; a double-click shows them.".strip()
    panels = split_panels(curves)
    charts = []
    for number, panel in enumerate(panels, 1):
        layout = {
            "xaxis": {"title": {"text": unit}, "range": [0, 1.01 * max(1, longest)], "tickformat": "~s"},
            "yaxis": {"title": {"text": what}, "range": [low, high]},
            "hovermode": "x unified",
        }
        lines = _draw_lines(panel, ".4f")
        if reference is not None:
            lines.append(_draw_level(reference, longest))
        where = f" ({number} of {len(panels)})" if len(panels) > 1 else ""
        charts.append(Chart(title + where, {"data": lines, "layout": layout}, note))
    return charts


def _draw_level(loss: float, longest: float) -> dict:
    """Return the trace of a dotted line at the loss that the reference ends with."""
    return {
        "x": [0, 1.01 * longest],
        "y": [loss, loss],
        "name": f"end of the reference ({loss:.4f})",
        "mode": "lines",
        "line": {"color": REFERENCE_GREY, "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }


def draw_layers(title: str, curves: list[Curve], what: str, note: str = "") -> Chart:
    """Return the chart of a measure per layer, counted from 1, with a line per curve."""
    last = int(max(max(curve.x) for curve in curves))
    layout = {
        "xaxis": {
            "title": {"text": "layer"},
            "range": [0.5, last + 0.5],
            "tickvals": list_ticks(last),
        },
        "yaxis": {"title": {"text": what}, "rangemode": "tozero"},
        "hovermode": "x unified",
    }
    if "MaxRank" in what:
        layout |= _mark_level(1, "rank 1 = lazy")
    return Chart(title, {"data": _draw_lines(curves, ".2f"), "layout": layout}, note, height=340)


def _draw_lines(curves: list[Curve], digits: str) -> list[dict]:
    """Return the traces of lines; a range is a band in the line's colour."""
    traces: list[dict] = []
    styles = style_lines([curve.label for curve in curves])
    for index, (curve, style) in enumerate(zip(curves, styles, strict=True)):
        group, x = f"curve {index}", list(curve.x)
        if curve.low and curve.high:
            for values, fill in ((curve.low, None), (curve.high, "tonexty")):
                traces.append(
                    {
                        "x": x,
                        "y": list(values),
                        "mode": "lines",
                        "line": {"width": 0, "color": style["color"]},
                        "legendgroup": group,
                        "showlegend": False,
                        "hoverinfo": "skip",
                        **({"fill": fill, "fillcolor": _fade(style["color"])} if fill else {}),
                    }
                )
        traces.append(
            {
                "x": x,
                "y": list(curve.y),
                "name": escape_label(curve.name),
                "mode": "lines+markers" if len(x) <= 25 else "lines",
                "line": {
                    "color": style["color"],
                    "dash": DASHES[style["linestyle"]],
                    "width": style["linewidth"] + 0.5,
                },
                "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 6},
                "legendgroup": group,
                "hovertemplate": f"%{{y:{digits}}}",
            }
        )
    return traces


def _fade(color: str) -> str:
    """Return a colour #RRGGBB with an opacity of 15%."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _mark_level(level: float, name: str) -> dict:
    """Return the parts of a layout that draw a dotted line at `level`, with its name above the right end."""
    line = {"color": REFERENCE_GREY, "width": 1, "dash": "dot"}
    where = {"xref": "paper", "yref": "y"}
    words = {"text": name, "x": 1, "y": level, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    return {
        "shapes": [{"type": "line", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": line, **where}],
        "annotations": [{**words, **where, "font": {"size": 11, "color": REFERENCE_GREY}}],
    }


def draw_costs(rows: list[dict]) -> Chart:
    """Return the chart of what each layer is worth: how much the loss rises without it and its parts.

    Costs up to LINEAR_BELOW are on a linear scale, larger ones on a logarithmic one."""
    layers, loss = select_layers(rows), rows[0]["loss"]
    curves, known = [], []
    for kind, name in KINDS.items():
        costs = [row["cost"][kind] for row in layers]
        known.append(costs)
        places = [None if cost is None else _place_cost(cost) for cost in costs]
        curves.append(Curve(name, [row["layer"] + 1 for row in layers], places))
    chart = draw_layers(
        "What each layer is worth",
        curves,
        "rise of the loss, nats",
        f"How much the loss of {loss:.4f} rises without a layer, before any training. "
        f"Between -{LINEAR_BELOW} and {LINEAR_BELOW} the scale is linear, outside logarithmic.",
    )
    for trace, costs in zip(chart.figure["data"], known, strict=True):
        trace |= {"customdata": costs, "hovertemplate": "%{customdata:.4f}"}
    ends = [place for curve in curves for place in curve.y if place is not None]
    ticks = [tick for tick in COST_TICKS if min(ends) - 1 <= _place_cost(tick) <= max(ends) + 1]
    axis = {"tickvals": [_place_cost(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}
    chart.figure["layout"]["yaxis"] = {"title": {"text": "rise of the loss, nats"}, **axis}
    chart.figure["layout"] |= _mark_level(_place_cost(LITTLE_USE * loss), "little use")
    return chart


def _place_cost(cost: float) -> float:
    """Return where a cost is on the axis: linear up to LINEAR_BELOW, logarithmic beyond."""
    size = abs(cost) / LINEAR_BELOW
    return math.copysign(size if size <= 1 else 1 + math.log10(size), cost)


def draw_head_ranks(rows: list[dict]) -> Chart:
    """Return the heat map of the mean rank of every head (down) in every layer (across)."""
    layers = select_layers(rows)
    ranks = [row["rank"][MAIN_THRESHOLD] for row in layers]
    n_heads = max(map(len, ranks))
    grid = [[of[head] if head < len(of) else None for of in ranks] for head in range(n_heads)]
    top = max(2.0, max(map(max, ranks)))
    ticks = [tick for tick in RANK_TICKS if tick <= top]
    trace = {
        "type": "heatmap",
        "x": list(range(1, len(layers) + 1)),
        "y": list(range(1, n_heads + 1)),
        "z": [[None if rank is None else math.log10(max(1.0, rank)) for rank in line] for line in grid],
        "customdata": grid,
        "zmin": 0,
        "zmax": math.log10(top),
        "colorscale": [[i / (len(RANK_COLORS) - 1), color] for i, color in enumerate(RANK_COLORS)],
        "colorbar": {
            "title": {"text": "rank"},
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [str(tick) for tick in ticks],
            "thickness": 12,
        },
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "layer %{x}, head %{y}: rank %{customdata:.2f}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "layer"}, "tickvals": list_ticks(len(layers)), "showgrid": False},
        "yaxis": {
            "title": {"text": "head"},
            "autorange": "reversed",
            "tickvals": list_ticks(n_heads),
            "showgrid": False,
        },
    }
    height = min(520, 190 + 22 * n_heads)
    return Chart("Mean rank of each head", {"data": [trace], "layout": layout}, "", height, True)


def draw_maps(rows: list[dict]) -> list[Chart]:
    """Return a chart for each attention map, on a logarithmic scale: most weights are far below 1."""
    ranks = {row["layer"]: row["rank"][MAIN_THRESHOLD] for row in select_layers(rows)}
    charts = []
    maps = [row for row in rows if row["kind"] == "map"]
    floor = find_faintest(row["mean"] for row in maps)
    lowest = round(math.log10(floor))
    for row in maps:
        weights = [[float(f"{weight:.3g}") for weight in line] for line in row["mean"]]
        shown = [
            [math.log10(max(weight, floor)) if key <= query else None for key, weight in enumerate(line)]
            for query, line in enumerate(weights)
        ]
        trace = {
            "type": "heatmap",
            "z": [[place if place is None else round(place, 3) for place in line] for line in shown],
            "x0": 1,
            "y0": 1,
            "zmin": lowest,
            "zmax": 0,
            "colorscale": "Viridis",
            "colorbar": {
                "tickvals": list(range(lowest, 1)),
                "ticktext": [f"{10.0**n:g}" for n in range(lowest, 1)],
                "thickness": 10,
                "len": 1.05,
            },
            "customdata": weights,
            "hovertemplate": "query %{y}, key %{x}: %{customdata:.4f}<extra></extra>",
        }
        layout = {
            "xaxis": {"title": {"text": "key token"}, "showgrid": False, "constrain": "domain"},
            "yaxis": {
                "title": {"text": "query token"},
                "autorange": "reversed",
                "showgrid": False,
                "scaleanchor": "x",
                "constrain": "domain",
                "constraintoward": "top",
            },
        }
        rank = ranks[row["layer"]][row["head"]]
        name = f"Layer {row['layer'] + 1}, head {row['head'] + 1} (rank {rank:.2f})"
        charts.append(Chart(name, {"data": [trace], "layout": layout}, "", 300, True))
    return charts


def draw_marks(title: str, series: list[Curve], x_name: str, y_name: str, note: str = "") -> Chart:
    """Return a chart of single marks, a colour and shape for each series, with the line of zero."""
    traces = _draw_lines(series, ".4f")
    for trace in traces:
        trace |= {"mode": "markers", "hovertemplate": f"{x_name} %{{x:.2f}}<br>{y_name} %{{y:.4f}}"}
        trace["marker"]["size"] = 10
    layout = {
        "xaxis": {"title": {"text": x_name}},
        "yaxis": {"title": {"text": y_name}},
        "hovermode": "closest",
        **_mark_level(0, "the random start"),
    }
    return Chart(title, {"data": traces, "layout": layout}, note)


def draw_cells(title: str, column: str, sides: dict[str, list[tuple[str, float, float | None]]]) -> Chart:
    """Return the chart of a column of a paper's table: {side: (model, number, noise)}, a line per model."""
    traces = []
    models = list(dict.fromkeys(model for points in sides.values() for model, _, _ in points))
    for (side, points), color, symbol in zip(
        sides.items(),
        (REFERENCE_GREY, style_lines(["ours"])[0]["color"]),
        ("circle-open", "circle"),
        strict=True,
    ):
        traces.append(
            {
                "x": [number for _, number, _ in points],
                "y": [escape_label(model) for model, _, _ in points],
                "error_x": {"type": "data", "array": [noise or 0 for _, _, noise in points], "thickness": 1},
                "mode": "markers",
                "name": side,
                "marker": {"color": color, "symbol": symbol, "size": 9},
                "hovertemplate": "%{y}: %{x:.4f}",
            }
        )
    layout = {
        "xaxis": {"title": {"text": escape_label(column)}},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "hovermode": "closest",
    }
    return Chart(title, {"data": traces, "layout": layout}, "", 150 + 26 * len(models))


def thin_out(rows: list[dict], field: str, most: int = 200) -> Curve:
    """Return the mean of `field` over equal parts of a record, at most so many, at the last step of each."""
    known = [row for row in rows if isinstance(row.get(field), int | float)]
    size = -(-len(known) // most) or 1
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    x = [part[-1]["step"] for part in parts]
    return Curve("", x, [round(sum(row[field] for row in part) / len(part), 5) for part in parts])
