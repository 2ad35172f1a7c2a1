"""What has to be run before a table or figure can be drawn.

`list_missing` is a pure function of the item, its experiments and a predicate that says what already exists.
`make_disk_check` makes this predicate from the folders under $INHERITUNE_ROOT.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from inheritune.analysis.thresholds import has_papers_length
from inheritune.config.experiment import Experiment
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.paper.items import Item, Row, fix_depth, split_run
from inheritune.paper.measured import find_folder, find_score, list_maps, locate_attention, name_weights

Exists = Callable[[str, str, str, Row | None], bool]
"""(verb, experiment, run, row) -> whether the result of that step exists.

Verb `stage`: whether the stage of a grown run that the row shows does."""


@dataclass(frozen=True)
class Step:
    """One thing to run. `verb` is prepare, train, grow, evaluate or analyze; `after` are the numbers, counted
    from 1, of the steps that must finish before."""

    verb: str
    experiment: str
    run: str = "-"
    after: tuple[int, ...] = ()
    options: str = ""

    def line(self) -> str:
        after = ",".join(map(str, self.after)) or "-"
        return f"{self.verb} {self.experiment} {self.run} {after} {self.options}".rstrip()


@dataclass
class _StepList:
    """Steps in order. Each method returns the numbers of the steps to wait for, None for what exists."""

    experiments: dict[str, Experiment]
    exists: Exists
    steps: list[Step] = field(default_factory=list)
    numbers: dict[tuple[str, str, str], int | None] = field(default_factory=dict)
    preparing: dict[Path, str] = field(default_factory=dict)
    """{data folder: the experiment that prepares it for all that share it}"""

    def add_step(
        self, key: tuple[str, str, str], done: bool, after: list[int | None], options: str = ""
    ) -> int | None:
        """Add the step `key` = (verb, experiment, run) unless it is done or already listed."""
        if key not in self.numbers:
            self.numbers[key] = None
            if not done:
                before = tuple(sorted({number for number in after if number}))
                self.steps.append(Step(*key, before, options))
                self.numbers[key] = len(self.steps)
        return self.numbers[key]

    def add_data(self, name: str) -> int | None:
        """Add the preparation of an experiment's data."""
        name = self.preparing.setdefault(get_data_dir(self.experiments[name]), name)
        return self.add_step(("prepare", name, "-"), self.exists("prepare", name, "-", None), [])

    def add_run(self, name: str, run: str) -> list[int | None]:
        """Add a run, after the runs that it starts from and is compared with."""
        experiment = self.experiments[name]
        spec = experiment.run(run)
        if spec.init.external:
            return [self.add_data(name)]
        if self.exists("train", name, run, None):
            return []
        needed = [*(source for source, _ in spec.sources()), experiment.reference_of(spec)]
        runs = [other for other in needed if other and other in experiment.runs and other != run]
        before = [number for other in runs for number in self.add_run(name, other)]
        verb = "grow" if spec.grow else "train"
        return [self.add_step((verb, name, run), False, [self.add_data(name), *before])]

    def add_scores(self, row: Row, after: list[int | None]) -> None:
        """Add the evaluation of a table's row."""
        name, run = split_run(row)
        weights = name_weights(self.experiments[name], row)
        self.add_step(("evaluate", name, weights), self.exists("evaluate", name, run, row), after)

    def add_attention(self, row: Row, after: list[int | None]) -> None:
        """Add the measurement of the attention that a figure's row shows."""
        name, run = split_run(row)
        experiment, data = self.experiments[name], row.data or name
        weights = name_weights(experiment, row)
        model = f"{name}/{weights}" if row.data else weights
        maps = ",".join(f"{layer + 1}:{head + 1}" for layer, head in list_maps(experiment, row))
        done = self.exists("analyze", name, run, row)
        options = f"--maps {maps}" if maps else ""
        self.add_step(("analyze", data, model), done, [*after, self.add_data(data)], options)


def list_missing(item: Item, experiments: dict[str, Experiment], exists: Exists) -> list[Step]:
    """Return what is still to be run for `item`, in order.

    Data comes first, then the runs with those they start from and are compared with, then scores and
    attention. Pure: `exists` says what is already available."""
    found = _StepList(experiments, exists)
    metrics = _list_metrics(item)
    rows: list[tuple[str | None, Row]] = []
    if metrics - {"parameters"}:
        rows += [(None, row) for row in item.rows if row.run]
    rows += [(panel.kind, row) for panel in item.panels for row in panel.rows if row.run]
    rows = [(kind, _choose_run(item, row, exists)) for kind, row in rows]
    names = [split_run(row) for _, row in rows]
    # grown runs last, so that the runs that one start can train are adjacent
    names.sort(key=lambda name: bool(experiments[name[0]].run(name[1]).grow))
    after = {name: found.add_run(*name) for name in names}
    for kind, row in rows:
        if kind is None and any(metric.startswith("tasks.") for metric in metrics):
            found.add_scores(row, after[split_run(row)])
        elif kind not in (None, "loss"):
            found.add_attention(row, after[split_run(row)])
    return found.steps


def _choose_run(item: Item, row: Row, exists: Exists) -> Row:
    """Return the row as what is to be run for it: growth, or the run of its depth that does not grow.

    Growth is run where another row needs it, until it has ended without this row's stage."""
    name, run = split_run(row)
    if not row.fixed or exists("stage", name, run, row):
        return row
    is_grown = any(other.run == row.run and not other.fixed for other in item.models())
    if is_grown and not any(exists("train", name, one, None) for one in (run, row.fixed)):
        return row
    return fix_depth(row)


def _list_metrics(item: Item) -> set[str]:
    """Return the names of all metrics that the columns of `item` show."""
    return {metric for column in item.columns.values() for metric in (column.metric, *column.mean) if metric}


def make_disk_check(item: Item, experiments: dict[str, Experiment], seed: int) -> Exists:
    """Return the predicate of `list_missing` that looks into the folders under $INHERITUNE_ROOT."""
    metrics = {metric for metric in _list_metrics(item) if metric.startswith("tasks.")}

    def exists(verb: str, name: str, run: str, row: Row | None) -> bool:
        experiment = experiments[name]
        if verb == "prepare":
            return is_prepared(get_data_dir(experiment))
        if verb == "stage":
            stage = row.stage if row else None
            return stage is not None and RunDir.of(experiment, run, seed).stage(stage).is_done()
        if verb == "train" or row is None:
            return RunDir.of(experiment, run, seed).is_done()
        folder = find_folder(experiment, row, seed)
        if folder is None:  # a finished growth has no further stage to measure
            return RunDir.of(experiment, run, seed).is_done()
        if verb == "analyze":
            rows = locate_attention(folder, row).read_attention()
            kept = {(r["layer"], r["head"]) for r in rows if r["kind"] == "map"}
            return has_papers_length(rows) and kept.issuperset(list_maps(experiment, row))
        results = folder.read_results() if folder.results.is_file() else {}
        return all(find_score(results, metric) for metric in metrics)

    return exists
