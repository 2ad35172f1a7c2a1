"""Experiments: typed, strict, in one YAML file each (recipes/<experiment>.yaml).

`load_experiment("quickstart")` reads and checks the whole file and reports every problem at once, with the
path of the key and the nearest valid name. `Experiment.plan_run("random_4")` gives one run with its overrides
merged in. What changes the mathematics of a run lives here and nowhere else; memory and speed live in
ds_configs/ (engine.py).
"""

import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from inheritune.config import environment, names, values
from inheritune.config.layers import parse_layers, parse_range, place_layers
from inheritune.config.reading import read_yaml
from inheritune.errors import UserError, nearest

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "recipes"

PARTS = ("token_embedding", "position_embedding", "blocks", "final_norm", "head")
MODULES = ("attn", "mlp", "norms")
NORMS = ("attn_norm", "mlp_norm")
"""Modules that name one norm of a block: that of the attention, or of the MLP. `norms` means both."""


class Strict(BaseModel):
    """Unknown keys are errors, values do not change after loading, `from:` in YAML is `from_` in Python."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )


def _without(problem: Callable[[str], str], name: str) -> str:
    """`name`. Raises ValueError with what `problem` (of names.py) says of it."""
    if why := problem(name):
        raise ValueError(f"'{names.shown(name)}' {why}")
    return name


Layers = Annotated[int, values.LAYERS]
Layer = Annotated[int, values.LAYER]
Steps = Annotated[int, values.STEPS]
Tokens = Annotated[int, values.TOKENS]
Windows = Annotated[int, values.WINDOWS]
Length = Annotated[int, values.LENGTH]
Width = Annotated[int, values.WIDTH]
AboveZero = Annotated[float, values.ABOVE_ZERO]
NotNegative = Annotated[float, values.NOT_NEGATIVE]
BelowOne = Annotated[float, values.BELOW_ONE]


class ValidationSplit(Strict):
    """Which documents are held out: a random `fraction`, or the whole first shard (`first_shard: true`)."""

    fraction: Annotated[float, values.INSIDE_ONE] | None = None
    seed: Annotated[int, values.SEED] = 2357
    """Seed of the random fraction; 2357 is nanoGPT's, used by the paper (FACTS section 5)."""
    first_shard: bool = False

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.fraction is None) == (not self.first_shard):
            raise ValueError("give either 'fraction' or 'first_shard: true'")
        return self


class Data(Strict):
    """Documents, how they become tokens, and in which order the tokens are read."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    source: Literal["embedded", "files", "hub"]
    """embedded: the Python standard library's text; files: local globs; hub: a pinned data set on the Hub."""
    files: list[str] | dict[str, list[str]] = []
    """Globs (source: files) or file names inside the data set (source: hub); a mapping names groups for
    `weights`."""
    weights: dict[str, Annotated[float, values.WEIGHT]] = {}
    """Share of each group of `files` in the tokens read; they need not add up to one."""
    repo: str | None = None
    revision: str | None = None
    """Commit of the Hub data set: a branch name would let the data change under an experiment."""
    text_key: str = "text"
    """Key (JSONL) or column (parquet) that holds a document's text."""
    tokenizer: str
    """gpt2, bpe:N (trained on the source), a sentencepiece .model file (a path, or
    owner/repository/file.model on the Hub), or a Hugging Face tokenizer folder or id."""
    tokenizer_revision: str | None = None
    end_of_text: Literal["append", "prepend"] = "append"
    validation: ValidationSplit
    shard_tokens: Tokens = 100_000_000
    max_tokens: Tokens | None = None
    """Stop reading after about this many tokens (train and validation together)."""
    sequence_length: Length
    sampling: Annotated[str, Field(pattern=r"^(random_windows|one_pass|epochs:[1-9][0-9]{0,8})$")]

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name):
        return _without(names.folder_problem, name)

    @model_validator(mode="after")
    def _complete(self):
        if self.source != "embedded" and not self.files:
            raise ValueError(f"'files' is needed for source: {self.source}")
        if self.source == "hub" and not (self.repo and self.revision):
            raise ValueError("'repo' and 'revision' (a commit) are needed for source: hub")
        groups = set(self.files) if isinstance(self.files, dict) else set()
        if set(self.weights) != groups and self.weights:
            raise ValueError(f"'weights' names {sorted(self.weights)}, 'files' names {sorted(groups)}")
        return self

    def preparation(self) -> dict:
        """The keys that decide the bytes of the shards (not how windows are read from them): what the data
        hash covers."""
        return self.model_dump(mode="json", exclude={"sequence_length", "sampling"})


