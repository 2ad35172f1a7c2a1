"""Experiments: typed, strict, in one YAML file each (recipes/<experiment>.yaml).

`load_experiment("quickstart")` reads and checks the whole file. It reports every problem at once, with the
path of the key and the nearest valid name. `Experiment.run("random_4")` returns one run, and
`Experiment.train_of(run)` the training settings with the run's overrides merged in. All settings that change
the mathematics of a run are here; those of memory and speed are in ds_configs/ (engines/engine.py).
"""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from inheritune.config import environment, names
from inheritune.config.fields import Strict, check_name
from inheritune.config.layers import check_layers_text
from inheritune.config.paths import RECIPES, find_copy
from inheritune.config.problems import list_problems, parse_section
from inheritune.config.reading import read_yaml
from inheritune.config.rehearsal import shrink_experiment
from inheritune.config.run import Blocks, Run
from inheritune.config.sections import Data, Evaluate, Model, TableRow, Train
from inheritune.errors import UserError, suggest_name


class Experiment(Strict):
    """A whole file. `name` is the file's stem; `rehearsal` is set by `rehearse_experiment`."""

    name: Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]*$")]
    rehearsal: bool = False
    about: str = ""
    paper: list[TableRow] = []
    """Rows of the experiment's table, in order; the first is the reference."""
    data: Data
    model: Model
    train: Train
    runs: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")], Run]
    evaluate: Evaluate = Evaluate()
    _given: str = PrivateAttr("")

    @property
    def given(self) -> str:
        """The name or path that it was loaded by, and --rehearse if it is rehearsed: for a line to paste."""
        name = shlex.quote(self._given or self.name)
        return f"{name} --rehearse" if self.rehearsal else name

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        return check_name(names.find_experiment_problem, name)

    @field_validator("runs")
    @classmethod
    def _name_folders(cls, runs: dict[str, Run]) -> dict[str, Run]:
        if not runs:
            raise ValueError("at least one run is needed")
        for name in runs:
            check_name(names.find_run_problem, name)
        if same := names.find_same_folder(runs):
            raise ValueError(f"'{same[0]}' and '{same[1]}' are one folder where case is ignored; rename one")
        return runs

    @model_validator(mode="after")
    def _references_exist(self) -> "Experiment":
        problems = []
        if self.data.sequence_length > self.model.positions:
            problems.append(
                f"data.sequence_length ({self.data.sequence_length}) is beyond the model's "
                f"{self.model.positions} positions; shorten it or set model.positions"
            )
        for row in self.paper:
            if row.run not in self.runs:
                problems.append(f"paper: unknown run '{row.run}'; {suggest_name(row.run, self.runs)}")
        for name, run in self.runs.items():
            problems += self._run_problems(name, run)
        problems += self._source_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _run_problems(self, name: str, run: Run) -> list[str]:
        """Return sentences on the keys of one run that do not agree with the rest of the file."""
        problems = []
        if run.compare and run.compare not in self.runs:
            problems.append(
                f"runs.{name}.compare: unknown run '{run.compare}'; {suggest_name(run.compare, self.runs)}"
            )
        try:
            train = self.train_of(run)
        except ValidationError as error:
            return problems + list_problems(error, Train, f"runs.{name}.train.")
        problems += [f"runs.{name}.{problem}" for problem in _find_keep_problems(run, train)]
        length = self.data.sequence_length
        if train.batch_tokens % length:
            problems.append(
                f"runs.{name}: batch_tokens ({train.batch_tokens}) is not a multiple of sequence_length "
                f"({length}); the nearest is {max(1, round(train.batch_tokens / length)) * length}"
            )
        return problems

    def _source_problems(self) -> list[str]:
        """Return sentences on runs that copy or learn from what cannot exist."""
        needed = {
            name: [source for source, _ in run.sources() if source in self.runs]
            for name, run in self.runs.items()
        }
        problems: list[str] = []
        ready: set[str] = set()
        depths: dict[str, int] = {}
        for _ in needed:  # each round adds the runs whose sources have all been added
            ready |= {name for name, sources in needed.items() if ready.issuperset(sources)}
        for name, sources in needed.items():
            try:
                self._check_sources(name, sources, name in ready)
                if sources or self.runs[name].grow:
                    depths[name] = self.layers_of(self.runs[name], depths)
            except UserError as error:
                problems.append(f"runs.{name}: {error}")
        return problems

    def _check_sources(self, name: str, sources: Iterable[str], is_ready: bool) -> None:
        """Raises UserError if the sources of run `name`, all of them runs of the file, cannot be its sources.

        `is_ready`: no source is made from the run itself."""
        start = self.runs[name].init.copied
        if isinstance(start, Blocks) and isinstance(start.layers, str):
            check_layers_text(start.layers)
        if not is_ready:
            raise UserError("the chain of its sources and teachers contains a cycle")
        for source in sources:
            if other := self.runs[source].init.external:
                raise UserError(
                    f"a third-party model is named by its own source, '{other.source}', not by a run"
                )

    def layers_of(self, run: Run, known: dict[str, int] | None = None) -> int:
        """Return the number of blocks of `run`'s model; for a grown run, the largest.

        A source outside the file is taken to be as deep as `model`. `known`: depths of other runs, which are
        then not counted again. Raises UserError if the run copies layers that its source lacks."""
        start, depth = run.init.copied, self.model.layers
        source = self.runs.get(start.source) if start else None
        if start and source:
            depth = (known or {}).get(start.source) or self.layers_of(source, known)
        if run.grow:
            return run.depths(depth)[-1]
        return start.count(depth) if start else run.layers or depth

    def train_of(self, run: Run) -> Train:
        """Return the experiment's `train` with the run's own keys merged in."""
        return Train.model_validate({**self.train.model_dump(), **run.train})

    def run(self, name: str) -> Run:
        """Return the run called `name`. Raises UserError with the nearest name."""
        if name not in self.runs:
            raise UserError(f"experiment '{self.name}' has no run '{name}'; {suggest_name(name, self.runs)}")
        return self.runs[name]

    def reference_of(self, run: Run) -> str | None:
        """Return the name of the run that `run` is compared with, or None."""
        source = run.init.copied.source if run.init.copied else None
        return run.compare or (source if source in self.runs else None)

    def is_reference(self, name: str) -> bool:
        """Return whether another run is compared with run `name`."""
        return any(self.reference_of(run) == name for run in self.runs.values())


