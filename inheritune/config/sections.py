"""Sections of an experiment that hold for all of its runs: data, model, train and evaluate."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from inheritune.config import names, values
from inheritune.config.catalog import MODEL_SIZES, TASKS
from inheritune.config.fields import (
    AboveZero,
    BelowOne,
    Layers,
    Length,
    NotNegative,
    Steps,
    Strict,
    Tokens,
    Width,
    Windows,
    check_name,
)
from inheritune.config.source_shape import find_config, find_contradictions, read_shape
from inheritune.errors import UserError, suggest_name

LATER_KEYS = ("config", "split", "interleave", "deduplicate")
"""Keys of `data` that count only where they are set."""
WEIGHTS_TOLERANCE = 1e-6
"""Of the sum of a mixture's weights, for thirds."""


class ValidationSplit(Strict):
    """The held-out documents: a random `fraction`, or the whole first shard (`first_shard: true`)."""

    fraction: Annotated[float, values.INSIDE_ONE] | None = None
    seed: Annotated[int, values.SEED] = 2357
    """Seed of the random fraction; 2357 is nanoGPT's, used by the paper."""
    first_shard: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> "ValidationSplit":
        if (self.fraction is None) == (not self.first_shard):
            raise ValueError("give either 'fraction' or 'first_shard: true'")
        return self


class Source(Strict):
    """Where documents come from."""

    source: Literal["embedded", "files", "hub", "interleave"]
    """embedded: the Python standard library's text; files: local globs; hub: a pinned data set on the Hub;
    interleave: a mixture of several of these."""
    files: list[str] | dict[str, list[str]] = []
    """Globs and folders of `save_to_disk` (source: files), or file names inside the data set (source: hub). A
    mapping names groups for `weights`."""
    repo: str | None = None
    revision: str | None = None
    """Commit of the Hub data set. A branch name would let the data change under an experiment."""
    config: str | None = None
    """Configuration (subset) of the Hub data set, where `files` names no files; by default its only one."""
    split: str | None = None
    """Split of that configuration, or of a folder of `save_to_disk`; by default train, or the only one."""
    text_key: str = "text"
    """Key (JSONL) or column (parquet, CSV, Arrow) that holds a document's text, or its chat: a list of
    messages, which the tokenizer's chat template turns into text."""

    @model_validator(mode="after")
    def _located(self) -> "Source":
        if self.source == "files" and not self.files:
            raise ValueError("'files' is needed for source: files")
        if self.source == "hub" and not (self.repo and self.revision):
            raise ValueError("'repo' and 'revision' (a commit) are needed for source: hub")
        if self.config is not None and (self.source != "hub" or self.files):
            raise ValueError("'config' is for source: hub without 'files', which name the files themselves")
        if self.split is not None and (self.source not in ("hub", "files") or self.repo and self.files):
            raise ValueError("'split' is for source: hub without 'files', or for a folder of save_to_disk")
        return self


class WeightedSource(Source):
    """A part of a mixture."""

    weight: Annotated[float, values.WEIGHT]
    """Share in the tokens read. The weights of a mixture add up to 1."""

    @model_validator(mode="after")
    def _simple(self) -> "WeightedSource":
        if self.source == "interleave" or isinstance(self.files, dict):
            raise ValueError("a part of a mixture is one source, with a list of 'files' or a data set")
        return self