GPUS: dict[str, dict] = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8"))
MODEL_SIZES: dict[str, dict] = yaml.safe_load(
    (Path(__file__).parent / "sizes.yaml").read_text(encoding="utf-8")
)


class Model(Strict):
    """The reference's shape: a named `size` (sizes.yaml), any of whose numbers may be replaced."""

    size: str
    family: Literal["gpt2", "llama"]
    layers: Layers
    width: Width
    heads: Width
    kv_heads: Width
    """Key and value heads (grouped-query attention); Llama only."""
    mlp_width: Width
    positions: Length
    vocab_size: Annotated[int, values.VOCABULARY]
    norm_eps: AboveZero = 1.0e-5
    tied_head: bool

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, raw):
        size = raw.get("size") if isinstance(raw, dict) else None
        if not isinstance(size, str) or size not in MODEL_SIZES:
            raise ValueError(f"unknown model size '{size}'; {nearest(size, MODEL_SIZES)}")
        merged = {**MODEL_SIZES[size], **raw}
        merged.setdefault("kv_heads", merged["heads"])
        if isinstance(merged["width"], int):  # else pydantic says what is wrong with it
            merged.setdefault("mlp_width", 4 * merged["width"])
        merged.setdefault("tied_head", merged["family"] == "gpt2")
        return merged

    @model_validator(mode="after")
    def _divides(self):
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")
        if self.family == "gpt2" and self.kv_heads != self.heads:
            raise ValueError("GPT-2 has no grouped-query attention: leave out kv_heads")
        return self


class Train(Strict):
    """Optimization. FACTS section 6 has the paper's values."""

    steps: Steps
    batch_tokens: Annotated[int, values.BATCH]
    """Global batch in tokens: sequences x sequence_length; any number of GPUs divides it (batches.py)."""
    lr: AboveZero
    min_lr: NotNegative = 1.0e-5
    warmup_steps: Annotated[int, values.STEPS_OR_NONE] = 2000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: AboveZero = 1.0e-8
    weight_decay: NotNegative = 0.1
    clip: NotNegative = 1.0
    """Largest gradient norm (of the mean gradient); 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16_autocast", "bf16"] = "auto"
    """bf16_autocast keeps fp32 masters and accumulation (what the paper's code did); auto: that on a GPU,
    fp32 on a CPU."""
    deepspeed: str = "ds_configs/zero3.json"
    eval_every: Steps = 1000
    eval_windows: Windows = 400
    """Validation windows for the curve; nested in final_windows."""
    final_windows: Annotated[int, values.FINAL_WINDOWS] = 4096
    """Validation windows at a stage's end, for tables and the stop rule of growth; two at least, for an
    interval."""
    log_every: Steps = 10
    checkpoint_every: Steps = 1000
    keep_last: Annotated[int, values.CHECKPOINTS] = 2
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "inheritune"

    @model_validator(mode="after")
    def _consistent(self):
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than steps ({self.steps})")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        if self.eval_windows > self.final_windows:
            raise ValueError(
                f"eval_windows ({self.eval_windows}) must be nested in final_windows ({self.final_windows})"
            )
        return self


RESUMABLE_KEYS = (
    "eval_every",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "wandb",
    "wandb_project",
    "deepspeed",
)
"""Keys of `train` that may differ when a run is resumed: none of them changes a step."""


class Start(Strict):
    """A model that a run starts from: another run of the file, a local checkpoint, or a Hub id."""

    source: str
    revision: str | None = None


class External(Start):
    """A finished model of others, only evaluated or analyzed."""


class HalfWidth(Start):
    """`source` at half its heads and half its width (inherit.half_config)."""

    def blocks(self, n_source: int) -> list[int | None]:
        return list(range(n_source))


class Blocks(Start):
    layers: str | list[Layer]
    """Half-open range 'a:b' (0:16 are the first 16; ':16', '-4:' work too), or a list of block indices."""
    parts: list[Literal[PARTS]] = list(PARTS)


class Stack(Blocks):
    """Blocks of `source` twice, one copy after the other (stacking; from the reference: hybrid stacking)."""

    def blocks(self, n_source: int) -> list[int | None]:
        return parse_layers(self.layers, n_source) * 2


class Inherit(Blocks):
    """Weights copied from `source`."""

    modules: list[Literal[MODULES + NORMS]] = list(MODULES)
    depth: Layers | None = None
    """Blocks of the model, if more than those that are copied; the others are random."""
    at: Layer | None = None
    """Index of the first copied block in the model (default: 0)."""

    def blocks(self, n_source: int) -> list[int | None]:
        return place_layers(self.layers, n_source, self.depth, self.at or 0)


class Init(Strict):
    """Where a run's first weights come from: exactly one of these."""

    random: bool = False
    inherit: Inherit | None = None
    stack: Stack | None = None
    half_width: HalfWidth | None = None
    external: External | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value):
        return {"random": True} if value == "random" else value

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = list(type(self).model_fields)
        if sum(bool(getattr(self, kind)) for kind in kinds) != 1:
            raise ValueError(f"give exactly one of: {', '.join(kinds)}")
        return self

    @property
    def copied(self) -> Inherit | Stack | HalfWidth | None:
        """The start that copies another model's weights, or None. Its `blocks(n_source)` says for each block
        of the model which block of the source it is, None for a random one."""
        return self.inherit or self.stack or self.half_width


