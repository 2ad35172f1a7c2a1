"""`figure ITEM`: a figure of the paper, or the plots of an experiment, from the JSON of runs only.

A figure of the paper shows this repository's runs and, drawn thin in the same colours, the paper's data. No
torch and no model is loaded.
"""

from collections.abc import Callable
from pathlib import Path

from inheritune.analysis.thresholds import MAIN_THRESHOLD
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.escape import escape_plot_label
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.paper.attention_plots import (
    Series,
    plot_attention_maps,
    plot_avg_mass,
    plot_heat_map,
    plot_max_rank,
    plot_tau_ablation,
)
from inheritune.paper.canvas import PAPER_SUFFIX
from inheritune.paper.experiment_table import TableEntry, find_last_loss, list_entries, list_notes
from inheritune.paper.items import Panel, Row, list_items, load_experiments, load_item, split_run
from inheritune.paper.loss_plots import plot_loss_curves
from inheritune.paper.measured import find_folder, list_maps, locate_attention, resolve_row
from inheritune.paper.published import find_rows, interpolate_loss, load_curve, summarize_last_ten
from inheritune.paper.table_cells import judge_difference
from inheritune.paper.table_files import locate_results
from inheritune.paper.training_costs import read_validation_curve

FIELDS = {"max_rank": "max_rank", "mass": "avg_mass"}
"""Field of attention.jsonl that a kind of panel shows as lines; several models share such a panel."""
LINE_PLOTS: dict[str, Callable[..., None]] = {"max_rank": plot_max_rank, "mass": plot_avg_mass}
MODEL_PLOTS: dict[str, Callable[..., None]] = {
    "taus": plot_tau_ablation,
    "heat": plot_heat_map,
    "maps": plot_attention_maps,
}


def figure(item: str, seed: int = 0, rehearse: bool | None = None) -> list[Path]:
    """Draw a figure of the paper, or the plots of an experiment's finished runs. Returns their paths.

    The plots of an experiment are its loss curves and, for the runs that were analyzed, rank and mass per
    layer. They are written into the seed's folder. Raises UserError if no run is finished."""
    if item in list_items():
        return _draw_paper_figure(item, seed, rehearse)
    experiment = load_experiment(item, rehearse, list_items())
    found = list_entries(experiment, seed)
    if not found:
        raise UserError(f"no run of {experiment.name} (seed {seed}) is finished: nothing to draw")
    folder, small = found[0].folder.path.parent, experiment.rehearsal
    paths = [folder / "loss.png"]
    for note in list_notes(found):
        print(note)
    trained = [entry for entry in found if entry.results.get("steps") is not None]
    if not trained:
        raise UserError(f"no run of {experiment.name} (seed {seed}) is trained yet: no curve to draw")
    losses = [(_make_label(entry), read_validation_curve(entry.folder)) for entry in trained]
    plot_loss_curves(losses, paths[0], find_last_loss(found[0]), rehearsal=small)
    analyzed = [
        (_make_label(entry), entry.folder.read_attention())
        for entry in found
        if entry.folder.attention.is_file()
    ]
    check_comparable(analyzed)
    if analyzed:
        paths += [folder / "max_rank.png", folder / "avg_mass.png"]
        plot_max_rank(analyzed, paths[1], rehearsal=small)
        plot_avg_mass(analyzed, paths[2], rehearsal=small)
    return paths


def check_comparable(series: Series, keys: tuple[str, ...] = ("data", "length", "sequences")) -> None:
    """Raise UserError if models of one plot were analyzed on different texts or lengths."""
    for label, rows in series[1:]:
        for key in keys:
            first, its = series[0][1][0].get(key), rows[0].get(key)
            if first != its:
                raise UserError(
                    f"'{label}' was analyzed with {key} {its}, '{series[0][0]}' with {first}: they cannot "
                    f"share a "
                    f"plot; analyze one of them again"
                )


def _make_label(entry: TableEntry) -> str:
    return escape_plot_label(f"{entry.label}, {entry.results['layers']} layers")


