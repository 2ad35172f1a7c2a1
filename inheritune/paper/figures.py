"""Figures: drawn from the JSON rows of finished runs and nothing else (no torch, no model, no log).

`plot_attention(folder)` draws what `analyze` measured; the other functions take rows, so that several models
share one figure. Rows labelled "...: paper" are the paper's, drawn thin and in the colour of ours. Rows count
layers and heads from 0; the figures count from 1, as the paper's do. The same rows give the same bytes.
"""

from contextlib import contextmanager
from pathlib import Path

from inheritune.config import names
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.escape import plot_label
from inheritune.files.rundir import RunDir, read_jsonl, replacing
from inheritune.paper.items import (
    Panel,
    Row,
    attention_of,
    item_names,
    last_ten,
    load_experiments,
    load_item,
    model_folder,
    published_loss,
    row_curve,
    rows_like,
    shown_maps,
)
from inheritune.paper.tables import entries, judge, paper_folder, validation_curve

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; markers and dashes differ too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
REFERENCE_GREY = "#555555"
MAIN = "0.9"
"""Key of the tau and eta of the paper's main figures."""
PAPER = ": paper"
"""How the label of a line with the paper's numbers ends."""


def _styles(labels: list[str]) -> list[dict]:
    """Colour, dashes and width of each line: one colour for a model, thin for the paper's numbers."""
    models = list(dict.fromkeys(label.removesuffix(PAPER) for label in labels))
    look = {
        model: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i, model in enumerate(models)
    }
    return [look[n.removesuffix(PAPER)] | {"linewidth": 0.7 if n.endswith(PAPER) else 1.5} for n in labels]


@contextmanager
def canvas(path: Path, width: float, height: float, rehearsal: bool):
    """An empty figure of `width` x `height` inches, written as a PNG when the block ends.

    matplotlib's defaults are restored around it, and the file carries no version or date: same numbers, same
    bytes. Words are shown as they are: a label with two dollars is no formula."""
    from matplotlib import patheffects, style
    from matplotlib.figure import Figure

    look = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with style.context(["default", look]):
        figure = Figure(
            figsize=(width, height), layout="constrained"
        )  # without pyplot: always the Agg canvas
        yield figure
        if rehearsal:
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
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def _layers(rows: list[dict]) -> list[dict]:
    layers = [row for row in rows if row["kind"] == "layer"]
    if not layers:
        raise UserError("no layer rows to draw; run 'python -m inheritune analyze --model M --data D' first")
    return layers


def _count_ticks(last: int) -> list[int]:
    """Ticks of an axis that counts from 1 to `last`: all, or 1 and the multiples of 2 or 4 from 4 on."""
    step = 1 if last <= 12 else 2 if last <= 24 else 4
    return list(range(1, last + 1)) if step == 1 else [1, *range(4, last + 1, step)]


def _legend(axes, n: int) -> None:
    """The legend below the axes, where no data lies."""
    if n > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(n, 2), frameon=False)


def _per_layer(axes, lines: list[tuple[str, list[dict], str, str]]) -> None:
    """One line with a band of one standard deviation per (label, layer rows, field, key); a row without a
    deviation, such as one read off the paper's figures, has no band."""
    styles = _styles([line[0] for line in lines])
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
        axes.plot(x, y, marker=MARKERS[index % len(MARKERS)], markersize=4, label=label, **styles[index])
    last = max(row["layer"] + 1 for _, layers, _, _ in lines for row in layers)
    axes.set_xticks(_count_ticks(last))
    axes.set_xlim(0.5, last + 0.5)
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)  # a margin of the data's own range cuts flat lines off
    axes.set_xlabel("layer")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _mark_rank_one(axes) -> None:
    axes.axhline(1, color=REFERENCE_GREY, linewidth=1, linestyle=":")
    axes.annotate(
        "rank 1 = lazy",
        (1, 1),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=REFERENCE_GREY,
        va="center",
        annotation_clip=False,
    )