class Distil(Strict):
    """Logit distillation: the loss is alpha * cross-entropy + (1 - alpha) * temperature^2 * KL(teacher ||
    student)."""

    teacher: str
    """Another run of the file, a local checkpoint or a Hub id, of the same vocabulary."""
    revision: str | None = None
    alpha: BelowOne = 0.6
    temperature: AboveZero = 1.0


class Grow(Strict):
    """Growth by stages (paper, Algorithm 1): add `by` layers until parity with the source or `max_layers`."""

    by: Layers = 2
    margin: Annotated[float, values.FINITE] = 0.01
    """Parity: the upper end of the 95% interval of (ours - reference) is at or below this many nats."""
    max_layers: Layers
    from_: Annotated[Literal["reference", "previous"], Field(alias="from")] = "reference"
    """reference: every stage restarts from the reference's first layers, as in the paper; previous: keeps
    what was trained."""

    def depths(self, inherited: str | list[int], n_source: int) -> list[int]:
        """Layers of each stage: the inherited first ones of `n_source`, then `by` more each time, at most
        max_layers.

        Raises UserError if these are not the first layers, or max_layers is below them or above the
        source."""
        first = parse_layers(inherited, n_source)
        if first != list(range(len(first))):
            raise UserError(f"a run that grows must inherit the first layers, '0:n' (got {inherited})")
        if not len(first) <= self.max_layers <= n_source:
            raise UserError(
                f"grow.max_layers ({self.max_layers}) must lie between the first stage's {len(first)} layers "
                f"and "
                f"the source's {n_source}"
            )
        return [*range(len(first), self.max_layers, self.by), self.max_layers]


class Run(Strict):
    """One model of the experiment."""

    init: Init
    distil: Distil | None = None
    layers: Layers | None = None
    """Blocks of a random model; an inherited one has as many as it copies."""
    train: dict[str, Any] = {}
    """Keys of `train` that differ in this run."""
    grow: Grow | None = None
    compare: str | None = None
    """Run whose validation loss this one is compared with (default: the source, if it is a run of the
    file)."""
    keep_at: list[Steps] = []
    """Steps whose weights are kept as at_<step>/."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.grow and not self.init.inherit:
            raise ValueError("'grow' needs 'init: {inherit: ...}'")
        if self.layers and not self.init.random:
            raise ValueError(
                "'layers' belongs to a random run; an inherited one has as many layers as it copies"
            )
        if self.grow and (self.init.inherit.depth or self.init.inherit.at):
            raise ValueError("'grow' adds layers to the first ones; leave out init.inherit.depth and at")
        if self.distil and self.init.external:
            raise ValueError("'distil' belongs to a run that is trained; an external model is not")
        return self

    def sources(self) -> list[tuple[str, str | None]]:
        """(run of the file, local checkpoint or Hub id; its revision) of what this run is, copies or learns
        from."""
        start = self.init.external or self.init.copied
        found = [(start.source, start.revision)] if start else []
        return found + ([(self.distil.teacher, self.distil.revision)] if self.distil else [])


TASKS: dict[str, dict] = yaml.safe_load((RECIPES / "lm_eval" / "tasks.yaml").read_text(encoding="utf-8"))


class Task(Strict):
    """A downstream task, scored by lm-eval."""

    task: str
    """lm-eval's name of a task or group."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """lm-eval's names; the first is the task's score, the others are kept beside it."""
    shots: Annotated[int, values.SHOTS] = 0
    """Few-shot examples before each question."""


