"""The report of an experiment: its verdict and table, curves, growth, attention, and what ran where."""

from inheritune.analysis.thresholds import MAIN_THRESHOLD
from inheritune.config.experiment import Experiment
from inheritune.errors import UserError
from inheritune.files.escape import unescape_markdown
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.paper.attention_lines import select_layers
from inheritune.paper.attention_plots import Series
from inheritune.paper.experiment_table import (
    TableEntry,
    describe_outcome,
    find_last_loss,
    list_entries,
    list_notes,
    make_row,
)
from inheritune.paper.figures import check_comparable
from inheritune.paper.report_charts import (
    Chart,
    Curve,
    draw_costs,
    draw_head_ranks,
    draw_layers,
    draw_losses,
    draw_maps,
    split_panels,
    thin_out,
)
from inheritune.paper.report_page import Grid, Page, Section, make_cell
from inheritune.paper.report_runs import (
    describe_machines,
    describe_progress,
    list_files,
    list_folders,
    list_stages,
)
from inheritune.paper.tables import add_scores, make_note

FILES = {"model": "path", "layers": "experiment", "steps": "metrics", "tokens/s": "metrics"}
"""Column -> what of a run's folder its number was read from; of the others results.json."""
CURVE_COLUMNS = ("steps to the reference's loss",)
"""Columns that are read off the curve."""


def build_experiment_page(experiment: Experiment, seed: int) -> Page:
    """Return the report of an experiment and a seed, from what is finished or has begun.

    Raises UserError if nothing has begun, or as `list_entries` does."""
    found = list_entries(experiment, seed)
    begun = [
        place for name in experiment.runs for place in list_folders(experiment, name, seed)
    ]  # (name, folder)
    if not found and not begun:
        raise UserError(
            f"no run of {experiment.name} (seed {seed}) has begun: nothing to report; train one first"
        )
    missing = [row for row in experiment.paper if not any(e.results["run"] == row.run for e in found)]
    sections = [
        _make_table(experiment, seed, found, missing),
        _make_curves(experiment, seed, found),
        *_make_growth(experiment, seed),
        *_make_attention(found),
        Section(
            "What ran where",
            **describe_machines(begun),
        ),
    ]
    folder = RunDir.of(experiment, "", seed).path
    files = list_files(folder, "table")
    if files:
        sections.append(Section("Tables and plots", links=files))
    return Page(
        title=f"{experiment.name}, seed {seed}",
        about=experiment.about,
        verdict=_make_verdict(experiment, found),
        sections=[section for section in sections if not section.is_empty()],
        rehearsal=experiment.rehearsal,
        open_points=_list_open_points(experiment, seed, found, missing),
    )


def _has_reference(experiment: Experiment, found: list[TableEntry]) -> bool:
    return bool(found) and found[0].results["run"] == experiment.paper[0].run


def _make_verdict(experiment: Experiment, found: list[TableEntry]) -> str:
    """Return the verdict in a sentence."""
    if not _has_reference(experiment, found):
        return f"No verdict yet: the reference, run '{experiment.paper[0].run}', is not finished."
    return unescape_markdown(describe_outcome(experiment, found))


def _list_open_points(experiment: Experiment, seed: int, found: list[TableEntry], missing: list) -> list[str]:
    """Return what the results do not say: what is not run, growth that ended early, unknown noise."""
    points = [f"{row.label}: {describe_progress(experiment, row.run, seed)}." for row in missing]
    for entry in found:
        run = experiment.run(entry.results["run"])
        if experiment.reference_of(run) and not entry.results.get("difference"):
            points.append(f"{entry.label}: not compared with the reference; noise unknown.")
    for name, run in experiment.runs.items():
        if run.grow and RunDir.of(experiment, name, seed).is_done():
            stages, _ = list_stages(experiment, name, seed)
            skipped = [stage.title.rstrip(".").lower() for stage in stages if stage.state == "missing"]
            if skipped:
                points.append(f"Growth of {name} ended early; not run: {'; '.join(skipped)}.")
    return points + ([make_note(experiment, found)] if found else []) + list_notes(found)


