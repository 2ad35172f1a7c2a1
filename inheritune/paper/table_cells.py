"""A cell of a table: the paper's number, this repository's number, the noise of both, and the verdict."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.paper.items import Column, Item, Row, split_run
from inheritune.paper.measured import find_folder, find_score, resolve_row
from inheritune.paper.published import count_layers, find_published, load_curve, summarize_last_ten
from inheritune.runs.comparison import Z95

NOT_RUN = "not run"
NOISE_UNKNOWN = "noise unknown"
PUBLISHED = "as published"


@dataclass
class Cell:
    """One number of the paper and of this repository. Scores are in percent, losses in nats per token."""

    paper: str = ""
    paper_noise: float | None = None
    log: tuple[float, float, float] | None = None
    """Last value, mean and standard deviation of the last ten evaluations of the paper's log."""
    n: int | None = None
    ours: float | None = None
    noise: float | None = None
    ours_n: int | None = None
    measured: str = ""
    """What all cells of a column must share: the data, or the task's version and number of examples."""
    state: str = NOT_RUN
    """The verdict, or why this repository has no number."""
    bold: tuple[bool, bool] = (False, False)
    """Whether the paper's number and this repository's are highlighted."""
    paper_state: str = ""
    """The verdict on the paper's own numbers, in a claim row."""
    source: str = ""
    provenance: str = ""

    @property
    def target(self) -> float | None:
        """The number that ours is compared with."""
        if self.log:
            return self.log[0]
        return float(self.paper) if self.paper else None

    @property
    def difference(self) -> float | None:
        """Our number minus the paper's."""
        return None if self.ours is None or self.target is None else self.ours - self.target

    def record(self) -> dict:
        """Return the cell as columns of a CSV file."""
        log = dict(zip(("log_last", "log_mean10", "log_sd10"), self.log or ("", "", ""), strict=True))
        fields = {key: value for key, value in vars(self).items() if key not in ("log", "bold")}
        return fields | log | {"difference": self.difference}

    def text(self) -> str:
        """Return the cell as it is printed: paper / ours: difference verdict."""
        digits = len(self.paper.partition(".")[2]) if self.paper else 2
        shown = max(digits, 4) if self.log or not self.paper else digits
        theirs = "-"
        if self.paper:
            theirs = format_bold(self.paper, self.bold[0]) + format_noise(self.paper_noise, shown)
        if self.ours is None:
            return theirs + (f" / {self.state}" if self.state else "")
        difference = None if self.difference is None else round(self.difference, shown) + 0.0  # no -0.00
        verdict = "" if difference is None else f": {difference:+.{shown}f} {self.state}"
        return f"{theirs} / {self.own(shown)}{verdict}"

    def own(self, digits: int) -> str:
        """Return our number with its noise, or why there is none."""
        if self.ours is None:
            return self.state
        return format_bold(f"{self.ours:.{digits}f}", self.bold[1]) + format_noise(self.noise, digits)


def format_bold(number: str, bold: bool) -> str:
    """Return `number` in Markdown, highlighted if `bold`."""
    return f"**{number}**" if bold else number


def format_noise(noise: float | None, digits: int) -> str:
    """Return the noise as it follows a number; an empty string if it is unknown."""
    return "" if noise is None else f"±{noise:.{digits}f}"


def judge_difference(
    difference: float, noises: list[float | None], unit: float, higher_is_better: bool
) -> str:
    """Return the verdict on the difference of this repository's number from the paper's.

    `noises` are those of both numbers, `unit` is one unit of the paper's last printed digit. If one of the
    noises is unknown there is no verdict, of equal digits either: they may be equal by chance."""
    noise = combine_noises(noises)
    if noise is None:
        return NOISE_UNKNOWN
    if abs(difference) < unit:
        return "matches"
    if abs(difference) <= 2 * noise:
        return "within noise"
    return "better" if (difference > 0) == higher_is_better else "worse"


def combine_noises(noises: Sequence[float | None]) -> float | None:
    """Return the noise of a sum or difference of independent numbers; None if the noise of one is unknown."""
    known = [noise for noise in noises if noise is not None]
    return math.sqrt(sum(noise**2 for noise in known)) if len(known) == len(noises) else None