class Evaluate(Strict):
    """What `evaluate` measures beside the validation loss."""

    tasks: dict[str, Task] = {}
    """Names of recipes/lm_eval/tasks.yaml, as a list or with keys that replace theirs; or names of your own
    with all keys."""
    task_files: str | None = None
    """Folder with lm-eval task files (YAML) of your own."""
    batch: Annotated[int, values.SEQUENCES] = 16
    """Sequences per forward and rank."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tasks):
        named = {str(name): {} for name in tasks} if isinstance(tasks, list) else tasks
        if not isinstance(named, dict) or not all(isinstance(own, dict) for own in named.values()):
            raise ValueError("give a list of names, or a mapping of names to {task, metrics, shots}")
        for name, own in named.items():
            _without(names.task_problem, str(name))
            if name not in TASKS and "task" not in own:
                raise ValueError(f"unknown task '{name}'; {nearest(name, TASKS)}")
        return {name: {**TASKS.get(name, {}), **own} for name, own in named.items()}


class TableRow(Strict):
    """A row of the experiment's own table: a label for a run (a grown run gives one row per stage)."""

    run: str
    label: str


class Experiment(Strict):
    """A whole file. `name` is the file's stem; `rehearsal` is set by `rehearse`."""

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
        return f"{shlex.quote(self._given or self.name)}{' --rehearse' if self.rehearsal else ''}"

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name):
        return _without(names.experiment_problem, name)

    @field_validator("runs")
    @classmethod
    def _name_folders(cls, runs):
        if not runs:
            raise ValueError("at least one run is needed")
        for name in runs:
            _without(names.run_problem, name)
        if same := names.same_folder(runs):
            raise ValueError(
                f"'{same[0]}' and '{same[1]}' are one folder where capitals do not count; rename one"
            )
        return runs

    @model_validator(mode="after")
    def _references_exist(self):
        problems = []
        if self.data.sequence_length > self.model.positions:
            problems.append(
                f"data.sequence_length ({self.data.sequence_length}) is beyond the model's "
                f"{self.model.positions} positions; "
                f"shorten it or set model.positions"
            )
        for row in self.paper:
            if row.run not in self.runs:
                problems.append(f"paper: unknown run '{row.run}'; {nearest(row.run, self.runs)}")
        for name, run in self.runs.items():
            if run.compare and run.compare not in self.runs:
                problems.append(
                    f"runs.{name}.compare: unknown run '{run.compare}'; {nearest(run.compare, self.runs)}"
                )
            try:
                train = self.train_of(run)
            except ValidationError as error:
                problems.extend(_sentences(error, Train, f"runs.{name}.train."))
                continue
            problems += [f"runs.{name}.{problem}" for problem in _keep_problems(run, train)]
            if train.batch_tokens % self.data.sequence_length:
                problems.append(
                    f"runs.{name}: batch_tokens ({train.batch_tokens}) is not a multiple of sequence_length "
                    f"({self.data.sequence_length}); the nearest is "
                    f"{max(1, round(train.batch_tokens / self.data.sequence_length)) * self.data.sequence_length}"  # noqa: E501
                )
        problems += self._source_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _source_problems(self) -> list[str]:
        """Sentences on runs that copy or learn from what cannot be there."""
        needed = {
            name: [source for source, _ in run.sources() if source in self.runs]
            for name, run in self.runs.items()
        }
        problems, ready, depths = [], set(), {}
        for _ in needed:  # each round takes the runs whose sources are all taken
            ready |= {name for name, sources in needed.items() if ready.issuperset(sources)}
        for name, sources in needed.items():
            try:
                if isinstance(start := self.runs[name].init.copied, Blocks) and isinstance(start.layers, str):
                    parse_range(start.layers)
                if name not in ready:
                    raise UserError("of its sources and teachers, and theirs, one is made from itself")
                for other in (self.runs[source].init.external for source in sources):
                    if other:
                        raise UserError(
                            f"a model of others is named by its own source, '{other.source}', not by a run"
                        )
                if sources:
                    depths[name] = self.layers_of(self.runs[name], depths)
            except UserError as error:
                problems.append(f"runs.{name}: {error}")
        return problems

    def layers_of(self, run: Run, known: dict[str, int] | None = None) -> int:
        """Blocks of `run`'s model, of a grown one at most; a source outside the file is taken to be as deep
        as `model`. `known`: those of other runs, which need not be counted again.

        Raises UserError if it copies layers that its source has not."""
        start = run.init.copied
        if start is None:
            return run.layers or self.model.layers
        depth = (known or {}).get(start.source)
        if depth is None:
            source = self.runs.get(start.source)
            depth = self.layers_of(source, known) if source else self.model.layers
        if run.grow:
            return run.grow.depths(start.layers, depth)[-1]
        return len(start.blocks(depth))

    def train_of(self, run: Run) -> Train:
        """The experiment's `train` with the run's own keys put over it."""
        return Train.model_validate({**self.train.model_dump(), **run.train})

    def run(self, name: str) -> Run:
        """The run called `name`. Raises UserError with the nearest name."""
        if name not in self.runs:
            raise UserError(f"experiment '{self.name}' has no run '{name}'; {nearest(name, self.runs)}")
        return self.runs[name]

    def reference_of(self, run: Run) -> str | None:
        """Name of the run that `run` is compared with, or None."""
        source = run.init.copied.source if run.init.copied else None
        return run.compare or (source if source in self.runs else None)


