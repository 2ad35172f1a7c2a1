"""`table ITEM`: results as a table, from the JSON of finished runs only.

ITEM is a table of the paper (items.py): each cell shows the paper's number, ours, the difference, the noise
of both and a verdict. ITEM can also be an experiment (experiment_table.py). The table is printed as Markdown,
and written as Markdown, CSV and LaTeX.
"""

from dataclasses import dataclass
from pathlib import Path

from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir
from inheritune.paper import claims
from inheritune.paper.experiment_table import (
    RESULT_COLUMNS,
    TableEntry,
    describe_outcome,
    list_entries,
    list_notes,
    make_rows,
)
from inheritune.paper.items import Item, Row, list_items, load_experiments, load_item, split_run
from inheritune.paper.measured import resolve_row
from inheritune.paper.prerequisites import list_missing, make_disk_check
from inheritune.paper.table_cells import Cell, highlight_version_1, make_cell, measure_cell, refuse_mixture
from inheritune.paper.table_files import locate_results, write_table
from inheritune.paper.training_costs import COSTS, make_cost_cells

NOTE = (
    "One seed. Intervals are 95% over the {n} fixed validation windows, differences are paired by window; "
    "they do not cover the choice of seeds. The loss before training is that of the start, on the windows of "
    "the curve ({n_curve} of them)."
)
PAPER_NOTE = (
    "A cell is paper ± noise / this repository ± noise: difference, verdict. Verdicts: matches (less than "
    "one unit of the paper's last printed digit), within noise (|difference| at most twice the root of "
    "the sum of both squared noises), better, worse, noise unknown (the paper does not give it, or the task "
    "does not), not run, as published (not run here). Where growth ended at fewer layers than the row has, "
    "the cell shows that stage and no verdict. The paper's "
    "noise is the standard deviation of its log's last ten evaluations, its standard error, or that of n "
    "questions. This repository's noise is the standard error over windows or questions. One seed: no "
    "noise covers the choice of seeds. Losses are compared with the log's last value, which the paper "
    "truncated (not rounded) to two digits."
)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper as it is printed, and what it was made of."""

    title: str
    headers: list[str]
    cells: list[list[str]]
    notes: list[str]
    records: list[dict]
    """A row per number: see `write_table`."""
    models: list[Row]
    """For each row of the item, the row whose model stands for it."""
    claimed: list[dict[str, claims.Claim]]
    """For each claim row, {key of the column: claim}."""
    rehearsal: bool


Drawing = tuple[list[dict], Path, str, bool]
"""The arguments of `plot_cells`: records, path, title, whether it is a rehearsal."""


def table(item: str, seed: int = 0, rehearse: bool | None = None, missing: bool = False) -> Drawing | None:
    """Print the table of a paper item or of an experiment, and write it as .md, .csv and .tex next to the
    runs.

    With `missing`, print instead what has to be run before, one `verb experiment run after options` a line
    (`after`: the lines to wait for). Returns what `plot_cells` takes if the table's numbers are to be drawn.

    Raises UserError for an unknown item, runs of different data in one column, and a rehearsal in a table of
    results."""
    if item in list_items():
        return _make_paper_table(item, seed, rehearse, missing)
    experiment = load_experiment(item, rehearse, list_items())
    if missing:
        raise UserError(
            f"table: --missing is for an item of the paper; what {experiment.name} lacks is listed by: "
            f"python -m inheritune status {experiment.given}"
        )
    found = list_entries(experiment, seed)
    if not found or found[0].label != experiment.paper[0].label:
        first = experiment.paper[0].run
        way = "evaluate" if experiment.run(first).init.external else "train"
        raise UserError(
            f"no table yet: run '{first}' of {experiment.name} (seed {seed}) is not finished; {way} it first"
        )
    title = f"{'REHEARSAL ' if experiment.rehearsal else ''}{experiment.name}, seed {seed}"
    write_experiment_table(RunDir.of(experiment, "table", seed).path, title, experiment, found)
    return None


def write_experiment_table(
    stem: Path, title: str, experiment: Experiment, found: list[TableEntry], *notes: str
) -> None:
    """Print the table of an experiment's finished rows and write it to `stem`, with `notes` below its own."""
    columns, cells = add_scores(experiment, found, make_rows(found))
    records = [dict(zip(columns, row, strict=True)) for row in cells]
    own = [make_note(experiment, found), *list_notes(found), describe_outcome(experiment, found)]
    write_table(stem, title, columns, cells, [*own, *notes], records)


def make_note(experiment: Experiment, found: list[TableEntry]) -> str:
    """Return the note below the table of an experiment: what its numbers cover."""
    n_windows = found[0].results["validation"]["n"]
    return NOTE.format(n=n_windows, n_curve=min(n_windows, experiment.train.eval_windows))