def _make_table(experiment: Experiment, seed: int, found: list[TableEntry], missing: list) -> Section:
    """Return the section of the table, with a row for each run that is not finished."""
    reference = experiment.paper[0].run
    target = find_last_loss(found[0]) if _has_reference(experiment, found) else None
    columns, cells = add_scores(experiment, found, [make_row(entry, target, reference) for entry in found])
    rows = [
        [
            make_cell(words, _find_file(entry.folder, column))
            for column, words in zip(columns, row, strict=True)
        ]
        for entry, row in zip(found, cells, strict=True)
    ]
    order = {row.run: place for place, row in enumerate(experiment.paper)}
    placed = [(order[entry.results["run"]], row, False) for entry, row in zip(found, rows, strict=True)]
    for row in missing:
        state = describe_progress(experiment, row.run, seed)
        empty = [make_cell("")] * (len(columns) - 2)
        placed.append((order[row.run], [make_cell(row.label), make_cell(state), *empty], True))
    placed.sort(key=lambda one: one[0])
    quiet = tuple(index for index, (_, _, is_quiet) in enumerate(placed) if is_quiet)
    return Section("Results", grid=Grid(columns, [row for _, row, _ in placed], quiet))


def _find_file(folder: RunDir, column: str):
    """Return the file that the number in a column was read from."""
    if column in CURVE_COLUMNS:
        return folder.metrics
    return getattr(folder, FILES.get(column, "results"))


def _list_curves(experiment: Experiment, seed: int) -> list[tuple[str, RunDir]]:
    """Return (label, folder) of every run of the table that has begun, stage by stage."""
    curves = []
    for row in experiment.paper:
        for name, folder in list_folders(experiment, row.run, seed):
            curves.append((row.label + name.removeprefix(row.run), folder))
    return curves


def _make_curves(experiment: Experiment, seed: int, found: list[TableEntry]) -> Section:
    """Return the section of loss curves, those of runs in progress too."""
    reference = find_last_loss(found[0]) if _has_reference(experiment, found) else None
    validation, training = [], []
    for label, folder in _list_curves(experiment, seed):
        rows = read_jsonl(folder.metrics)
        points = [row for row in rows if row.get("val_loss") is not None]
        if points:
            losses = [row["val_loss"] for row in points]
            steps = [row["step"] for row in points]
            validation.append(Curve(label, steps, losses, end=f"{losses[-1]:.4f}"))
        mean = thin_out(rows, "loss")
        if mean.x:
            training.append(Curve(label, mean.x, mean.y))
    charts: list[Chart] = []
    if validation:
        charts += draw_losses(
            "Validation loss",
            validation,
            reference,
            "nats per token",
            "In brackets: the loss at the end of the line.",
        )
    if training:
        note = "Each point is the mean of the logged steps before it, at most 200 points a line."
        charts += draw_losses("Training loss", training, None, "nats per token", note)
    return Section("Losses", charts=charts)


def _make_growth(experiment: Experiment, seed: int) -> list[Section]:
    """Return a section for each grown run that has begun: its stages, and the loss through all of them."""
    sections = []
    for name, run in experiment.runs.items():
        folders = list_folders(experiment, name, seed)
        if not run.grow or not folders:
            continue
        label = next((row.label for row in experiment.paper if row.run == name), name)
        stages, end = list_stages(experiment, name, seed)
        before, curves = 0, []
        for title, folder in folders:
            points = [row for row in read_jsonl(folder.metrics) if row.get("val_loss") is not None]
            if points:
                x = [before + row["step"] for row in points]
                curves.append(Curve(title.partition(", ")[2], x, [row["val_loss"] for row in points]))
                before = x[-1]
        reference = experiment.reference_of(run)
        loss = _read_reference_loss(experiment, reference, seed) if reference else None
        charts = []
        if len(curves) > 1:
            charts = draw_losses(
                "Loss through the stages", curves, loss, "nats per token", unit="step, all stages counted"
            )
        sections.append(Section(f"Growth: {label}", words=[end], stages=stages, charts=charts))
    return sections