def plot_max_rank(
    series: list[tuple[str, list[dict]]],
    path: Path,
    tau: str = MAIN,
    rehearsal: bool = False,
    title: str = "",
) -> None:
    """MaxRank per layer, one line per (label, rows of attention.jsonl): the paper's Figures 1, 2a, 8, 13 and
    15."""
    with canvas(path, 7, 4, rehearsal) as figure:
        axes = figure.add_subplot()
        _per_layer(axes, [(label, _layers(rows), "max_rank", tau) for label, rows in series])
        _mark_rank_one(axes)
        axes.set_ylabel(f"MaxRank (τ = {float(tau):.2f})")
        title = title or (series[0][0] if len(series) == 1 else "")
        axes.set_title("Approximate rank of attention per layer" + (f": {title}" if title else ""))
        _legend(axes, len(series))


def plot_tau_ablation(rows: list[dict], path: Path, label: str = "", rehearsal: bool = False) -> None:
    """MaxRank per layer of one model at every tau measured: the paper's Figure 10."""
    layers = _layers(rows)
    with canvas(path, 7, 4, rehearsal) as figure:
        axes = figure.add_subplot()
        taus = list(layers[0]["max_rank"])
        _per_layer(axes, [(f"τ = {float(tau):.2f}", layers, "max_rank", tau) for tau in taus])
        _mark_rank_one(axes)
        axes.set_ylabel("MaxRank")
        axes.set_title("Approximate rank at different thresholds τ" + (f": {label}" if label else ""))
        _legend(axes, len(taus))


def plot_avg_mass(
    series: list[tuple[str, list[dict]]],
    path: Path,
    eta: str = MAIN,
    rehearsal: bool = False,
    title: str = "",
) -> None:
    """AvgMass per layer, one line per (label, rows): the paper's Figures 14 to 16."""
    with canvas(path, 7, 4, rehearsal) as figure:
        axes = figure.add_subplot()
        _per_layer(axes, [(label, _layers(rows), "avg_mass", eta) for label, rows in series])
        axes.set_ylabel(f"AvgMass (columns holding {float(eta):.0%} of the mass)")
        title = title or (series[0][0] if len(series) == 1 else "")
        axes.set_title("Columns that hold the attention, per layer" + (f": {title}" if title else ""))
        _legend(axes, len(series))