class Data(Source):
    """The documents, their tokenizer, and the order in which tokens are read."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    weights: dict[str, Annotated[float, values.WEIGHT]] = {}
    """Share of each group of `files` in the tokens read; the shares need not add up to one."""
    interleave: dict[str, WeightedSource] = {}
    """Parts of a mixture (source: interleave), each with its `weight`. Tokens are taken from the part that is
    furthest behind its share, until a part has no more documents."""
    deduplicate: bool = False
    """Leave out a document whose text an earlier one had, to the letter."""
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
    window_start: Literal["end_of_text"] | None = None
    """The token in place of each window's first one, in training, validation and analysis, as models with a
    beginning-of-text token read. By default the text's own."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        return check_name(names.find_folder_problem, name)

    @model_validator(mode="after")
    def _complete(self) -> "Data":
        if (self.source == "interleave") != bool(self.interleave):
            raise ValueError("'interleave' (parts with weights) goes with source: interleave")
        if self.interleave and (self.files or self.repo or self.text_key != "text"):
            raise ValueError("with source: interleave, each part has its own 'files', 'repo' and 'text_key'")
        total = sum(part.weight for part in self.interleave.values())
        if self.interleave and abs(total - 1) > WEIGHTS_TOLERANCE:
            raise ValueError(f"the weights of 'interleave' add up to {total:g}, not to 1")
        groups = set(self.files) if isinstance(self.files, dict) else set()
        if set(self.weights) != groups and self.weights:
            raise ValueError(f"'weights' names {sorted(self.weights)}, 'files' names {sorted(groups)}")
        return self

    def preparation(self) -> dict[str, Any]:
        """Return the keys that decide the bytes of the shards: what the data hash covers.

        How windows are read from the shards is left out."""
        keys = self.model_dump(mode="json", exclude={"sequence_length", "sampling", "window_start"})
        # data that was prepared before these keys existed keeps its hash
        return {key: value for key, value in keys.items() if key not in LATER_KEYS or value}

    @property
    def sources(self) -> dict[str, Source]:
        """The source of each part of a mixture, or the only one under an empty name."""
        return {**self.interleave} or {"": self}

    def takes_from(self, kind: str) -> bool:
        """Return whether a source of the documents is of this kind."""
        return any(source.source == kind for source in self.sources.values())

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each group of documents in the tokens read; empty if they follow one another."""
        return {name: part.weight for name, part in self.interleave.items()} or self.weights


DESCRIBED_FAMILIES = ("gpt2", "llama")
"""Families that a named size and a few numbers describe. Of any other, a config.json is needed."""


class Model(Strict):
    """The reference's shape: a named `size` (sizes.yaml), any of whose numbers may be replaced; or that of an
    existing model (`from`), with all that its config.json says."""

    size: str | None = None
    from_: Annotated[str | None, Field(alias="from")] = None
    """A folder or Hub id whose config.json is the shape. Numbers stated alongside must be the same."""
    revision: str | None = None
    """The Hub's commit of `from`."""
    family: str
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
    def _complete(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        size, source = raw.get("size"), raw.get("from", raw.get("from_"))
        if source is not None and not (isinstance(source, str) and source.strip()):
            raise ValueError(f"from: {source!r} is neither a folder nor a Hub id (owner/name)")
        if source is None or size is not None:
            if not isinstance(size, str) or size not in MODEL_SIZES:
                raise ValueError(f"unknown model size '{size}'; {suggest_name(size, MODEL_SIZES)}")
            raw = {**MODEL_SIZES[size], **raw}
        if isinstance(source, str):
            return _take_shape(source, raw)
        raw.setdefault("kv_heads", raw["heads"])
        if isinstance(raw["width"], int):  # otherwise pydantic reports the problem
            raw.setdefault("mlp_width", 4 * raw["width"])
        raw.setdefault("tied_head", raw["family"] == "gpt2")
        return raw

    @model_validator(mode="after")
    def _divides(self) -> "Model":
        if self.from_:
            return self  # it exists, so it is possible
        if self.revision:
            raise ValueError("'revision' is a commit of 'from'; leave it out")
        if self.family not in DESCRIBED_FAMILIES:
            raise ValueError(
                f"family '{self.family}' is not described by a size; give 'from', a folder or Hub id of a "
                f"model of this family, or one of the families {' and '.join(DESCRIBED_FAMILIES)}"
            )
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")
        if self.family == "gpt2" and self.kv_heads != self.heads:
            raise ValueError("GPT-2 has no grouped-query attention: leave out kv_heads")
        return self


def _take_shape(source: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Return `raw`, the section `model`, with the shape of `source`.

    Raises ValueError if there is no such model, or if `raw` states another shape."""
    try:
        path = find_config(source, raw.get("revision"))
        shape = read_shape(path)
    except UserError as error:
        raise ValueError(f"from: {error}") from None
    if found := find_contradictions(raw, shape, path):
        raise ValueError(f"{'; '.join(found)}; leave out what 'from' says")
    shape = {"kv_heads": shape["heads"], "mlp_width": 4 * shape["width"], **shape}
    return {**shape, **raw}


class Train(Strict):
    """Optimization. recipes/paper/hyperparameters.csv has the paper's values."""

    steps: Steps
    batch_tokens: Annotated[int, values.BATCH]
    """Global batch in tokens: sequences x sequence_length. Any number of GPUs divides it (batches.py)."""
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
    """bf16_autocast keeps fp32 masters and accumulation (as the paper's code did). auto is bf16_autocast on a
    GPU and fp32 on a CPU."""
    deepspeed: str = "ds_configs/zero3.json"
    eval_every: Steps = 1000
    eval_windows: Windows = 400
    """Validation windows for the curve; nested in final_windows."""
    final_windows: Annotated[int, values.FINAL_WINDOWS] = 4096
    """Validation windows at a stage's end, for tables and the stop rule of growth; at least two, for an
    interval."""
    log_every: Steps = 10
    checkpoint_every: Steps = 1000
    keep_last: Annotated[int, values.CHECKPOINTS] = 2
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "inheritune"

    @model_validator(mode="after")
    def _consistent(self) -> "Train":
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


class Task(Strict):
    """A downstream task, scored by lm-eval."""

    task: str
    """lm-eval's name of a task or group."""
    metrics: Annotated[list[str], Field(min_length=1)]
    """lm-eval's names. The first is the task's score; the others are recorded alongside."""
    shots: Annotated[int, values.SHOTS] = 0
    """Few-shot examples before each question."""


class Evaluate(Strict):
    """What `evaluate` measures besides the validation loss."""

    tasks: dict[str, Task] = {}
    """Names of recipes/lm_eval/tasks.yaml, as a list or with keys that replace theirs; or names of your own
    with all keys."""
    task_files: str | None = None
    """Folder with your own lm-eval task files (YAML)."""
    batch: Annotated[int, values.SEQUENCES] = 16
    """Sequences per forward and rank."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tasks: Any) -> dict[str, dict]:
        named = {str(name): {} for name in tasks} if isinstance(tasks, list) else tasks
        if not isinstance(named, dict) or not all(isinstance(own, dict) for own in named.values()):
            raise ValueError("give a list of names, or a mapping of names to {task, metrics, shots}")
        for name, own in named.items():
            check_name(names.find_task_problem, str(name))
            if name not in TASKS and "task" not in own:
                raise ValueError(f"unknown task '{name}'; {suggest_name(name, TASKS)}")
        return {name: {**TASKS.get(name, {}), **own} for name, own in named.items()}


class TableRow(Strict):
    """A row of the experiment's own table: a label for a run (a grown run gives one row per stage)."""

    run: str
    label: str
