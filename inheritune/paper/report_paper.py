"""The report of a table or figure of the paper: its claims, its cells, its panels, and what ran where."""

import re
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.files.escape import NUMBER, unescape_markdown
from inheritune.files.json_files import read_json
from inheritune.paper import claims, toy
from inheritune.paper.figures import FIELDS, collect_attention, collect_losses, name_loss
from inheritune.paper.items import PAPER_FOLDER, Item, Panel, Row, load_experiments, load_item, split_run
from inheritune.paper.loss_plots import select_curve
from inheritune.paper.measured import find_folder, resolve_row
from inheritune.paper.prerequisites import list_missing, make_disk_check
from inheritune.paper.published import LOGS
from inheritune.paper.report_charts import Chart, Curve, draw_cells, draw_layers, draw_losses
from inheritune.paper.report_experiment import make_layer_curve, make_model_section
from inheritune.paper.report_page import Cell, Grid, Page, Piece, Section, make_cell
from inheritune.paper.report_runs import describe_machines, list_folders
from inheritune.paper.table_cells import NOISE_UNKNOWN, NOT_RUN
from inheritune.paper.tables import PaperTable, build_paper_table

NAMES = {"max_rank": "MaxRank", "mass": "AvgMass"}
"""Kind of panel -> name of its measure."""


def build_paper_page(name: str, seed: int, rehearse: bool | None) -> Page:
    """Return the report of a table or figure of the paper. Raises UserError as `table` and `figure` do."""
    item = load_item(name)
    if any(row.toy for row in item.rows):
        return _build_toy_page(item, seed, rehearse)
    experiments = load_experiments(item, rehearse)
    small = any(experiment.rehearsal for experiment in experiments.values())
    missing = list_missing(item, experiments, make_disk_check(item, experiments, seed))
    points = []
    if missing:
        command = f"python -m inheritune table {name} --missing"
        points.append(f"For all of it, {len(missing)} steps are missing; {command} lists them.")
    if item.columns:
        made = build_paper_table(name, item, experiments, seed)
        sections, verdict = _make_table(item, made, experiments, seed), _make_verdict(item, made)
        points += _list_open_cells(made)
    else:
        sections, states = _make_panels(item, experiments, seed, small)
        not_run = [words for words in states if words.endswith(NOT_RUN)]
        verdict = f"{len(states) - len(not_run)} of {len(states)} lines of this figure are drawn from runs."
        points += [f"{words}." for words in not_run]
        sections.append(Section("Where each line stands", words=[f"{words}." for words in states]))
    begun = [
        (f"{experiment.name}: {place}", folder)
        for experiment, run in _list_runs(item, experiments)
        for place, folder in list_folders(experiment, run, seed)
    ]
    if begun:
        sections.append(Section("What ran where", **describe_machines(begun)))
    notes = [unescape_markdown(note) for note in (made.notes if item.columns else item.notes)]
    sections.append(Section("How to read it", words=notes))
    title = f"{item.title}, seed {seed}"
    return Page(title, "The paper's numbers and those of this repository.", verdict, sections, small, points)


def _build_toy_page(item: Item, seed: int, rehearse: bool | None) -> Page:
    """Return the report of the authors' toy, by both definitions of rank."""
    small = toy.read_rehearsal(rehearse)
    path = toy.locate_toy(seed, small)
    headers, words = toy.make_rows(item, path)
    rows = [[make_cell(row[0]), *(make_cell(word, path) for word in row[1:])] for row in words]
    sections = [Section("Ranks", grid=Grid(headers, rows), notes=[unescape_markdown(n) for n in item.notes])]
    points, verdict = [f"Not run: python -m inheritune.paper.toy {seed or ''}".strip()], "The toy is not run."
    if path.is_file():
        curve = read_json(path)["trained_layer"]
        steps = [point["step"] for point in curve]
        lines = [Curve(name, steps, [point[key] for point in curve]) for key, name in toy.DEFINITIONS.items()]
        sections.append(
            Section("Over training", charts=draw_losses("Rank", lines, None, "rank (mean of heads)"))
        )
        ends = [f"{name} {curve[-1][key]:.2f}" for key, name in toy.DEFINITIONS.items()]
        points, verdict = [], f"At the end of the training: {'; '.join(ends)}."
    return Page(
        f"{item.title}, seed {seed}", "The authors' toy, computed here.", verdict, sections, small, points
    )


def _list_runs(item: Item, experiments: dict[str, Experiment]) -> list[tuple[Experiment, str]]:
    """Return each run of the item's rows once, those of fixed depth too."""
    found: dict[tuple[str, str], None] = {}
    for row in item.models():
        if row.run:
            experiment, run = split_run(row)
            found |= {(experiment, run): None} | ({(experiment, row.fixed): None} if row.fixed else {})
    return [(experiments[experiment], run) for experiment, run in found]


def _make_verdict(item: Item, made: PaperTable) -> str:
    """Return the verdict in a sentence: that of each claim by this repository's runs."""
    words = []
    for row, of_row in zip(claims.list_claims(item), made.claimed, strict=True):
        for claim in of_row.values():
            if claim.ours:
                words.append(f"{row.label}: {claim.describe(claim.ours)}")
    if words:
        return "The claim, by this repository's runs. " + "; ".join(words) + "."
    judged = sum(record["ours"] not in ("", None) for record in made.records)
    if made.claimed:
        return "The claim is not judged here: its runs, or those of the full model, are not run."
    return f"{judged} of {len(made.records)} numbers of this table are from this repository's runs."