def _draw_paper_figure(name: str, seed: int, rehearse: bool | None) -> list[Path]:
    """Draw each panel of a figure of the paper that has something to show. Returns the paths.

    Prints which rows are not run, how the curves compare with the paper's, and the footnotes."""
    item = load_item(name)
    if not item.panels:
        raise UserError(f"{name} is a table; use: python -m inheritune table {name}")
    experiments, paths = load_experiments(item, rehearse), []
    small = any(experiment.rehearsal for experiment in experiments.values())
    print(f"{'REHEARSAL, not a result. ' if small else ''}{item.title}, seed {seed}")
    for letter, panel in zip("abcdefgh", item.panels, strict=False):
        path = locate_results(small, seed) / f"{name}{f'_{letter}' if len(item.panels) > 1 else ''}.png"
        draw = _draw_loss_panel if panel.kind == "loss" else _draw_attention_panel
        if draw(panel, experiments, seed, path, small):
            paths.append(path)
    print("\n".join(item.notes))
    return paths


def _draw_attention_panel(
    panel: Panel, experiments: dict[str, Experiment], seed: int, path: Path, small: bool
) -> bool:
    """Draw what `analyze` measured of the panel's rows; return False if there is nothing."""
    series, states = collect_attention(panel, experiments, seed, small)
    for label, state in states:
        print(f"{panel.title}, {label}: {state}")
    if not series:
        return False
    if panel.kind in FIELDS:
        LINE_PLOTS[panel.kind](series, path, rehearsal=small, title=panel.title)
    else:
        MODEL_PLOTS[panel.kind](series[0][1], path, panel.title, rehearsal=small)
    return True


def collect_attention(
    panel: Panel, experiments: dict[str, Experiment], seed: int, small: bool
) -> tuple[Series, list[tuple[str, str]]]:
    """Return (the lines or models to draw, the paper's among them; the label and state of each row)."""
    field = FIELDS.get(panel.kind)
    series: Series = []
    measured: Series = []
    states = []
    for row in panel.rows:
        shown, ended = resolve_row(experiments[split_run(row)[0]], row, seed)
        rows = _read_attention(panel, shown, experiments[split_run(row)[0]], seed, small)
        states.append((row.label, ", ".join(filter(None, ("drawn", ended))) if rows else "not run"))
        if rows:
            series.append((_add_end(row.label, ended), rows))
            measured.append(series[-1])
        if field and row.file and not small:
            series.append((row.label + PAPER_SUFFIX, _read_published_layers(row, field)))
    check_comparable(measured, ("length", "sequences"))
    return series, states


def _add_end(label: str, ended: str) -> str:
    """Return the label of a line, with the depth at which its growth ended early."""
    return f"{label} ({ended})" if ended else label


def _read_attention(panel: Panel, row: Row, experiment: Experiment, seed: int, small: bool) -> list[dict]:
    """Return the rows of attention.jsonl that a row of a panel shows; [] if it is not measured.

    Raises UserError if a rehearsal was measured in the folder of a real run, or the other way round."""
    folder = find_folder(experiment, row, seed)
    if folder is None:
        return []
    measured = locate_attention(folder, row)
    rows = measured.read_attention()
    if rows and rows[0].get("rehearsal", False) != small:
        raise UserError(
            f"{measured.attention} is a rehearsal's, not a result; delete it and analyze the model again"
        )
    if panel.kind == "maps":  # only those that the paper shows
        wanted = list_maps(experiment, row)
        rows = [r for r in rows if r["kind"] != "map" or (r["layer"], r["head"]) in wanted]
        rows = rows if any(r["kind"] == "map" for r in rows) else []
    return rows


def _read_published_layers(row: Row, field: str) -> list[dict]:
    """Return the paper's numbers per layer as layer rows of attention.jsonl."""
    points = find_rows(row.file or "", row.match)
    return [
        {"kind": "layer", "layer": int(p["layer"]) - 1, field: {MAIN_THRESHOLD: float(p[row.value or ""])}}
        for p in points
    ]