def average_noises(noises: Sequence[float | None]) -> float | None:
    """Return the noise of the mean of independent numbers; None if the noise of one is unknown."""
    noise = combine_noises(noises)
    return None if noise is None else noise / len(noises)


def measure_cell(results: dict, metric: str) -> Cell:
    """Return our side of a cell from a results.json; an empty cell if the metric is missing."""
    if metric == "validation" and "validation" in results:
        loss = results["validation"]
        noise = (loss["high"] - loss["low"]) / 2 / Z95
        return Cell(ours=loss["mean"], noise=noise, ours_n=loss["n"], measured=_describe_losses(results))
    found = find_score(results, metric) if metric.startswith("tasks.") else None
    if not found:
        return Cell()
    unit = 100 if is_accuracy(metric) else 1
    return Cell(
        ours=unit * found["score"],
        noise=unit * found["stderr"] if found["stderr"] is not None else None,
        ours_n=found["n"],
        measured=f"version {found['version']} of task {found['task']} with {found['shots']} examples",
    )


def _describe_losses(results: dict) -> str:
    """Return what two runs must share for their validation losses to compare. A precision is a setting that
    experiments compare."""
    windows = [f"windows {results['windows']}"] if "windows" in results else []  # older versions had none
    return ", ".join([f"the data {results['data_fingerprint']}", *windows])


def is_accuracy(metric: str) -> bool:
    """Return whether a metric is an accuracy, which is shown in percent."""
    return metric.rpartition(".")[2].startswith("acc")


def is_higher_better(column: Column) -> bool:
    """Return whether a column shows accuracies; losses and perplexities are better if lower."""
    return is_accuracy(column.metric or "") or bool(column.mean and ".acc" in column.mean[0])


def refuse_mixture(column: str, table: str, cells: list[tuple[str, Cell]]) -> None:
    """Check that all cells of a column are comparable. `cells` are (label of the row, cell).

    Raises UserError if two cells were measured on different data or windows, or with different versions of a
    task."""
    first, one = "", ""
    for second, cell in cells:
        two = cell.measured
        parts = zip(one.split(", "), two.split(", "), strict=False)  # an older result may lack the last ones
        if one and two and any(ours != theirs for ours, theirs in parts):
            raise UserError(
                f"column '{column}' of {table} mixes what does not compare: '{first}' was measured with "
                f"{one}, '{second}' with {two}; give both the same settings and evaluate one of them again"
            )
        if len(two) > len(one):
            first, one = second, two


def average_cells(cells: list[Cell]) -> Cell:
    """Return the mean of independent scores; an empty cell if one is missing."""
    scores = [cell.ours for cell in cells if cell.ours is not None]
    if len(scores) < len(cells):
        return Cell()
    noise = average_noises([cell.noise for cell in cells])
    measured = ", ".join(cell.measured for cell in cells)
    return Cell(ours=statistics.mean(scores), noise=noise, measured=measured)


def make_cell(item: Item, row: Row, column: Column, experiments: dict[str, Experiment], seed: int) -> Cell:
    """Return the cell of a row and a column, with its verdict."""
    metric, facts = column.metric or "", find_published(item, row, column)
    cell = _measure_row(row, column, experiments, seed)
    cell.paper, cell.n = facts.get("value", ""), column.n
    cell.source, cell.provenance = facts.get("source", ""), facts.get("provenance", "")
    curve = load_curve(row) if metric == "validation" else {}
    cell.log = summarize_last_ten(curve) if curve else None
    cell.paper_noise = _find_paper_noise(cell, metric, facts.get("stderr", ""))
    if column.mean and cell.paper:
        cell.paper_noise = _average_paper_noise(item, row, column)
    if not row.run or not (metric or column.mean):
        cell.state = PUBLISHED if metric or column.mean else ""
    elif cell.difference is not None:
        unit = 10.0 ** -len(cell.paper.partition(".")[2]) if cell.paper else 0.0
        noises: list[float | None] = [0.0, 0.0] if metric == "parameters" else [cell.paper_noise, cell.noise]
        verdict = judge_difference(cell.difference, noises, unit, is_higher_better(column))
        experiment = experiments[split_run(row)[0]]
        ended = "" if metric == "parameters" else resolve_row(experiment, row, seed)[1]
        small = experiment.rehearsal and metric != "parameters"
        cell.state = f"REHEARSAL ({ended or verdict})" if small else ended or verdict
    return cell


