"""The paper's tables and figures as data: recipes/paper/items.yaml says what each shows, the CSV files beside
it hold the paper's numbers, curves.yaml says which of its logs belongs to which run.

`load_item("table5")` reads one, `missing(item, ...)` says what has to be run before it can be drawn.
"""

import csv
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import yaml

from inheritune.config import values
from inheritune.config.experiment import (
    RECIPES,
    Experiment,
    Layers,
    Steps,
    Strict,
    load_experiment,
    rehearsal_count,
    validate,
)
from inheritune.errors import UserError, nearest
from inheritune.files.rundir import RunDir, beside, data_dir, find_weights

PAPER = RECIPES / "paper"


class Published(Strict):
    """A number of the paper: column `value` of the row of `file` whose columns are as `match` says. A table's
    row, its column and the table itself name parts of it."""

    file: str | None = None
    match: dict[str, str] = {}
    value: str | None = None
    stderr: str | None = None
    """Column that holds the paper's own standard error."""


class Row(Published):
    """A model: a row of a table, or a line of a figure."""

    label: str
    run: str | None = None
    """EXPERIMENT/RUN (an experiment in a folder of recipes/ has a slash itself); none: shown as published,
    not run here."""
    stage: Annotated[int, values.STAGE] | None = None
    """Stage of a grown run (default: the one it chose)."""
    kept: Annotated[int, values.CHECKPOINTS] | None = None
    """Weights kept on the way: the first, second ... of the run's `keep_at` (default: the end)."""
    group: str = ""
    """Rows among which a highlight is chosen."""
    data: str | None = None
    """Experiment whose text the attention is measured on (default: the run's own)."""
    maps: list[tuple[Layers, Layers]] = []
    """(layer, head), from 1, of the attention maps that are drawn."""


class Column(Published):
    """A measure. `metric`: validation, parameters, tasks.NAME.METRIC (results.json), or none: only
    published."""

    label: str
    metric: str | None = None
    mean: list[str] = []
    """Metrics that this one is the mean of."""
    n: Annotated[int, values.QUESTIONS] | None = None
    """Questions (or windows) that the paper's number is a mean over."""


class Panel(Strict):
    """One plot of a figure. kind: max_rank, taus, mass, heat, maps (attention.jsonl), or loss
    (metrics.jsonl)."""

    kind: Literal["max_rank", "taus", "mass", "heat", "maps", "loss"]
    title: str
    rows: list[Row]
    smooth: Steps = 1
    """Evaluations in a trailing mean, as in the paper's figure."""
    from_step: Annotated[int, values.STEPS_OR_NONE] = 0
    to_step: Steps | None = None
    loss: Literal["val_loss", "train_loss"] = "val_loss"


class Item(Published):
    """A table (columns and rows) or a figure (panels)."""

    title: str
    reports: str = ""
    """What the paper reports there, in few words, for the index."""
    differs: str = ""
    """What is otherwise here, and why."""
    columns: dict[str, Column] = {}
    rows: list[Row] = []
    drawn: bool = False
    """A table that is a figure in the paper: its numbers are drawn too."""
    panels: list[Panel] = []
    highlight: Literal["none", "version_1"] = "none"
    notes: list[str] = []

    def models(self) -> list[Row]:
        """All rows, those of the panels too."""
        return self.rows + [row for panel in self.panels for row in panel.rows]


@functools.cache
def _raw_items() -> dict:
    return {
        k: v
        for k, v in yaml.safe_load((PAPER / "items.yaml").read_text(encoding="utf-8")).items()
        if k[0] != "."
    }


def item_names() -> list[str]:
    return list(_raw_items())


def load_item(name: str) -> Item:
    """The item called `name` (table5, fig03 ...). Raises UserError for an unknown one, or if its data is
    malformed."""
    if name not in _raw_items():
        raise UserError(f"no table or figure '{name}'; {nearest(name, _raw_items())}")
    return validate(Item, _raw_items()[name], f"{PAPER / 'items.yaml'}, {name}")


# --- what the paper says ------------------------------------------------------------------------------------