def add_scores(
    experiment: Experiment, found: list[TableEntry], cells: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return (columns, cells) with a column for each downstream task that was evaluated."""
    columns, name = list(RESULT_COLUMNS), f"the table of {experiment.name}"
    for key, task in experiment.evaluate.tasks.items():
        scores = [measure_cell(entry.results, f"tasks.{key}.{task.metrics[0]}") for entry in found]
        if any(score.measured for score in scores):
            columns.append(f"{key}, {task.metrics[0]}")
            labels = [entry.label for entry in found]
            refuse_mixture(columns[-1], name, list(zip(labels, scores, strict=True)))
            cells = [[*row, score.own(2)] for row, score in zip(cells, scores, strict=True)]
    return columns, cells


def _make_paper_table(name: str, seed: int, rehearse: bool | None, only_missing: bool) -> Drawing | None:
    """Print and write a table of the paper, or print what is missing for an item of the paper."""
    item = load_item(name)
    if any(row.toy for row in item.rows):
        from inheritune.paper import toy

        toy.make_table(name, item, seed, rehearse, only_missing)
        return None
    experiments = load_experiments(item, rehearse)
    if only_missing:
        for step in list_missing(item, experiments, make_disk_check(item, experiments, seed)):
            print(step.line())
        return None
    if not item.columns:
        raise UserError(f"{name} is a figure; use: python -m inheritune figure {name}")
    made = build_paper_table(name, item, experiments, seed)
    stem = locate_results(made.rehearsal, seed) / name
    write_table(stem, made.title, made.headers, made.cells, made.notes, made.records)
    return (made.records, stem.with_suffix(".png"), item.title, made.rehearsal) if item.drawn else None


def build_paper_table(name: str, item: Item, experiments: dict[str, Experiment], seed: int) -> PaperTable:
    """Return a table of the paper with this repository's results. Raises UserError as `table` does."""
    cells = _make_cells(name, item, experiments, seed)
    trained = any(
        column.metric not in (None, "parameters") or column.mean for column in item.columns.values()
    )
    spent = [make_cost_cells(row, experiments, seed) for row in item.rows]
    claimed = [_make_claims(item, row, experiments, seed) for row in claims.list_claims(item)]
    headers, shown = _lay_out(item, cells, claimed, spent if trained else None)
    models = [
        resolve_row(experiments[split_run(row)[0]], row, seed)[0] if row.run else row for row in item.rows
    ]
    records = _make_records(name, item, models, cells, spent) + _make_claim_records(name, item, claimed)
    small = any(experiment.rehearsal for experiment in experiments.values())
    title = f"{'REHEARSAL, not a result. ' if small else ''}{item.title}, seed {seed}"
    notes = [*([PAPER_NOTE] if trained else []), *([claims.NOTE] if claimed else []), *item.notes]
    return PaperTable(title, headers, shown, notes, records, models, claimed, small)


def _make_cells(
    name: str, item: Item, experiments: dict[str, Experiment], seed: int
) -> dict[tuple[int, str], Cell]:
    """Return {(index of the row, key of the column): cell} of a table of the paper."""
    cells = {
        (i, key): make_cell(item, row, column, experiments, seed)
        for i, row in enumerate(item.rows)
        for key, column in item.columns.items()
    }
    for key, column in item.columns.items():
        refuse_mixture(column.label, name, [(row.label, cells[i, key]) for i, row in enumerate(item.rows)])
    if item.highlight == "version_1":
        highlight_version_1(item, cells)
    return cells


def _make_claims(
    item: Item, row: Row, experiments: dict[str, Experiment], seed: int
) -> dict[str, claims.Claim]:
    """Return {key of the column: claim} of a row, without the columns that measure nothing."""
    made = {
        key: claims.make_claim(item, row, column, experiments, seed) for key, column in item.columns.items()
    }
    return {key: claim for key, claim in made.items() if claim}


def _lay_out(
    item: Item,
    cells: dict[tuple[int, str], Cell],
    claimed: list[dict[str, claims.Claim]],
    spent: list[list[str]] | None,
) -> tuple[list[str], list[list[str]]]:
    """Return (headers, printed rows) of a table of the paper; `spent` are the cost cells of each row.

    The claim rows follow those of the models."""
    has_logs = any(cell.log for cell in cells.values())
    headers = ["model", *(column.label for column in item.columns.values())]
    headers += ["paper's log: last; last ten"] if has_logs else []
    headers += COSTS if spent else ()
    shown = []
    for i, row in enumerate(item.rows):
        log = next((cells[i, key].log for key in item.columns if cells[i, key].log), None)
        words = [row.label, *(cells[i, key].text() for key in item.columns)]
        if has_logs:
            words.append(f"{log[0]:.4f}; {log[1]:.4f}±{log[2]:.4f}" if log else "")
        shown.append(words + (spent[i] if spent else []))
    for row, claim in zip(claims.list_claims(item), claimed, strict=True):
        words = [claims.PREFIX + row.label]
        words += [claim[key].text() if key in claim else "" for key in item.columns]
        if has_logs:
            words.append("; ".join(filter(None, (cell.text_of_last_ten() for cell in claim.values()))))
        shown.append(words + [""] * (len(headers) - len(words)))
    return headers, shown


def _make_records(
    name: str, item: Item, models: list[Row], cells: dict[tuple[int, str], Cell], spent: list[list[str]]
) -> list[dict]:
    """Return the rows of the CSV file of a table of the paper, one per cell.

    `models` are the rows whose models stand for the item's."""
    records = []
    for i, row in enumerate(models):
        where = {"item": name, "row": row.label, "run": row.run, "stage": row.stage}
        costs = dict(zip(COSTS, spent[i], strict=True))
        for key, column in item.columns.items():
            records.append({**where, "column": column.label, **cells[i, key].record(), **costs})
    return records


def _make_claim_records(name: str, item: Item, claimed: list[dict[str, claims.Claim]]) -> list[dict]:
    """Return the rows of the CSV file of the claim rows: a difference in place of each number."""
    records = []
    for row, claim in zip(claims.list_claims(item), claimed, strict=True):
        where = {"item": name, "row": claims.PREFIX + row.label, "run": row.run, "stage": row.stage}
        for key, cell in claim.items():
            label = item.columns[key].label
            records.append({**where, "column": label, **cell.record(), **dict.fromkeys(COSTS, "")})
    return records