def plot_heat_map(
    rows: list[dict], path: Path, label: str = "", tau: str = MAIN, rehearsal: bool = False
) -> None:
    """Mean rank of every head (down) in every layer (across), red near 1 and green above: the paper's Figures
    11, 21, 22.

    The colours also grow lighter with the rank, for colour-blind readers and grey prints; the scale is
    logarithmic."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    layers = _layers(rows)
    n_heads, n_layers = max(len(row["rank"][tau]) for row in layers), len(layers)
    grid = [
        [row["rank"][tau][head] if head < len(row["rank"][tau]) else float("nan") for row in layers]
        for head in range(n_heads)
    ]
    top = max(2.0, max(max(row["rank"][tau]) for row in layers))
    colors = LinearSegmentedColormap.from_list(
        "rank", ["#67000D", "#CB181D", "#F16913", "#FDBE85", "#D9F0A3", "#ADE8B0"]
    )
    cell = min(0.3, 7 / max(n_layers, n_heads))
    with canvas(path, max(4.0, cell * n_layers + 2), max(2.2, cell * n_heads + 1.2), rehearsal) as figure:
        axes = figure.add_subplot()
        image = axes.pcolormesh(
            [index + 0.5 for index in range(n_layers + 1)],
            [index + 0.5 for index in range(n_heads + 1)],
            grid,
            cmap=colors,
            norm=LogNorm(1, top),
            edgecolors="white",
            linewidth=0.3,
        )
        axes.invert_yaxis()
        for axis, count in ((axes.xaxis, n_layers), (axes.yaxis, n_heads)):
            axis.set_major_locator(FixedLocator(_count_ticks(count)))
        axes.set_xlabel("layer")
        axes.set_ylabel("head")
        axes.set_title("Mean rank of each head" + (f": {label}" if label else ""))
        bar = figure.colorbar(image, ax=axes, label=f"rank (τ = {float(tau):.2f})")
        bar.ax.yaxis.set_major_locator(
            FixedLocator([tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100) if tick <= top])
        )
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def plot_attention_maps(rows: list[dict], path: Path, label: str = "", rehearsal: bool = False) -> None:
    """The `map` rows side by side, with each head's rank: the paper's Figures 9 and 12, but causal (the paper
    shows maps without the mask, which is not what the model computes)."""
    maps = [row for row in rows if row["kind"] == "map"]
    if not maps:
        raise UserError("no attention maps to draw; give 'maps' to analyze")
    rank = {row["layer"]: row["rank"][MAIN] for row in _layers(rows)}
    columns = min(5, len(maps))
    lines = -(-len(maps) // columns)
    with canvas(path, 2.5 * columns + 0.9, 2.35 * lines + 0.85, rehearsal) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for axes, row in zip(grid.flat, maps, strict=False):
            axes.set_visible(True)
            image = axes.imshow(row["mean"], cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(
                f"layer {row['layer'] + 1}, head {row['head'] + 1}\nrank "
                f"{rank[row['layer']][row['head']]:.2f}",
                size=10,
            )
            axes.set_xticks([0, len(row["mean"]) - 1], ["1", str(len(row["mean"]))])
            axes.set_yticks([0, len(row["mean"]) - 1], ["1", str(len(row["mean"]))])
            axes.set_xlabel("key token", labelpad=-8)
        for axes in grid[:, 0]:
            axes.set_ylabel("query token", labelpad=-8)
        figure.colorbar(image, ax=grid.ravel().tolist(), label="attention", fraction=0.03)
        figure.suptitle("Attention maps" + (f": {label}" if label else ""))
        figure.supxlabel(
            f"causal; mean of {maps[0]['sequences']} sequences, first {len(maps[0]['mean'])} tokens", size=8
        )


def plot_attention(folder: str | Path) -> list[Path]:
    """All figures of one analyzed model, beside its attention.jsonl. Returns their paths."""
    run = RunDir(folder)
    rows = run.read_attention()
    if not rows:
        raise UserError(
            f"{run.attention} is missing or empty; run 'python -m inheritune analyze --model M --data D' "
            f"first"
        )
    header = rows[0]
    parts = Path(header["model"]).parts
    label = plot_label("/".join(parts[-2:]))
    rehearsal = header.get("rehearsal", False)
    paths = [run.path / name for name in names.PLOTS]
    plot_max_rank([(label, rows)], paths[0], rehearsal=rehearsal)
    plot_tau_ablation(rows, paths[1], label, rehearsal)
    plot_avg_mass([(label, rows)], paths[2], rehearsal=rehearsal)
    plot_heat_map(rows, paths[3], label, rehearsal=rehearsal)
    if not any(row["kind"] == "map" for row in rows):
        return paths[:-1]
    plot_attention_maps(rows, paths[4], label, rehearsal)
    return paths


# --- losses -------------------------------------------------------------------------------------------------


def trailing_mean(values: list[float], count: int) -> list[float]:
    """Each value averaged with the up to `count` - 1 before it."""
    return [
        sum(values[max(0, i + 1 - count) : i + 1]) / len(values[max(0, i + 1 - count) : i + 1])
        for i in range(len(values))
    ]


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
    """Validation loss over steps, one line per (label, rows of metrics.jsonl); rows without `val_loss` are
    passed over.

    The loss axis is logarithmic and begins where the steep start ends (a tenth of the longest run), as in the
    paper's Figures 5 and 6; `reference_loss` is a dotted line to reach. `smooth` draws trailing means of that
    many evaluations (10 in the paper's Figure 5c), without those that would hold the first evaluation, the
    start; rows that say `smoothed` are left as they are. `steps` are the first and the
    last drawn. Tokens are a second axis if
    all runs share one batch size. The legend gives each run's last loss, not smoothed."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    curves = []
    for label, rows in series:
        rows = sorted((row for row in rows if row.get("val_loss") is not None), key=lambda row: row["step"])
        if not rows:
            raise UserError(f"run '{label}' has no validation loss to draw; train it first, or leave it out")
        window = 1 if rows[-1].get("smoothed") else smooth
        ys = trailing_mean([row["val_loss"] for row in rows], window)
        begin = window if 1 < window < len(rows) else 0
        drawn = [
            i
            for i, row in enumerate(rows)
            if i >= begin and steps[0] <= row["step"] <= (steps[1] or row["step"])
        ]
        if drawn:  # a run in progress may not have come so far
            curves.append((label, [rows[i] for i in drawn], [ys[i] for i in drawn]))
    if not curves:
        raise UserError(f"no run has come to step {steps[0]} yet: nothing to draw in '{title}'")
    longest = max(rows[-1]["step"] for _, rows, _ in curves)
    late = [
        y for _, rows, ys in curves for row, y in zip(rows, ys, strict=True) if row["step"] >= 0.1 * longest
    ]
    low = min(late + ([reference_loss] if reference_loss else []))
    high = max(late + ([reference_loss] if reference_loss else []))
    with canvas(path, 9, 4.4, rehearsal) as figure:
        axes = figure.add_subplot()
        styles = _styles([label for label, _, _ in curves])
        for index, (label, rows, ys) in enumerate(curves):
            few = len(rows) <= 25
            axes.plot(
                [row["step"] for row in rows],
                ys,
                marker=MARKERS[index % len(MARKERS)] if few else None,
                markersize=3.5,
                label=f"{label} ({rows[-1]['val_loss']:.3f})",
                **styles[index],
            )
        if reference_loss is not None:
            axes.axhline(
                reference_loss, color=REFERENCE_GREY, linestyle=":", label=f"reference ({reference_loss:.3f})"
            )
        axes.set_yscale("log")
        axes.set_ylim(low * (low / high) ** 0.06, high * (high / low) ** 0.06 if high > low else high * 1.01)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:.4g}"))
        axes.set_xlim(steps[0], max(steps[0] + 1, longest) * 1.01)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda step, _: f"{step / 1000:g}K" if longest >= 10_000 and step else f"{step:g}")
        )
        axes.set_xlabel("step")
        axes.set_ylabel(
            f"{what} (nats per token)" + (f"\ntrailing mean of {smooth} evaluations" if smooth > 1 else "")
        )
        axes.grid(color="#DDDDDD", linewidth=0.6)
        batches = {
            round(rows[-1]["tokens"] / rows[-1]["step"])
            for _, rows, _ in curves
            if rows[-1].get("tokens") and rows[-1]["step"]
        }
        if len(batches) == 1:
            unit, name = next(
                (u, n)
                for u, n in ((1e9, "billion"), (1e6, "million"), (1, ""))
                if longest * min(batches) >= u
            )
            per_step = min(batches) / unit
            second = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
            second.set_xlabel(f"training tokens ({name})" if name else "training tokens")
            second.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_title(title)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            frameon=False,
            title="run (last loss)",
            alignment="left",
        )