def _find_keep_problems(run: Run, train: Train) -> list[str]:
    """Return sentences on `keep_at` steps that the run never reaches."""
    if run.keep_at and run.init.external:
        return ["keep_at: a third-party model is not trained, so there is no step to keep; leave it out"]
    late = [step for step in run.keep_at if step > train.steps]
    if not late:
        return []
    return [f"keep_at: step {late[0]} is never reached, the run has {train.steps} steps; keep an earlier one"]


def is_path(name: str) -> bool:
    """Return whether an experiment is given by the path of its file, not by its name."""
    return str(name).endswith((".yaml", ".yml"))


def load_experiment(name: str, rehearse: bool | None = None, others: Sequence[str] = ()) -> Experiment:
    """Return the experiment in recipes/<name>.yaml, or in the YAML file at path `name`.

    A job reads the copy that was made when it was submitted. `rehearse`: shrink it to a rehearsal (None: if
    REHEARSE=1). `others`: what the caller takes besides experiments, for the sentence that refuses a name.
    Raises UserError with every problem of the file in one message."""
    path = Path(name) if is_path(name) else RECIPES / f"{name}.yaml"
    path = find_copy(path) or path
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(
            f"no experiment '{name}' ({path} is missing); {suggest_name(name, [*known, *others])}"
        )
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    experiment = parse_section(Experiment, raw, str(path))
    if rehearse is None:
        rehearse = environment.read_flag("REHEARSE")
    if rehearse:
        experiment = rehearse_experiment(experiment)
    experiment._given = str(name)
    return experiment


def rehearse_experiment(experiment: Experiment) -> Experiment:
    """Return the experiment shrunk to two CPU cores and minutes, marked `rehearsal` (rehearsal.py)."""
    raw = shrink_experiment(experiment.model_dump(mode="json", by_alias=True))
    return parse_section(Experiment, raw, f"rehearsal of {experiment.name}")