def _list_open_cells(made: PaperTable) -> list[str]:
    """Return sentences on the cells without a number or a noise."""
    points = []
    not_run = dict.fromkeys(record["row"] for record in made.records if record["state"] == NOT_RUN)
    if not_run:
        points.append(f"Not run: {'; '.join(not_run)}.")
    unknown = dict.fromkeys(
        f"{record['row']} ({record['column']})" for record in made.records if record["state"] == NOISE_UNKNOWN
    )
    if unknown:
        points.append(f"Noise unknown, so no verdict: {'; '.join(unknown)}.")
    ended = dict.fromkeys(
        f"{record['row']}: {record['state']}" for record in made.records if "growth ended" in record["state"]
    )
    return points + [f"{words}." for words in ended]


def _make_table(item: Item, made: PaperTable, experiments: dict[str, Experiment], seed: int) -> list[Section]:
    """Return the section of the table with its charts. Numbers lead to the paper's CSV file and to
    results.json."""
    shown = [resolve_row(experiments[split_run(row)[0]], row, seed)[0] for row in claims.list_claims(item)]
    rows = []
    for words, row in zip(made.cells, [*made.models, *shown], strict=True):
        files = _find_files(item, row, experiments, seed)
        cells = []
        for header, text in zip(made.headers[1:], words[1:], strict=True):
            is_log = header.startswith("paper's log")
            cells.append(make_cell(text, PAPER_FOLDER / LOGS) if is_log else _split_cell(text, *files))
        rows.append([make_cell(words[0]), *cells])
    charts = []
    for column in dict.fromkeys(record["column"] for record in made.records):
        records = [
            r for r in made.records if r["column"] == column and not r["row"].startswith(claims.PREFIX)
        ]
        sides = {
            name: [(r["row"], float(r[key]), r[noise]) for r in records if _is_number(r[key])]
            for name, key, noise in (("paper", "paper", "paper_noise"), ("this repository", "ours", "noise"))
        }
        if any(sides.values()):
            charts.append(draw_cells(column, column, sides))
    quiet = tuple(i for i, words in enumerate(made.cells) if any(NOT_RUN in word for word in words))
    return [
        Section("Paper / this repository", grid=Grid(made.headers, rows, quiet)),
        Section("Charts", charts=charts),
    ]


def _is_number(value: str | float | None) -> bool:
    """Return whether a cell holds a number: the paper also has 1.5B, and nothing."""
    return re.fullmatch(NUMBER, str(value)) is not None


def _find_files(
    item: Item, row: Row, experiments: dict[str, Experiment], seed: int
) -> tuple[Path | None, Path | None]:
    """Return (the paper's file, results.json) of a row."""
    file = row.file or item.file
    theirs = PAPER_FOLDER / file if file else None
    if not row.run:
        return theirs, None
    folder = find_folder(experiments[split_run(row)[0]], row, seed)
    return theirs, folder.results if folder else None


def _split_cell(text: str, theirs: Path | None, ours: Path | None) -> Cell:
    """Return a cell "paper / ours" as two pieces, each with the file that it comes from."""
    paper, slash, own = text.replace("**", "").partition(" / ")
    return (
        (Piece(paper, theirs), Piece(slash), Piece(own, ours)) if slash else (Piece(paper, ours or theirs),)
    )


def _make_panels(
    item: Item, experiments: dict[str, Experiment], seed: int, small: bool
) -> tuple[list[Section], list[str]]:
    """Return (a section for each panel of a figure that has something to show, the state of each line)."""
    sections, states = [], []
    for panel in item.panels:
        collect = collect_losses if panel.kind == "loss" else collect_attention
        series, of_panel = collect(panel, experiments, seed, small)
        states += [f"{panel.title}, {label}: {state}" for label, state in of_panel]
        if not series:
            continue
        if panel.kind == "loss":
            sections.append(Section(panel.title, charts=_draw_losses(panel, series, small)))
        elif panel.kind in FIELDS:
            curves = [make_layer_curve(label, rows, FIELDS[panel.kind]) for label, rows in series]
            name = NAMES[panel.kind]
            sections.append(Section(panel.title, charts=[draw_layers(f"{name} per layer", curves, name)]))
        else:
            sections += [make_model_section(label, rows) for label, rows in series]
    return sections, states


def _draw_losses(panel: Panel, series: list[tuple[str, list[dict]]], small: bool) -> list[Chart]:
    """Return the charts of a loss panel; the paper's curves are thin, in the colour of their model."""
    steps = (0, None) if small else (panel.from_step, panel.to_step)
    curves = []
    for label, rows in series:
        curve = select_curve(label, rows, panel.smooth, steps)
        if curve:
            points = [row["step"] for row in curve.rows]
            curves.append(Curve(label, points, curve.losses, end=f"{curve.losses[-1]:.4f}"))
    what = name_loss(panel)
    return draw_losses(what.capitalize(), curves, None, f"{what}, nats per token") if curves else []