def figure(item: str, seed: int = 0, rehearse: bool | None = None) -> list[Path]:
    """The verb: a figure of the paper; or loss curves of an experiment's finished runs, and rank and mass of
    those that were analyzed, drawn into the seed's folder. Returns the paths.

    Raises UserError if no run is finished."""
    if item in item_names():
        return paper_figure(item, seed, rehearse)
    experiment = load_experiment(item, rehearse)
    found = entries(experiment, seed)
    if not found:
        raise UserError(f"no run of {experiment.name} (seed {seed}) is finished: nothing to draw")
    folder = found[0].folder.path.parent
    losses = [(_title(entry), validation_curve(entry.folder)) for entry in found]
    plot_loss_curves(
        losses, folder / "loss.png", losses[0][1][-1]["val_loss"], rehearsal=experiment.rehearsal
    )
    paths = [folder / "loss.png"]
    analyzed = [
        (_title(entry), entry.folder.read_attention()) for entry in found if entry.folder.attention.is_file()
    ]
    if analyzed:
        plot_max_rank(analyzed, folder / "max_rank.png", rehearsal=experiment.rehearsal)
        plot_avg_mass(analyzed, folder / "avg_mass.png", rehearsal=experiment.rehearsal)
        paths += [folder / "max_rank.png", folder / "avg_mass.png"]
    return paths