def _measure_row(row: Row, column: Column, experiments: dict[str, Experiment], seed: int) -> Cell:
    """Return our side of the cell of a row and a column."""
    metric = column.metric or ""
    if metric == "parameters" and row.run:
        return Cell(ours=count_parameters_of(row))
    wanted = row.run and (metric or column.mean) and metric != "parameters"
    results = read_row_results(row, experiments, seed) if wanted else {}
    if column.mean:
        return average_cells([measure_cell(results, part) for part in column.mean])
    return measure_cell(results, metric)


def read_row_results(row: Row, experiments: dict[str, Experiment], seed: int) -> dict:
    """Return the results.json of a row's model; {} if it is not finished.

    Raises UserError if the folder of a real run holds a rehearsal's results, or the other way round."""
    experiment = experiments[split_run(row)[0]]
    folder = find_folder(experiment, resolve_row(experiment, row, seed)[0], seed)
    results = folder.read_results() if folder and folder.results.is_file() else {}
    if results and bool(results.get("rehearsal")) != experiment.rehearsal:
        raise UserError(
            f"{row.run} ({row.label}) is a rehearsal, not a result, in the folder of the real run; "
            f"delete it there"
        )
    return results


def _find_paper_noise(cell: Cell, metric: str, stderr: str) -> float | None:
    """Return the noise of the paper's number: its log's deviation, its standard error, or that of n
    questions."""
    if cell.log:
        return cell.log[2]
    if stderr:
        return float(stderr)
    if cell.n and is_accuracy(metric) and cell.paper:
        share = float(cell.paper) / 100
        return 100 * math.sqrt(share * (1 - share) / cell.n)  # gives the standard errors of Table 7
    return None


def _average_paper_noise(item: Item, row: Row, column: Column) -> float | None:
    """Return the noise of the paper's mean, from the columns of its parts; None if the table has not all."""
    parts = {other.metric: other for other in item.columns.values() if other.metric in column.mean}
    noises = []
    for metric in column.mean:
        facts = find_published(item, row, parts[metric]) if metric in parts else {}
        part = Cell(paper=facts.get("value", ""), n=parts[metric].n if metric in parts else None)
        noises.append(_find_paper_noise(part, metric, facts.get("stderr", "")))
    return average_noises(noises)


def count_parameters_of(row: Row) -> int:
    """Return the number of parameters of a row's model at full size."""
    from inheritune.models.networks import build_config, count_parameters

    model = load_experiment(split_run(row)[0], rehearse=False).model
    return count_parameters(build_config(model, count_layers(row)))


def highlight_version_1(item: Item, cells: dict[tuple[int, str], Cell]) -> None:
    """Mark cells by the bold rule of version 1 of the paper: at least 90% of the reference, or better than at
    least two baselines."""

    def numbers(side: str, key: str, group: str) -> list[float]:
        found = [getattr(cells[i, key], side) for i, row in enumerate(item.rows) if row.group == group]
        return [float(number) for number in found if number not in ("", None)]

    def is_high(side: str, key: str, number: float) -> bool:
        near = any(number >= 0.9 * reference for reference in numbers(side, key, "reference"))
        return near or sum(number > baseline for baseline in numbers(side, key, "baseline")) >= 2

    def is_bold(side: str, key: str, cell: Cell) -> bool:
        number = getattr(cell, side)
        return number not in ("", None) and is_high(side, key, float(number))

    for (index, key), cell in cells.items():
        if item.rows[index].group == "ours":
            cell.bold = (is_bold("paper", key, cell), is_bold("ours", key, cell))