def _draw_loss_panel(
    panel: Panel, experiments: dict[str, Experiment], seed: int, path: Path, small: bool
) -> bool:
    """Draw the loss curves of the panel's rows, also of runs in progress, and the paper's curves.

    Returns False if there is nothing to draw."""
    series, states = collect_losses(panel, experiments, seed, small)
    for label, state in states:
        print(f"{panel.title}, {label}: {state}")
    if not series:
        return False
    what = name_loss(panel)
    steps = (0, None) if small else (panel.from_step, panel.to_step)
    plot_loss_curves(
        series, path, title=panel.title, smooth=panel.smooth, rehearsal=small, steps=steps, what=what
    )
    return True


def name_loss(panel: Panel) -> str:
    """Return which loss a panel shows."""
    return "training loss" if panel.loss == "train_loss" else "validation loss"


def collect_losses(
    panel: Panel, experiments: dict[str, Experiment], seed: int, small: bool
) -> tuple[Series, list[tuple[str, str]]]:
    """Return (the curves to draw, the paper's among them; the label and state of each row)."""
    series: Series = []
    states = []
    for row in panel.rows:
        shown, ended = resolve_row(experiments[split_run(row)[0]], row, seed, started=True)
        rows = _read_curve(panel, shown, experiments, seed)
        from_figure = bool(row.file) and not small  # the curves of a figure are smoothed
        curve = {} if small else _read_published_curve(panel, row)
        states.append((_add_end(row.label, ended), compare_curves(rows, curve)))
        theirs = [{"step": step, "val_loss": loss, "smoothed": from_figure} for step, loss in curve.items()]
        lines = ((_add_end(row.label, ended), rows), (row.label + PAPER_SUFFIX, theirs))
        series += [(label, points) for label, points in lines if points]
    return series, states


def _read_curve(panel: Panel, row: Row, experiments: dict[str, Experiment], seed: int) -> list[dict]:
    """Return the evaluations of a row's run, finished or not."""
    name, run = split_run(row)
    folder = RunDir.of(experiments[name], run, seed)
    folder = folder.stage(row.stage) if row.stage else folder
    if folder.results.is_file():
        folder.read_results()  # raises UserError if the record is not that of the finished run
    return select_evaluations(read_jsonl(folder.metrics), panel.loss)


def _read_published_curve(panel: Panel, row: Row) -> dict[int, float]:
    """Return {step: loss} of the paper for a row: read off a figure (`file`), or its log."""
    if not row.file:
        return load_curve(row, panel.loss)
    column = row.value or ""
    return {int(p["step"]): float(p[column]) for p in find_rows(row.file, row.match) if p[column]}


def select_evaluations(rows: list[dict], loss: str) -> list[dict]:
    """Return the evaluations of a metrics.jsonl.

    For `train_loss`, the validation loss is replaced by the mean training loss since the previous
    evaluation."""
    if loss == "val_loss":
        return [row for row in rows if "val_loss" in row]
    found: list[dict] = []
    since: list[float] = []
    for row in rows:
        if "loss" in row:
            since.append(row["loss"])
        if "val_loss" in row and since:
            found.append({**row, "val_loss": sum(since) / len(since)})
            since = []
    return found


def compare_curves(rows: list[dict], curve: dict[int, float]) -> str:
    """Return in words where a run, finished or not, is relative to the paper's log at the same step."""
    if not rows:
        return "not run"
    step, ours = rows[-1]["step"], rows[-1]["val_loss"]
    theirs = interpolate_loss(curve, step)
    if theirs is None:
        return f"step {step:,}: {ours:.4f}"
    noise = summarize_last_ten(curve)[2]
    verdict = {"better": "below the curve", "worse": "above the curve"}.get(
        judge_difference(ours - theirs, [noise], 0.0, higher_is_better=False), "on the curve"
    )
    return (
        f"step {step:,}: this repository {ours:.4f}, the paper {theirs:.4f}, {ours - theirs:+.4f} "
        f"(±{2 * noise:.4f}): {verdict}"
    )