def _title(entry) -> str:
    return plot_label(f"{entry.label}, {entry.results['layers']} layers")


def plot_cells(records: list[dict], path: Path, title: str, rehearsal: bool = False) -> None:
    """A panel per column of a table of the paper, a line per model: the paper's number hollow, ours filled,
    with their noise.

    `records` are the rows of the table's CSV file; a cell without either number is left empty."""
    columns, models = ([*dict.fromkeys(record[key] for record in records)] for key in ("column", "row"))
    with canvas(path, 3.2 + 3.4 * len(columns), 1.2 + 0.27 * len(models), rehearsal) as figure:
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            for side, noise, look in (
                (
                    "paper",
                    "paper_noise",
                    {"color": REFERENCE_GREY, "mfc": "white", "zorder": 4, "label": "paper"},
                ),
                ("ours", "noise", {"color": COLORS[0], "label": "ours"}),
            ):
                there = [
                    record
                    for record in records
                    if record["column"] == column and record[side] not in ("", None)
                ]
                axes.errorbar(
                    [float(record[side]) for record in there],
                    [models.index(record["row"]) for record in there],
                    xerr=[record[noise] or 0 for record in there],
                    fmt="o",
                    markersize=5,
                    linewidth=1.2,
                    **look,
                )
            axes.set_yticks(range(len(models)), models)
            axes.set_ylim(len(models) - 0.5, -0.5)
            axes.set_xlabel(column)
            axes.grid(color="#DDDDDD", linewidth=0.6)
            axes.set_axisbelow(True)
        figure.suptitle(title, size=11)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )


# --- figures of the paper -----------------------------------------------------------------------------------


def paper_figure(name: str, seed: int = 0, rehearse: bool | None = None) -> list[Path]:
    """Draw each panel of a figure of the paper that has something to show, ours and the paper's; print which
    rows are not run, the curve check and the footnotes. Returns the paths."""
    item = load_item(name)
    if not item.panels:
        raise UserError(f"{name} is a table; use: python -m inheritune table {name}")
    experiments, paths = load_experiments(item, rehearse), []
    small = any(experiment.rehearsal for experiment in experiments.values())
    print(f"{'REHEARSAL, not a result. ' if small else ''}{item.title}, seed {seed}")
    for letter, panel in zip("abcdefgh", item.panels, strict=False):
        path = paper_folder(small, seed) / f"{name}{f'_{letter}' if len(item.panels) > 1 else ''}.png"
        draw = _loss_panel if panel.kind == "loss" else _attention_panel
        if draw(panel, experiments, seed, path, small):
            paths.append(path)
    print("\n".join(item.notes))
    return paths


def _of(row: Row, experiments: dict[str, Experiment]) -> tuple[Experiment, str]:
    name, _, run = row.run.rpartition("/")
    return experiments[name], run


