"""`table ITEM`: results as a table, from the JSON of finished runs only.

ITEM is a table of the paper (paper.py): each cell shows the paper's number, ours, the difference, the noise
of both and a verdict. Or an experiment: its `paper` section names the rows, the first of which is the
reference; a grown run gives one row per stage. Printed as Markdown, and written as Markdown, CSV and LaTeX.
"""

import csv
import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from inheritune.config import names
from inheritune.config.experiment import Experiment, Run, load_experiment
from inheritune.errors import UserError
from inheritune.files.escape import csv_cell, latex, markdown
from inheritune.files.rundir import RunDir, read_jsonl, root, write_text
from inheritune.paper.items import (
    Column,
    Item,
    Row,
    item_names,
    last_ten,
    layers_of_row,
    load_experiments,
    load_item,
    missing,
    model_folder,
    on_disk,
    published,
    row_curve,
    score,
)

COLUMNS = (
    "model",
    "layers",
    "parameters",
    "steps",
    "validation loss (95% interval)",
    "difference to the reference (95% interval)",
    "steps to the reference's loss",
    "tokens/s",
    "training FLOPs",
)


@dataclass(frozen=True)
class Entry:
    """One finished run, or one stage of a grown run."""

    label: str
    folder: RunDir
    results: dict
    flops: float
    """Training FLOPs, those of the stages before it counted (a person pays for them)."""


def entries(experiment: Experiment, seed: int = 0) -> list[Entry]:
    """The table's rows in order; runs that are not finished are left out.

    Raises UserError if the experiment defines no rows or its rows were measured on different data."""
    if not experiment.paper:
        raise UserError(f"experiment '{experiment.name}' has no 'paper' section that names table rows")
    found = []
    for row in experiment.paper:
        run, root = experiment.run(row.run), RunDir.of(experiment, row.run, seed)
        if not run.grow:
            if root.is_done():
                results = root.read_results()
                found.append(Entry(row.label, root, results, results.get("train_flops", 0.0)))
            continue
        number, flops = 1, 0.0
        while root.stage(number).is_done():
            results = root.stage(number).read_results()
            flops += results["train_flops"]
            found.append(Entry(f"{row.label}, stage {number}", root.stage(number), results, flops))
            number += 1
    losses = [(entry.label, measure(entry.results, "validation")) for entry in found]
    refuse_mixture("validation loss", f"the table of {experiment.name}", losses)
    return found


def steps_to(metrics: list[dict], target: float) -> int | None:
    """First evaluated step whose curve loss is at or below `target`, or None."""
    return next((row["step"] for row in metrics if row.get("val_loss", target + 1) <= target), None)


def validation_curve(folder: RunDir) -> list[dict]:
    """The evaluation rows of metrics.jsonl: step, tokens, val_loss."""
    return [row for row in read_jsonl(folder.metrics) if "val_loss" in row]


