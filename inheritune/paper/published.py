"""The numbers that the paper reports: its tables, and the curves of its training logs.

They come from the CSV files in recipes/paper/. curves.yaml says which log belongs to which run.
"""

import csv
import functools
import statistics
from collections import defaultdict

import yaml

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.paper.items import PAPER_FOLDER, Column, Item, Row, split_run

LOGS = "curves_reference_val_loss.csv"
"""The paper's training logs."""


@functools.cache
def read_csv(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file in recipes/paper/."""
    with open(PAPER_FOLDER / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def find_rows(file: str, match: dict[str, str]) -> list[dict[str, str]]:
    """Return the rows of `file` whose columns have the values of `match`."""
    return [row for row in read_csv(file) if all(row[key] == value for key, value in match.items())]


def find_published(item: Item, row: Row, column: Column) -> dict[str, str]:
    """Return {value, stderr, source, provenance} of one cell, as text; {} if the paper has no number there.

    Raises UserError if the definitions do not select exactly one row of the CSV file."""
    match = {**item.match, **column.match, **row.match}
    file, value, stderr = (
        getattr(column, key) or getattr(row, key) or getattr(item, key) for key in ("file", "value", "stderr")
    )
    if not (file and value and match) or not (row.match or row.value):
        return {}
    found = find_rows(file, match)
    if len(found) != 1:
        raise UserError(
            f"{len(found)} rows of recipes/paper/{file} have {match} (row '{row.label}'); items.yaml must "
            f"name one"
        )
    facts = {"value": found[0][value], "stderr": found[0].get(stderr, "") if stderr else ""}
    return facts | {key: found[0][key] for key in ("source", "provenance")} if facts["value"] else {}


@functools.cache
def _read_logs() -> dict[str, dict[int, dict[str, float]]]:
    """Return {log: {step: {train_loss, val_loss}}} of the paper's training logs."""
    logs: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    # if a step is repeated, its last row counts
    for row in read_csv(LOGS):
        logs[row["run"]][int(row["step"])] = {key: float(row[key]) for key in ("train_loss", "val_loss")}
    return logs


def load_curves(experiment: str, loss: str = "val_loss") -> dict[str, dict]:
    """Return {run: {layers, or "all": {step: loss}}} of the paper's logs for the runs of an experiment."""
    names = yaml.safe_load((PAPER_FOLDER / "curves.yaml").read_text(encoding="utf-8")).get(experiment, {})
    by_layers = {run: value if isinstance(value, dict) else {"all": value} for run, value in names.items()}
    return {
        run: {n: {step: row[loss] for step, row in _read_logs()[log].items()} for n, log in logs.items()}
        for run, logs in by_layers.items()
    }


def select_curve(curves: dict[str, dict], run: str, layers: int) -> dict[int, float]:
    """Return {step: loss} of a run, or of the stage that has `layers`; {} if the paper has none."""
    by_layers = curves.get(run, {})
    return by_layers.get(layers) or by_layers.get("all") or {}


def interpolate_loss(curve: dict[int, float], step: int) -> float | None:
    """Return the curve's loss at `step`, linear between its points; None outside the curve."""
    before = max((s for s in curve if s <= step), default=None)
    after = min((s for s in curve if s >= step), default=None)
    if before is None or after is None:
        return None
    share = (step - before) / (after - before) if after > before else 0.0
    return curve[before] + share * (curve[after] - curve[before])


def count_layers(row: Row) -> int:
    """Return the number of blocks of a row's model at full size.

    For a grown run without a stage, it is the depth of the paper's last round."""
    name, run = split_run(row)
    full = load_experiment(name, rehearse=False)
    spec = full.run(run)
    if not spec.grow:
        return full.layers_of(spec)
    rounds = len(load_curves(name).get(run, {0: None}))
    return spec.depths(full.model.layers)[(row.stage or rounds) - 1]


def load_curve(row: Row, loss: str = "val_loss") -> dict[int, float]:
    """Return {step: loss} of the paper's log for a row; {} if there is none."""
    name, run = split_run(row)
    return select_curve(load_curves(name, loss), run, count_layers(row)) if run else {}


def summarize_last_ten(curve: dict[int, float]) -> tuple[float, float, float]:
    """Return (last value, mean, standard deviation) of a log's last ten evaluations.

    The deviation is the noise of one evaluation."""
    losses = [curve[step] for step in sorted(curve)][-10:]
    return losses[-1], statistics.mean(losses), statistics.stdev(losses)