def _attention_panel(
    panel: Panel, experiments: dict[str, Experiment], seed: int, path: Path, small: bool
) -> bool:
    """Draw what `analyze` left of the panel's rows; False if there is nothing."""
    field, series = {"max_rank": "max_rank", "mass": "avg_mass"}.get(panel.kind), []
    for row in panel.rows:
        folder = model_folder(_of(row, experiments)[0], row, seed)
        rows = attention_of(folder, row).read_attention() if folder else []
        if rows and rows[0].get("rehearsal", False) != small:
            raise UserError(
                f"{attention_of(folder, row).attention} is a rehearsal's, not a result; delete it and "
                f"analyze the model again"
            )
        if panel.kind == "maps":  # only those that the paper shows
            wanted = shown_maps(_of(row, experiments)[0], row)
            rows = [r for r in rows if r["kind"] != "map" or (r["layer"], r["head"]) in wanted]
            rows = rows if any(r["kind"] == "map" for r in rows) else []
        print(f"{panel.title}, {row.label}: {'drawn' if rows else 'not run'}")
        series += [(row.label, rows)] if rows else []
        if field and row.file and not small:
            points = rows_like(row.file, row.match)
            layers = [
                {"kind": "layer", "layer": int(p["layer"]) - 1, field: {MAIN: float(p[row.value])}}
                for p in points
            ]
            series.append((row.label + PAPER, layers))
    if not series:
        return False
    if field:
        (plot_max_rank if panel.kind == "max_rank" else plot_avg_mass)(
            series, path, rehearsal=small, title=panel.title
        )
    else:
        plot = {"taus": plot_tau_ablation, "heat": plot_heat_map, "maps": plot_attention_maps}[panel.kind]
        plot(series[0][1], path, panel.title, rehearsal=small)
    return True


def _loss_panel(panel: Panel, experiments: dict[str, Experiment], seed: int, path: Path, small: bool) -> bool:
    """Draw the loss curves of the panel's rows, runs in progress too, and the paper's; False if there is
    nothing."""
    series = []
    for row in panel.rows:
        experiment, run = _of(row, experiments)
        folder = RunDir.of(experiment, run, seed)
        folder = folder.stage(row.stage) if row.stage else folder
        # names a record that is not the finished run's
        folder.read_results() if folder.results.is_file() else None
        rows = curve_rows(read_jsonl(folder.metrics), panel.loss)
        curve = {} if small else row_curve(row, panel.loss)
        read_off = bool(row.file) and not small  # from a figure, whose curves are smoothed
        if read_off:
            curve = {
                int(p["step"]): float(p[row.value]) for p in rows_like(row.file, row.match) if p[row.value]
            }
        print(f"{panel.title}, {row.label}: {curve_check(rows, curve)}")
        theirs = [{"step": step, "val_loss": loss, "smoothed": read_off} for step, loss in curve.items()]
        series += [
            (label, points) for label, points in ((row.label, rows), (row.label + PAPER, theirs)) if points
        ]
    if not series:
        return False
    what = "training loss" if panel.loss == "train_loss" else "validation loss"
    steps = (0, None) if small else (panel.from_step, panel.to_step)
    plot_loss_curves(
        series, path, title=panel.title, smooth=panel.smooth, rehearsal=small, steps=steps, what=what
    )
    return True


def curve_rows(rows: list[dict], loss: str) -> list[dict]:
    """The evaluations of a metrics.jsonl; for `train_loss` with the mean training loss since the one before
    in place of the validation loss."""
    if loss == "val_loss":
        return [row for row in rows if "val_loss" in row]
    found, since = [], []
    for row in rows:
        since += [row["loss"]] if "loss" in row else []
        if "val_loss" in row and since:
            found.append({**row, "val_loss": sum(since) / len(since)})
            since = []
    return found


def curve_check(rows: list[dict], curve: dict[int, float]) -> str:
    """Where a run, finished or not, stands beside the paper's log at the same step."""
    if not rows:
        return "not run"
    step, ours = rows[-1]["step"], rows[-1]["val_loss"]
    theirs = published_loss(curve, step)
    if theirs is None:
        return f"step {step:,}: {ours:.4f}"
    noise = last_ten(curve)[2]
    verdict = {"better": "below the curve", "worse": "above the curve"}.get(
        judge(ours - theirs, [noise], 0.0, higher_is_better=False), "on the curve"
    )
    return (
        f"step {step:,}: ours {ours:.4f}, the paper {theirs:.4f}, {ours - theirs:+.4f} (±{2 * noise:.4f}): "
        f"{verdict}"
    )