def speed(folder: RunDir) -> float | None:
    """Median tokens/s of the logged steps."""
    rates = sorted(row["tokens_per_s"] for row in read_jsonl(folder.metrics) if row.get("tokens_per_s"))
    return rates[len(rates) // 2] if rates else None


def make_table(experiment: Experiment, found: list[Entry]) -> list[list[str]]:
    """Cells of the table, COLUMNS wide."""
    curve = validation_curve(found[0].folder)
    target = curve[-1]["val_loss"] if curve else None
    cells = []
    for entry in found:
        results, loss = entry.results, entry.results["validation"]
        gap, reached = results.get("difference"), None
        if target is not None:
            reached = steps_to(validation_curve(entry.folder), target)
        rate = speed(entry.folder)
        cells.append(
            [
                entry.label,
                str(results["layers"]),
                f"{results['parameters'] / 1e6:.2f}M",
                str(results["steps"]),
                f"{loss['mean']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})",
                f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" if gap else "",
                "not reached" if reached is None else str(reached),
                f"{rate:,.0f}" if rate else "",
                f"{entry.flops:.2e}",
            ]
        )
    return cells


def verdict(experiment: Experiment, found: list[Entry]) -> str:
    """What was found, in words, whichever way it came out: the first grown run's last stage against the
    reference, and against the random starts."""
    grower = next((row.run for row in experiment.paper if experiment.run(row.run).grow), None)
    grown = [entry for entry in found if entry.results["run"] == grower]
    if not grown:
        return "No grown run is finished yet."
    reference, mark = found[0].results, "REHEARSAL, not a result. " if experiment.rehearsal else ""
    root = RunDir(grown[-1].folder.path.parent)
    decision = root.chosen().path if root.is_done() else grown[-1].folder.path
    chosen = next(entry for entry in grown if entry.folder.path == decision)
    gap = chosen.results["difference"]
    size = f"{chosen.results['layers']} of the reference's {reference['layers']} layers"
    margin = experiment.run(grower).grow.margin
    reached = "reaches" if gap["high"] <= margin else "does not reach"
    text = (
        f"{mark}With {size}, Inheritune {reached} the reference's validation loss: {gap['mean']:+.4f} nats "
        f"({gap['low']:+.4f} to {gap['high']:+.4f})"
    )
    for entry in found[1:]:
        run = experiment.run(entry.results["run"])
        if run.init.random and experiment.reference_of(run) == experiment.paper[0].run:
            other = entry.results["validation"]["mean"] - chosen.results["validation"]["mean"]
            side = "above" if other > 0 else "below"
            shape = f"{entry.results['layers']} layers, {entry.results['steps']} steps"
            text += f"; the {markdown(entry.label)} ({shape}) ends {abs(other):.4f} {side} it"
            if entry.results.get("difference", {"high": margin + 1})["high"] <= margin:
                text += " and reaches the reference's loss too"
    return text + "."


NOTE = (
    "One seed. Intervals are 95% over the {n} fixed validation windows, differences are paired by window; "
    "they do not cover "
    "the choice of seeds."
)


def table(item: str, seed: int = 0, rehearse=None, missing: bool = False) -> tuple | None:
    """Print the table of a paper item or of an experiment, and write it as .md, .csv and .tex beside the
    runs; `missing`: print what has to be run before, one `verb experiment run after options` a line (`after`:
    the lines it waits for).

    Raises UserError for an unknown item, runs of different data in one column, and a rehearsal in a table of
    results."""
    if item in item_names():
        return paper_item(item, seed, rehearse, missing)
    experiment = load_experiment(item, rehearse)
    found = entries(experiment, seed)
    if not found or found[0].label != experiment.paper[0].label:
        raise UserError(
            f"no table yet: run '{experiment.paper[0].run}' of {experiment.name} (seed {seed}) is not "
            f"finished; train it first"
        )
    title = f"{'REHEARSAL ' if experiment.rehearsal else ''}{experiment.name}, seed {seed}"
    cells, n = make_table(experiment, found), found[0].results["validation"]["n"]
    columns, notes, name = (
        list(COLUMNS),
        [NOTE.format(n=n), verdict(experiment, found)],
        f"the table of {experiment.name}",
    )
    for key, task in experiment.evaluate.tasks.items():
        scores = [measure(entry.results, f"tasks.{key}.{task.metrics[0]}") for entry in found]
        if any(score.measured for score in scores):
            columns.append(f"{key}, {task.metrics[0]}")
            refuse_mixture(
                columns[-1], name, [(entry.label, score) for entry, score in zip(found, scores, strict=True)]
            )
            cells = [[*row, score.own(2)] for row, score in zip(cells, scores, strict=True)]
    records = [dict(zip(columns, row, strict=True)) for row in cells]
    write_table(RunDir.of(experiment, "table", seed).path, title, columns, cells, notes, records)


def write_table(
    stem: Path, title: str, headers: list[str], cells: list[list[str]], notes: list[str], records: list
) -> None:
    """Print a table as Markdown and write stem.md, stem.tex and, from `records` (one per number), stem.csv.
    The title, the headers and the first cell of a row are words, escaped here; the other cells are numbers,
    and notes are Markdown."""
    words = [[markdown(row[0]), *row[1:]] for row in cells]
    text = tabulate(words, headers=list(map(markdown, headers)), tablefmt="github", disable_numparse=True)
    page = "\n\n".join([markdown(title), text, *notes]) + "\n"
    write_text(stem.with_suffix(".md"), page)
    plain = [[latex(row[0]), *(cell.replace("**", "") for cell in row[1:])] for row in cells]
    below = [f"% {latex(line)}" for line in [title, *notes]]
    text = tabulate(
        plain, headers=list(map(latex, headers)), tablefmt="latex_booktabs", disable_numparse=True
    )
    write_text(stem.with_suffix(".tex"), "\n".join([*below, text]) + "\n")
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(map(csv_cell, records[0]))
    writer.writerows([csv_cell(record[key]) for key in records[0]] for record in records)
    write_text(stem.with_suffix(".csv"), lines.getvalue())
    print(page)


# --- tables of the paper ------------------------------------------------------------------------------------

NOT_RUN = "not run"
PUBLISHED = "as published"
PAPER_NOTE = (
    "A cell is paper ± noise / ours ± noise: difference, verdict. Verdicts: matches (less than one unit of "
    "the paper's last "
    "printed digit), within noise (|difference| at most twice the root of both noises' squares), better, "
    "worse, not run; as "
    "published: not run here. The paper's noise is the deviation of its log's last ten evaluations, its "
    "standard error, or "
    "that of n questions; ours, the standard error over windows or questions. One seed: no noise covers the "
    "choice of seeds. "
    "Losses are compared with the log's last value, which the paper cut (not rounded) to two digits."
)
COSTS = ("training FLOPs (all rounds)", "with its sources", "tokens to the reference's loss (all rounds)")


@dataclass
class Cell:
    """One number of the paper and of ours. Scores are in percent, losses in nats per token."""

    paper: str = ""
    paper_noise: float | None = None
    log: tuple[float, float, float] | None = None
    """Last value, mean and deviation of the paper's log's last ten evaluations."""
    n: int | None = None
    ours: float | None = None
    noise: float | None = None
    ours_n: int | None = None
    measured: str = ""
    """What both models of a column must share: the data, or the task's version and shots."""
    state: str = NOT_RUN
    """Why there is no number of ours, or the verdict."""
    bold: tuple[bool, bool] = (False, False)
    """The paper's highlight rule, for its number and for ours."""
    source: str = ""
    provenance: str = ""

    @property
    def target(self) -> float | None:
        """The number that ours is compared with."""
        return self.log[0] if self.log else float(self.paper) if self.paper else None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.target is None else self.ours - self.target

    def record(self) -> dict:
        """The cell as columns of a CSV file."""
        log = dict(zip(("log_last", "log_mean10", "log_sd10"), self.log or ("", "", ""), strict=True))
        fields = {key: value for key, value in vars(self).items() if key not in ("log", "bold")}
        return fields | log | {"difference": self.difference}

    def text(self) -> str:
        digits = len(self.paper.partition(".")[2]) if self.paper else 2
        shown = max(digits, 4) if self.log or not self.paper else digits
        theirs = mark(self.paper, self.bold[0]) + with_noise(self.paper_noise, shown) if self.paper else "-"
        if self.ours is None:
            return theirs + (f" / {self.state}" if self.state else "")
        difference = None if self.difference is None else round(self.difference, shown) + 0.0  # no -0.00
        verdict = "" if difference is None else f": {difference:+.{shown}f} {self.state}"
        return f"{theirs} / {self.own(shown)}{verdict}"

    def own(self, digits: int) -> str:
        """Our number with its noise."""
        if self.ours is None:
            return self.state
        return mark(f"{self.ours:.{digits}f}", self.bold[1]) + with_noise(self.noise, digits)


def mark(number: str, bold: bool) -> str:
    return f"**{number}**" if bold else number


def with_noise(noise: float | None, digits: int) -> str:
    return "" if noise is None else f"±{noise:.{digits}f}"


def judge(difference: float, noises: list[float | None], unit: float, higher_is_better: bool) -> str:
    """The verdict on ours - paper's (DESIGN section 10): `unit` is one of the paper's last printed digit."""
    if abs(difference) < unit:
        return "matches"
    if abs(difference) <= 2 * math.sqrt(sum(noise**2 for noise in noises if noise)):
        return "within noise"
    return "better" if (difference > 0) == higher_is_better else "worse"


def measure(results: dict, metric: str) -> Cell:
    """Our side of a cell from a results.json; empty if it is not there."""
    if metric == "validation" and "validation" in results:
        loss, data = results["validation"], f"the data {results['data_fingerprint']}"
        return Cell(
            ours=loss["mean"], noise=(loss["high"] - loss["low"]) / 2 / 1.96, ours_n=loss["n"], measured=data
        )
    found = score(results, metric) if metric.startswith("tasks.") else None
    if not found:
        return Cell()
    unit = 100 if metric.rpartition(".")[2].startswith("acc") else 1
    with_what = f"version {found['version']} of task {found['task']} with {found['shots']} examples"
    return Cell(
        ours=unit * found["score"],
        noise=unit * found["stderr"] if found["stderr"] is not None else None,
        ours_n=found["n"],
        measured=with_what,
    )


def refuse_mixture(column: str, table: str, cells: list[tuple[str, Cell]]) -> None:
    """Raise UserError if two (row, cell) of a column were measured on other data, or with another version of
    a task."""
    measured = {}
    for label, cell in cells:
        if cell.measured:
            measured.setdefault(cell.measured, label)
    if len(measured) > 1:
        (one, first), (two, second), *_ = measured.items()
        raise UserError(
            f"column '{column}' of {table} mixes what does not compare: '{first}' was measured with {one}, "
            f"'{second}' with {two}; evaluate one of them again"
        )


def mean_of(cells: list[Cell]) -> Cell:
    """The mean of independent scores."""
    if any(cell.ours is None for cell in cells):
        return Cell()
    noises = [cell.noise or 0.0 for cell in cells]
    noise = math.sqrt(sum(noise**2 for noise in noises)) / len(cells)
    return Cell(
        ours=statistics.mean(cell.ours for cell in cells),
        noise=noise,
        measured=", ".join(c.measured for c in cells),
    )


def make_cell(item: Item, row: Row, column: Column, experiments: dict[str, Experiment], seed: int) -> Cell:
    """The cell of a row and a column, with its verdict."""
    name, _, run = (row.run or "").rpartition("/")
    results, metric = {}, column.metric or ""
    if row.run and (metric or column.mean) and metric != "parameters":
        folder = model_folder(experiments[name], row, seed)
        results = folder.read_results() if folder and folder.results.is_file() else {}
        if results and bool(results.get("rehearsal")) != experiments[name].rehearsal:
            raise UserError(
                f"{row.run} ({row.label}) is a rehearsal, not a result, in the folder of the real run; "
                f"delete it there"
            )
    if metric == "parameters" and row.run:
        cell = Cell(ours=parameters(row))
    else:
        cell = (
            mean_of([measure(results, part) for part in column.mean])
            if column.mean
            else measure(results, metric)
        )
    facts = published(item, row, column)
    cell.paper, cell.n = facts.get("value", ""), column.n
    cell.source, cell.provenance = facts.get("source", ""), facts.get("provenance", "")
    curve = row_curve(row) if metric == "validation" else {}
    cell.log = last_ten(curve) if curve else None
    stderr = facts.get("stderr")
    if cell.log:
        cell.paper_noise = cell.log[2]
    elif stderr:
        cell.paper_noise = float(stderr)
    elif column.n and metric.rpartition(".")[2].startswith("acc") and cell.paper:
        share = float(cell.paper) / 100
        cell.paper_noise = 100 * math.sqrt(
            share * (1 - share) / column.n
        )  # gives the standard errors of Table 7
    if not row.run or not (metric or column.mean):
        cell.state = PUBLISHED if metric or column.mean else ""
    elif cell.difference is not None:
        unit = 10.0 ** -len(cell.paper.partition(".")[2]) if cell.paper else 0.0
        higher = metric.rpartition(".")[2].startswith("acc") or bool(column.mean and ".acc" in column.mean[0])
        cell.state = judge(cell.difference, [cell.paper_noise, cell.noise], unit, higher)
        cell.state = (
            f"REHEARSAL ({cell.state})"
            if experiments[name].rehearsal and metric != "parameters"
            else cell.state
        )
    return cell


def parameters(row: Row) -> int:
    """Parameters of a row's model at full size."""
    from inheritune.models.architectures import count_parameters, hf_config

    return count_parameters(
        hf_config(load_experiment(row.run.rpartition("/")[0], rehearse=False).model, layers_of_row(row))
    )


def rounds(folder: RunDir, spec: Run) -> list[RunDir]:
    """The folders of the rounds of growth up to the one in `folder`; of a run that does not grow, only
    `folder`."""
    if not spec.grow:
        return [folder]
    return [
        RunDir(folder.path.parent).stage(number + 1)
        for number in range(int(folder.path.name.removeprefix("stage")))
    ]


def training_cost(experiment: Experiment, run: str, row: Row, seed: int) -> tuple[float, float | None] | None:
    """(FLOPs of all rounds up to the row's stage or kept weights, and with those of the runs it starts or
    learns from); None if not run, the second None where one of these is not of this file."""
    spec = experiment.run(run)
    folder = model_folder(experiment, row.model_copy(update={"kept": None}), seed)
    if spec.init.external or folder is None:
        return None
    own = sum(one.read_results()["train_flops"] for one in rounds(folder, spec))
    own *= spec.keep_at[row.kept - 1] / experiment.train_of(spec).steps if row.kept else 1
    sources = [
        training_cost(experiment, source, Row(label=source, run=f"{experiment.name}/{source}"), seed)
        if source in experiment.runs
        else None
        for source in dict(spec.sources())
    ]
    return own, None if any(cost is None or cost[1] is None for cost in sources) else own + sum(
        cost[1] for cost in sources
    )


def tokens_to_reference(experiment: Experiment, run: str, row: Row, seed: int) -> str:
    """Training tokens until the curve is at or below the reference's last value, earlier rounds counted, as a
    cell."""
    spec, folder = experiment.run(run), model_folder(experiment, row, seed)
    reference = experiment.reference_of(spec) or (run if spec.init.random else None)
    curve = validation_curve(RunDir.of(experiment, reference, seed)) if reference and folder else None
    if not curve:
        return ""
    step = steps_to(validation_curve(folder), curve[-1]["val_loss"])
    if step is None:
        return "not reached"
    before = sum(one.read_results()["tokens"] for one in rounds(folder, spec)[:-1])
    return f"{step * experiment.train_of(spec).batch_tokens + before:.2e}"


def costs(row: Row, experiments: dict[str, Experiment], seed: int) -> list[str]:
    """The cells of COSTS."""
    name, _, run = (row.run or "").rpartition("/")
    cost = training_cost(experiments[name], run, row, seed) if row.run else None
    if cost is None:
        return ["", "", ""]
    with_sources = "not known" if cost[1] is None else f"{cost[1]:.2e}"
    return [f"{cost[0]:.2e}", with_sources, tokens_to_reference(experiments[name], run, row, seed)]


def highlight_version_1(item: Item, cells: dict[tuple[int, str], Cell]) -> None:
    """The bold rule of version 1: at least 90% of the reference, or better than at least two baselines."""

    def numbers(side: str, key: str, group: str) -> list[float]:
        found = [getattr(cells[i, key], side) for i, row in enumerate(item.rows) if row.group == group]
        return [float(number) for number in found if number not in ("", None)]

    def is_high(side: str, key: str, number: float) -> bool:
        near = any(number >= 0.9 * reference for reference in numbers(side, key, "reference"))
        return near or sum(number > baseline for baseline in numbers(side, key, "baseline")) >= 2

    for (index, key), cell in cells.items():
        if item.rows[index].group == "ours":
            own = {side: getattr(cell, side) for side in ("paper", "ours")}
            cell.bold = tuple(
                number not in ("", None) and is_high(side, key, float(number)) for side, number in own.items()
            )


def paper_item(name: str, seed: int = 0, rehearse=None, only_missing: bool = False) -> tuple | None:
    """The verb for an item of the paper.  -> what figures.plot_cells takes, if its numbers are to be drawn"""
    item = load_item(name)
    experiments = load_experiments(item, rehearse)
    if only_missing:
        for step in missing(item, experiments, on_disk(item, experiments, seed)):
            print(step.line())
        return None
    if not item.columns:
        raise UserError(f"{name} is a figure; use: python -m inheritune figure {name}")
    cells = {
        (i, key): make_cell(item, row, column, experiments, seed)
        for i, row in enumerate(item.rows)
        for key, column in item.columns.items()
    }
    for key, column in item.columns.items():
        refuse_mixture(
            column.label, name, [(row.label, cells[index, key]) for index, row in enumerate(item.rows)]
        )
    if item.highlight == "version_1":
        highlight_version_1(item, cells)
    trained = any(
        column.metric not in (None, "parameters") or column.mean for column in item.columns.values()
    )
    logs = any(cell.log for cell in cells.values())
    headers = [
        "model",
        *(column.label for column in item.columns.values()),
        *(["paper's log: last; last ten"] if logs else []),
    ]
    headers += COSTS if trained else ()
    shown, records = [], []
    for index, row in enumerate(item.rows):
        log = next((cells[index, key].log for key in item.columns if cells[index, key].log), None)
        spent = costs(row, experiments, seed)
        shown.append([row.label, *(cells[index, key].text() for key in item.columns)])
        shown[-1] += [f"{log[0]:.4f}; {log[1]:.4f}±{log[2]:.4f}" if log else ""] if logs else []
        shown[-1] += spent if trained else []
        for key, column in item.columns.items():
            where = {
                "item": name,
                "row": row.label,
                "run": row.run,
                "stage": row.stage,
                "column": column.label,
            }
            records.append({**where, **cells[index, key].record(), **dict(zip(COSTS, spent, strict=True))})
    small = any(experiment.rehearsal for experiment in experiments.values())
    stem = paper_folder(small, seed) / name
    title = f"{'REHEARSAL, not a result. ' if small else ''}{item.title}, seed {seed}"
    write_table(stem, title, headers, shown, [*([PAPER_NOTE] if trained else []), *item.notes], records)
    return (records, stem.with_suffix(".png"), item.title, small) if item.drawn else None


def paper_folder(rehearsal: bool, seed: int) -> Path:
    """Where tables and figures of the paper are written."""
    return root() / "runs" / (names.REHEARSAL if rehearsal else "") / names.PAPER / f"seed{seed}"