def _read_reference_loss(experiment: Experiment, run: str, seed: int) -> float | None:
    points = [row for row in read_jsonl(RunDir.of(experiment, run, seed).metrics) if "val_loss" in row]
    return points[-1]["val_loss"] if points else None


def _make_attention(found: list[TableEntry]) -> list[Section]:
    """Return the sections of what `analyze` measured: lines per layer of all models, and more of each."""
    analyzed: Series = [
        (f"{entry.label}, {entry.results['layers']} layers", entry.folder.read_attention())
        for entry in found
        if entry.folder.attention.is_file()
    ]
    if not analyzed:
        return []
    notes = []
    try:
        check_comparable(analyzed)
        groups = [analyzed]
    except UserError as error:
        notes, groups = [f"{str(error)}."], [[one] for one in analyzed]
    charts = [chart for group in groups for chart in draw_measures(group)]
    sections = [Section("Rank and mass of attention per layer", charts=charts, notes=notes)]
    sections += [make_model_section(label, rows) for label, rows in analyzed]
    return sections


def draw_measures(series: Series) -> list[Chart]:
    """Return the charts of MaxRank and AvgMass per layer, with a line per model."""
    charts = []
    for field, name, note in (
        ("max_rank", "MaxRank", "The largest mean rank of a layer's heads; 1 is a lazy layer."),
        ("avg_mass", "AvgMass", "Columns that hold 90% of the attention; the mean over heads."),
    ):
        known = [(label, rows) for label, rows in series if field in select_layers(rows)[0]]
        curves = [make_layer_curve(label, rows, field) for label, rows in known]
        for panel in split_panels(curves) if curves else []:
            charts.append(draw_layers(f"{name} per layer", panel, name, note))
    return charts


def make_layer_curve(label: str, rows: list[dict], field: str) -> Curve:
    """Return the line of a measure per layer, with its deviation over sequences where there is one."""
    layers = select_layers(rows)
    y = [row[field][MAIN_THRESHOLD] for row in layers]
    std = [row.get(f"{field}_std", {}).get(MAIN_THRESHOLD) for row in layers]
    x = [row["layer"] + 1 for row in layers]
    if any(one is None for one in std):  # read off the paper's figures
        return Curve(label, x, y)
    low, high = ([value + side * one for value, one in zip(y, std, strict=True)] for side in (-1, 1))
    return Curve(label, x, y, [max(1.0, value) for value in low], high)


def make_model_section(label: str, rows: list[dict]) -> Section:
    """Return the folded section of one analyzed model: costs, ranks of heads, attention maps."""
    known = [cost for row in select_layers(rows) for cost in row.get("cost", {}).values() if cost is not None]
    charts = [draw_costs(rows)] if known else []
    charts += [draw_head_ranks(rows), *draw_maps(rows)]
    notes = [] if known else ["The cost of layers was not measured (analyze without --ranks-only does)."]
    maps = [row for row in rows if row["kind"] == "map"]
    if maps:
        n_tokens = len(maps[0]["mean"])
        notes.append(
            f"Attention maps: causal, mean of {maps[0]['sequences']} sequences, the first {n_tokens} tokens, "
            f"on a logarithmic scale."
        )
    else:
        notes.append("No attention map was kept (analyze --maps layer:head).")
    if suggestion := rows[-1].get("reason"):
        notes.insert(0, suggestion[:1].upper() + suggestion[1:] + ".")
    return Section(f"Attention of {label}", charts=charts, notes=notes)
