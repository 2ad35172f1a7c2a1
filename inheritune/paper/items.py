"""The paper's tables and figures as data.

recipes/paper/items.yaml says what each table and figure shows. The CSV files in the same folder hold the
paper's numbers. `load_item("table5")` reads one item and `load_experiments` the experiments that it names.
"""

import functools
from typing import Annotated, Literal

import yaml

from inheritune.config import values
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.fields import Layers, Steps, Strict
from inheritune.config.paths import RECIPES
from inheritune.config.problems import parse_section
from inheritune.errors import UserError, suggest_name

PAPER_FOLDER = RECIPES / "paper"


class Published(Strict):
    """A number of the paper: column `value` of the row of `file` whose columns have the values of `match`.

    An item, its rows and its columns each give a part of this."""

    file: str | None = None
    match: dict[str, str] = {}
    value: str | None = None
    stderr: str | None = None
    """Column that holds the paper's own standard error."""


class Row(Published):
    """A model: a row of a table, or a line of a figure."""

    label: str
    run: str | None = None
    """EXPERIMENT/RUN. The name of an experiment in a folder of recipes/ contains a slash itself. Without a
    run, the row is shown as published."""
    stage: Annotated[int, values.STAGE] | None = None
    """Stage of a grown run (default: the chosen stage)."""
    fixed: str | None = None
    """Run of the same experiment that starts from as many layers as the stage has, without growth. It stands
    for the stage where the growth ended before, and is what is run where nothing else needs the growth."""
    kept: Annotated[int, values.CHECKPOINTS] | None = None
    """Intermediate weights: the first, second ... of the run's `keep_at` (default: the final weights)."""
    claim: bool = False
    """Whether the paper claims that this model is level with the full one, the run that its run is compared
    with. The table then has a claim row for it (claims.py)."""
    toy: Literal["before_softmax", "after_softmax", "step_0", "step_500", "end"] | None = None
    """Measurement of the authors' toy models that the row shows (toy.py)."""
    group: str = ""
    """Rows among which a highlight is chosen."""
    data: str | None = None
    """Experiment on whose text the attention is measured (default: the run's own)."""
    maps: list[tuple[Layers, Layers]] = []
    """(layer, head), counted from 1, of the attention maps to draw."""


class Column(Published):
    """A measure. `metric` is validation, parameters or tasks.NAME.METRIC (results.json). Without a metric,
    only the published number is shown."""

    label: str
    metric: str | None = None
    mean: list[str] = []
    """Metrics whose mean this column shows."""
    n: Annotated[int, values.QUESTIONS] | None = None
    """Number of questions (or windows) that the paper's number is a mean over."""


class Panel(Strict):
    """One plot of a figure, drawn from attention.jsonl, or from metrics.jsonl if `kind` is loss."""

    kind: Literal["max_rank", "taus", "mass", "heat", "maps", "loss"]
    title: str
    rows: list[Row]
    smooth: Steps = 1
    """Number of evaluations in a trailing mean, as in the paper's figure."""
    from_step: Annotated[int, values.STEPS_OR_NONE] = 0
    to_step: Steps | None = None
    loss: Literal["val_loss", "train_loss"] = "val_loss"


class Item(Published):
    """A table (columns and rows) or a figure (panels)."""

    title: str
    reports: str = ""
    """What the paper reports there, in a few words, for the index."""
    differs: str = ""
    """What differs in this repository, and why."""
    columns: dict[str, Column] = {}
    rows: list[Row] = []
    drawn: bool = False
    """True for a table that is a figure in the paper: its numbers are also drawn."""
    panels: list[Panel] = []
    highlight: Literal["none", "version_1"] = "none"
    notes: list[str] = []

    def models(self) -> list[Row]:
        """Return all rows, including those of the panels."""
        return self.rows + [row for panel in self.panels for row in panel.rows]


@functools.cache
def _read_items() -> dict[str, dict]:
    """Return {name: definition} of items.yaml, without the keys that only hold YAML anchors (".name")."""
    definitions = yaml.safe_load((PAPER_FOLDER / "items.yaml").read_text(encoding="utf-8"))
    return {name: definition for name, definition in definitions.items() if name[0] != "."}


def list_items() -> list[str]:
    """Return the names of all tables and figures, in the order of items.yaml."""
    return list(_read_items())


def load_item(name: str) -> Item:
    """Return the item called `name` (table5, fig03 ...).

    Raises UserError if there is no such item or its definition is malformed."""
    if name not in _read_items():
        raise UserError(f"no table or figure '{name}'; {suggest_name(name, _read_items())}")
    return parse_section(Item, _read_items()[name], f"{PAPER_FOLDER / 'items.yaml'}, {name}")


def split_run(row: Row) -> tuple[str, str]:
    """Return (experiment, run) of a row; two empty strings for a row that is only published."""
    experiment, _, run = (row.run or "").rpartition("/")
    return experiment, run


def fix_depth(row: Row) -> Row:
    """Return a row of a grown run as that of the run of its depth that does not grow."""
    experiment = split_run(row)[0]
    return row.model_copy(update={"run": f"{experiment}/{row.fixed}", "stage": None, "fixed": None})


def load_experiments(item: Item, rehearse: bool | None = None) -> dict[str, Experiment]:
    """Return {name: experiment} of all experiments that the item's rows run or read.

    Raises UserError for an unknown experiment or run."""
    rows = [row for row in item.models() if row.run]
    names = {name for row in rows for name in (split_run(row)[0], row.data) if name}
    found = {name: load_experiment(name, rehearse) for name in sorted(names)}
    for row in rows:
        experiment, run = split_run(row)
        found[experiment].run(run)
        if row.fixed:
            found[experiment].run(row.fixed)
    return found