@functools.cache
def read_csv(name: str) -> list[dict[str, str]]:
    """Rows of a file in recipes/paper/."""
    with open(PAPER / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_like(file: str, match: dict[str, str]) -> list[dict[str, str]]:
    """The rows of `file` whose columns have the values of `match`."""
    return [row for row in read_csv(file) if all(row[key] == value for key, value in match.items())]


def published(item: Published, row: Row, column: Column) -> dict[str, str]:
    """{value, stderr, source, provenance} of one cell, as text; {} where the paper has none.

    Raises UserError if the definitions do not name exactly one row of the CSV file."""
    match = {**item.match, **column.match, **row.match}
    file, value, stderr = (
        getattr(column, k) or getattr(row, k) or getattr(item, k) for k in ("file", "value", "stderr")
    )
    if not (file and value and match) or not row.match and not row.value:
        return {}
    found = rows_like(file, match)
    if len(found) != 1:
        raise UserError(
            f"{len(found)} rows of recipes/paper/{file} have {match} (row '{row.label}'); items.yaml must "
            f"name one"
        )
    facts = {"value": found[0][value], "stderr": found[0].get(stderr, "") if stderr else ""}
    return facts | {key: found[0][key] for key in ("source", "provenance")} if facts["value"] else {}


@functools.cache
def _published_points() -> dict[str, dict[int, dict]]:
    points = defaultdict(dict)
    for row in read_csv(
        "curves_reference_val_loss.csv"
    ):  # a repeated step stands after its first occurrence, and counts
        points[row["run"]][int(row["step"])] = {key: float(row[key]) for key in ("train_loss", "val_loss")}
    return points


def published_curves(experiment: str, loss: str = "val_loss") -> dict[str, dict]:
    """{run: {layers, or "all": {step: loss}}} of the paper's logs for the runs of the experiment of that
    name."""
    names = yaml.safe_load((PAPER / "curves.yaml").read_text(encoding="utf-8")).get(experiment, {})
    by_layers = {run: value if isinstance(value, dict) else {"all": value} for run, value in names.items()}
    return {
        run: {
            n: {step: row[loss] for step, row in _published_points()[log].items()} for n, log in value.items()
        }
        for run, value in by_layers.items()
    }


def curve_of(curves: dict, run: str, layers: int) -> dict[int, float]:
    """{step: loss} that belongs to a run or a stage of it; {} if the paper has none."""
    by_layers = curves.get(run, {})
    return by_layers.get(layers) or by_layers.get("all") or {}


def published_loss(curve: dict[int, float], step: int) -> float | None:
    """The curve at `step`, linear between its points; None outside it."""
    before, after = (
        max((s for s in curve if s <= step), default=None),
        min((s for s in curve if s >= step), default=None),
    )
    if before is None or after is None:
        return None
    share = (step - before) / (after - before) if after > before else 0.0
    return curve[before] + share * (curve[after] - curve[before])


def layers_of_row(row: Row) -> int:
    """Blocks of a row's model at full size; of a grown run's without a stage, at the paper's last round."""
    name, _, run = row.run.rpartition("/")
    full = load_experiment(name, rehearse=False)
    spec = full.run(run)
    if not spec.grow:
        return full.layers_of(spec)
    rounds = len(published_curves(name).get(run, {0: None}))
    return spec.grow.depths(spec.init.inherit.layers, full.model.layers)[(row.stage or rounds) - 1]


def row_curve(row: Row, loss: str = "val_loss") -> dict[int, float]:
    """The paper's log for a row; {} if there is none."""
    name, _, run = (row.run or "").rpartition("/")
    return curve_of(published_curves(name, loss), run, layers_of_row(row)) if run else {}


def last_ten(curve: dict[int, float]) -> tuple[float, float, float]:
    """(last value, mean, standard deviation) of a log's last ten evaluations: the noise of one evaluation."""
    values = [curve[step] for step in sorted(curve)][-10:]
    return values[-1], statistics.mean(values), statistics.stdev(values)


# --- what has to be run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing to run: `verb` of prepare, train, grow, evaluate, analyze; `after`: numbers, from 1, of the
    steps before."""

    verb: str
    experiment: str
    run: str = "-"
    after: tuple[int, ...] = ()
    options: str = ""

    def line(self) -> str:
        after = ",".join(map(str, self.after)) or "-"
        return f"{self.verb} {self.experiment} {self.run} {after} {self.options}".rstrip()


def missing(item: Item, experiments: dict[str, Experiment], have: Callable[..., bool]) -> list[Step]:
    """What is still to be run for `item`, in order: data, runs with the runs they start from and are compared
    with, then scores and attention. `have(verb, experiment, run, row)` says what is there (pure)."""
    steps, numbers, preparing = (
        [],
        {},
        {},
    )  # preparing: data folder -> the experiment that makes it for all that share it

    def need(key: tuple, there: bool, before: list, options: str = "") -> int | None:
        """Number of the step that makes `key` = (verb, experiment, run); None if it is there already."""
        if key not in numbers:
            numbers[key] = None
            if not there:
                steps.append(Step(*key, tuple(sorted({number for number in before if number})), options))
                numbers[key] = len(steps)
        return numbers[key]

    def data(name: str) -> int | None:
        name = preparing.setdefault(data_dir(experiments[name]), name)
        return need(("prepare", name, "-"), have("prepare", name, "-", None), [])

    def trained(name: str, run: str) -> list[int | None]:
        experiment, spec = experiments[name], experiments[name].run(run)
        if spec.init.external:
            return [data(name)]
        if have("train", name, run, None):
            return []
        others = [
            other for other in (*(s for s, _ in spec.sources()), experiment.reference_of(spec)) if other
        ]
        before = [
            step
            for other in others
            if other in experiment.runs and other != run
            for step in trained(name, other)
        ]
        return [need(("grow" if spec.grow else "train", name, run), False, [data(name), *before])]

    metrics = {
        metric for column in item.columns.values() for metric in (column.metric, *column.mean) if metric
    }
    rows = [(None, row) for row in item.rows if metrics - {"parameters"}]
    rows = [
        (kind, row) for kind, row in rows + [(p.kind, row) for p in item.panels for row in p.rows] if row.run
    ]
    names = [row.run.rsplit("/", 1) for _, row in rows]
    names.sort(
        key=lambda name: bool(experiments[name[0]].run(name[1]).grow)
    )  # what is trained in one start comes together
    before = {f"{name}/{run}": trained(name, run) for name, run in names}
    for kind, row in rows:
        (name, run), ready = row.run.rsplit("/", 1), before[row.run]
        weights, on = weights_name(experiments[name], row), row.data or name
        if kind is None and any(metric.startswith("tasks.") for metric in metrics):
            need(("evaluate", name, weights), have("evaluate", name, run, row), ready)
        elif kind not in (None, "loss"):
            maps = ",".join(f"{layer + 1}:{head + 1}" for layer, head in shown_maps(experiments[name], row))
            there, model = have("analyze", name, run, row), f"{name}/" * bool(row.data) + weights
            need(("analyze", on, model), there, [*ready, data(on)], f"--maps {maps}" if maps else "")
    return steps


def weights_name(experiment: Experiment, row: Row) -> str:
    """RUN, RUN/stage2 or RUN@10000 (weights kept at a step): whose weights a row shows."""
    run = row.run.rpartition("/")[2]
    kept = f"@{experiment.runs[run].keep_at[row.kept - 1]}" if row.kept else ""
    return run + (f"/stage{row.stage}" if row.stage else "") + kept


def shown_maps(experiment: Experiment, row: Row) -> list[tuple[int, int]]:
    """(layer, head), from 0, of the row's maps; in a rehearsal those of the small model that lie at the same
    depth."""
    pairs = [(layer - 1, head - 1) for layer, head in row.maps]
    if experiment.rehearsal:
        pairs = [(rehearsal_count(layer + 1) - 1, head % experiment.model.heads) for layer, head in pairs]
    return list(dict.fromkeys(pairs))


def load_experiments(item: Item, rehearse=None) -> dict[str, Experiment]:
    """{name: experiment} of all that the item's rows run or read. Raises UserError for an unknown experiment
    or run."""
    names = {
        name for row in item.models() if row.run for name in (row.run.rpartition("/")[0], row.data) if name
    }
    found = {name: load_experiment(name, rehearse) for name in sorted(names)}
    for row in (row for row in item.models() if row.run):
        found[row.run.rpartition("/")[0]].run(row.run.rpartition("/")[2])
    return found


def on_disk(item: Item, experiments: dict[str, Experiment], seed: int) -> Callable[..., bool]:
    """The `have` of `missing`, from the folders under $INHERITUNE_ROOT."""
    metrics = {
        m
        for column in item.columns.values()
        for m in (column.metric or "", *column.mean)
        if m.startswith("tasks.")
    }

    def have(verb: str, name: str, run: str, row: Row | None) -> bool:
        experiment = experiments[name]
        if verb == "prepare":
            return (data_dir(experiment) / "manifest.json").is_file()
        if verb == "train":
            return RunDir.of(experiment, run, seed).is_done()
        if (
            folder := model_folder(experiment, row, seed)
        ) is None:  # growth that is over has no further stage to look at
            return RunDir.of(experiment, run, seed).is_done()
        if verb == "analyze":
            rows = attention_of(folder, row).read_attention()
            kept = {(r["layer"], r["head"]) for r in rows if r["kind"] == "map"}
            return bool(rows) and kept.issuperset(shown_maps(experiment, row))
        results = folder.read_results() if folder.results.is_file() else {}
        return all(score(results, metric) for metric in metrics)

    return have


def model_folder(experiment: Experiment, row: Row, seed: int) -> RunDir | None:
    """The folder with the results of the row's run, stage, kept weights or model of others; None if it is not
    finished."""
    name = row.run.rpartition("/")[2]
    if experiment.run(name).init.external:
        return RunDir.of(experiment, name, seed)
    weights = find_weights(experiment, weights_name(experiment, row), seed)
    return beside(weights) if weights else None


def attention_of(folder: RunDir, row: Row) -> RunDir:
    """The folder of a row's attention.jsonl, measured on the run's own data or on that of `row.data`."""
    return RunDir(folder.path / f"on_{row.data}") if row.data else folder


def score(results: dict, metric: str) -> dict | None:
    """{score, stderr, n, task, version, shots} of metric tasks.NAME.METRIC in a results.json, or None."""
    _, task, name = metric.split(".")
    found = results.get("tasks", {}).get(task, {})
    return (
        {**found[name], **{key: found.get(key) for key in ("n", "task", "version", "shots")}}
        if name in found
        else None
    )