def _keep_problems(run: Run, train: Train) -> list[str]:
    """Sentences on `keep_at` steps that the run never comes to."""
    if run.keep_at and run.init.external:
        return ["keep_at: a model of others is not trained, so there is no step to keep; leave it out"]
    late = [step for step in run.keep_at if step > train.steps]
    return (
        [f"keep_at: step {late[0]} is never reached, the run has {train.steps} steps; keep an earlier one"]
        if late
        else []
    )


def resolve_path(path: str) -> Path:
    """A path of an experiment file: absolute, or relative to the current folder, or to the repository."""
    given = Path(os.path.expandvars(path)).expanduser()
    return given if given.is_absolute() or given.exists() else REPOSITORY / given


def load_experiment(name: str, rehearse: bool | None = None) -> Experiment:
    """Read recipes/<name>.yaml, or the YAML file at path `name`; rehearsed if asked for or if REHEARSE=1.

    Raises UserError with every problem of the file in one message."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"no experiment '{name}' ({path} is missing); {nearest(name, known)}")
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    experiment = validate(Experiment, raw, str(path))
    if rehearse is None:
        rehearse = environment.flag("REHEARSE")
    if rehearse:
        experiment = rehearsal(experiment)
    experiment._given = str(name)
    return experiment


def validate(model: type[BaseModel], raw: dict, where: str):
    """`model` made from `raw`; pydantic's problems become one UserError that names `where`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_sentences(error, model))) from None


def _sentences(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One sentence per problem, with the path of the key and, for an unknown key, the nearest valid one."""
    sentences = []
    for problem in error.errors():
        path = prefix + ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            owner = model_at(model, problem["loc"][:-1])
            valid = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
            message = f"unknown key; {nearest(problem['loc'][-1], valid)}"
        elif problem["type"] != "value_error" and problem["type"] != "missing":
            message += f" (got {problem['input']!r})"
        sentences.append(f"{path}: {message}" if path else message)
    return sentences


def model_at(model, path):
    """The pydantic class that the key path leads to, through optional fields, unions and mappings; None if
    unclear."""
    for part in path:
        fields = {field.alias or name: field for name, field in getattr(model, "model_fields", {}).items()}
        annotation = fields[part].annotation if part in fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        classes = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if annotation is not None and classes:
            model = classes[0]
        elif annotation is not None:
            model = annotation
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


# --- rehearsal ----------------------------------------------------------------------------------------------

REHEARSAL_STEPS = 24
REHEARSAL_WARMUP = 4
REHEARSAL_SEQUENCES = 21  # divides by neither 2 nor 4 ranks


def rehearsal_count(layers: int) -> int:
    """Layer count or range end of the rehearsal: a third, rounded up, so that 12, 14, 16 of 24 become 4, 5, 6
    of 8."""
    return math.ceil(layers / 3)


def rehearsal(experiment: Experiment) -> Experiment:
    """The same experiment shrunk to two CPU cores in minutes: about a third of the layers, width 64, 24 steps
    of 21 sequences, the embedded corpus in several shards. Every layer count, range and list goes through one
    map; runs keep their names, starts and growth. Marked `rehearsal`, so that nothing mistakes its numbers
    for results."""
    raw = experiment.model_dump(mode="json", by_alias=True)
    heads, length = 5 if experiment.model.heads % 2 else 4, 64  # an odd head count stays odd

    def shrink_steps(steps: int) -> int:
        return max(1, round(steps * REHEARSAL_STEPS / experiment.train.steps))

    def shrink_train(train: dict, whole: bool) -> dict:
        small = (
            dict(train) if whole else {k: v for k, v in train.items() if k not in ("precision", "deepspeed")}
        )
        if "steps" in small:
            small["steps"] = max(REHEARSAL_WARMUP, shrink_steps(small["steps"]))
        if whole or "batch_tokens" in small:
            small["batch_tokens"] = REHEARSAL_SEQUENCES * length
        if whole or "warmup_steps" in small:
            small["warmup_steps"] = REHEARSAL_WARMUP
        if whole:
            small.update(
                precision="fp32",
                deepspeed="ds_configs/cpu.json",
                lr=max(experiment.train.lr, 1e-3),
                eval_every=8,
                eval_windows=40,
                final_windows=80,
                log_every=1,
                checkpoint_every=8,
            )
        for key in ("eval_every", "checkpoint_every"):
            if not whole and key in small:
                small[key] = min(8, small[key])
        return small

    raw["rehearsal"] = True
    raw["data"] = Data(
        name="rehearsal",
        source="embedded",
        tokenizer="bpe:1024",
        end_of_text=experiment.data.end_of_text,
        validation=ValidationSplit(fraction=0.1),
        shard_tokens=100_000,
        max_tokens=1_500_000,
        sequence_length=length,
        sampling=experiment.data.sampling,
    ).model_dump(mode="json")
    raw["model"] = {
        "size": f"{experiment.model.family}_tiny",
        "layers": rehearsal_count(experiment.model.layers),
        "width": 16 * heads,
        "heads": heads,
        "positions": length,
        "vocab_size": 1024,
        "tied_head": experiment.model.tied_head,
    }
    raw["train"] = shrink_train(raw["train"], whole=True)
    raw["evaluate"]["task_files"] = str(RECIPES / "lm_eval" / "rehearsal")
    for task in raw["evaluate"]["tasks"].values():  # of the same kind, on sixteen documents that are here
        kind = (
            "text"
            if "word_perplexity" in task["metrics"]
            else "word"
            if "perplexity" in task["metrics"]
            else "choice"
        )
        task.update(task=f"rehearsal_{kind}", shots=min(task["shots"], 2))
    for run in raw["runs"].values():
        run["train"] = shrink_train(run["train"], whole=False)
        run["keep_at"] = sorted({shrink_steps(step) for step in run["keep_at"]})
        if run["layers"]:
            run["layers"] = rehearsal_count(run["layers"])
        if run["grow"]:
            run["grow"]["by"] = rehearsal_count(run["grow"]["by"])
            run["grow"]["max_layers"] = rehearsal_count(run["grow"]["max_layers"])
        for start in filter(None, (run["init"]["inherit"], run["init"]["stack"])):
            start["layers"] = _rehearsal_layers(start["layers"])
            for key in ("depth", "at"):
                if start.get(key):
                    start[key] = rehearsal_count(start[key])
    return validate(Experiment, raw, f"rehearsal of {experiment.name}")


def _rehearsal_layers(layers: str | list[int]) -> str | list[int]:
    if isinstance(layers, list):
        return [index // 3 for index in layers[::3]]  # as many as rehearsal_count says, in their order
    ends = [end.strip() for end in layers.split(":")]
    return ":".join(
        str(int(math.copysign(rehearsal_count(abs(int(end))), int(end)))) if end else "" for end in ends
    )
