"""What is wrong with a DeepSpeed JSON, found before a run queues and again at its start.

DeepSpeed ignores keys it does not know at the top level, keys that do nothing at the stage chosen, and
"auto". So: which keys exist comes from the installed DeepSpeed (`valid_keys` watches it read a block); what a
key means here is data (dslint.yaml, a verdict for each); values are judged by DeepSpeed itself
(`deepspeed_refuses`). Only those two import deepspeed. A test fails when a new DeepSpeed has a key without a
verdict.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from inheritune.config import environment
from inheritune.config.experiment import Model, Train
from inheritune.config.values import Kind
from inheritune.errors import UserError, nearest

MICRO = "train_micro_batch_size_per_gpu"
OWN_KEYS = ("activation_checkpointing", "compile")
SIZE, SIZE_OR_NONE = Kind("elements", gt=0, le=10**12), Kind("elements", ge=0, le=2**63)
NUMBERS = {
    f"zero_optimization.{key}": SIZE
    for key in ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size")
}
NUMBERS |= {
    f"zero_optimization.{prefix}{key}": SIZE_OR_NONE
    for key in (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "module_granularity_threshold",
    )
    for prefix in ("stage3_", "")
}
NUMBERS |= {
    f"zero_optimization.offload_param.{key}": SIZE_OR_NONE
    for key in ("buffer_count", "buffer_size", "max_in_cpu")
}
NUMBERS |= {"zero_optimization.zero_hpz_partition_size": Kind("ranks", gt=0, le=10**6)}
"""Whole numbers of the JSON and what they may be."""
VERDICTS = yaml.safe_load((Path(__file__).parent / "dslint.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Problem:
    """`key`: path in the JSON, with dots; `severity`: a refused JSON trains nothing, a warning is logged
    once."""

    key: str
    severity: Literal["refuse", "warn"]
    sentence: str


def report(path: str | Path, problems: list[Problem]) -> list[str]:
    """Sentences of the warnings. Raises UserError with every problem in one message if any of them is
    refused."""
    refused = [problem.sentence for problem in problems if problem.severity == "refuse"]
    if refused:
        raise UserError(f"{path}: {refused[0]}" if len(refused) == 1 else "\n  ".join([f"{path}:", *refused]))
    return [f"{path}: {problem.sentence}" for problem in problems]


def lint(settings: dict, model: Model, train: Train, ranks: int | None = None) -> list[Problem]:
    """Every problem of the JSON `settings` (as parsed) for the experiment's `model` and `train`, on `ranks`
    GPUs if that number is known. Memory is judged for the whole reference, of which the other runs are
    slices."""
    values = {key: value for key, value in flatten(settings).items() if key.partition(".")[0] != "inheritune"}
    judges = (
        lambda: form(settings),
        lambda: _unknown({key: value for key, value in settings.items() if key != "inheritune"}),
        lambda: _by_rules(values | {"train.precision": train.precision}),
        lambda: _by_ranks(values, ranks, model) if ranks else [],
        lambda: deepspeed_refuses(settings),
    )
    found: list[Problem] = []
    for judge in judges:  # each takes for granted what those before it refuse
        if not any(problem.severity == "refuse" for problem in found):
            found += judge()
    return found


def form(settings: dict) -> list[Problem]:
    """What needs no DeepSpeed to see: keys of the experiment, our own block, "auto", the micro batch, the
    stage, time-outs."""

    def refuse(key, sentence):
        found.append(Problem(key, "refuse", sentence))

    found = _by_timeout()
    for key in settings:
        if key in VERDICTS["experiment"]:
            home = VERDICTS["experiment"][key]
            refuse(key, f"sets '{key}', which belongs to the experiment ({home}); remove it from the JSON")
    ours = settings.get("inheritune", {})
    if not isinstance(ours, dict):
        refuse("inheritune", f"'inheritune' must be an object with {' and '.join(OWN_KEYS)}, not {ours!r}")
        ours = {}
    for key, value in ours.items():
        if key not in OWN_KEYS:
            refuse(f"inheritune.{key}", f"unknown key '{key}' in 'inheritune'; {nearest(key, OWN_KEYS)}")
        elif not isinstance(value, bool):
            refuse(f"inheritune.{key}", f"inheritune.{key} must be true or false (got {value!r})")
    found += _by_numbers(flatten(settings))
    micro = settings.get(MICRO)
    if isinstance(micro, bool) or not isinstance(micro, int) or micro < 1:
        refuse(MICRO, f"{MICRO} must be a positive number of sequences (got {micro!r})")
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        key, got = (
            ("zero_optimization.stage", stage) if isinstance(zero, dict) else ("zero_optimization", zero)
        )
        refuse(
            key, f'{key} (got {got!r}): write "zero_optimization": {{"stage": N}} with N one of 0, 1, 2, 3'
        )
    told = {problem.key for problem in found}
    for key, value in flatten(settings).items():
        if value == "auto" and key not in told and key.partition(".")[0] not in told:
            refuse(
                key,
                f"'{key}' is \"auto\", which only the Hugging Face Trainer fills in; give a value or leave "
                f"the key out",
            )
    return found


def _by_numbers(values: dict) -> list[Problem]:
    """Sizes and counts that are none: DeepSpeed takes true for 1, and divides by some of them."""
    found = []
    for key, value in values.items():
        kind, problem = NUMBERS.get(key) if value != "auto" else None, ""  # of which `form` says its own
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if isinstance(value, float) and not math.isfinite(value):
            problem = "is not finite"
        elif kind and not whole:
            problem = "is no valid integer"
        elif kind:
            problem = kind.problem(value) and f"must be {kind.problem(value)}"
        if problem:
            found.append(Problem(key, "refuse", f"{key} = {value!r} {problem}; correct it or leave it out"))
    return found


def flatten(block: dict, path: str = "") -> dict:
    """{"zero_optimization": {...}, "zero_optimization.stage": 3, ...}: blocks and values by their paths."""
    found = {}
    for key, value in block.items():
        found[f"{path}{key}"] = value
        if isinstance(value, dict):
            found |= flatten(value, f"{path}{key}.")
    return found


def _unknown(block: dict, path: tuple = ()) -> list[Problem]:
    """Keys that this DeepSpeed has removed, does not know or calls deprecated, and two spellings of one
    key."""
    from deepspeed.runtime import config

    zero = ("zero_optimization",)
    gone = {(): config._REMOVED_TOP_LEVEL_CONFIG_KEYS, zero: config._REMOVED_ZERO_CONFIG_KEYS}.get(path, {})
    valid = {key: what for key, what in valid_keys(path).items() if key not in gone}
    found: list[Problem] = []
    for key, value in (
        block.items() if valid else ()
    ):  # where nothing is valid is a value, or names of the user's own
        name = ".".join((*path, key))
        canonical, deprecated = valid.get(key, (key, ""))
        twin = next(
            (other for other in block if other != key and valid.get(other, ("",))[0] == canonical), None
        )
        sentence = ""
        if key in gone:
            sentence = f"'{name}' is gone from DeepSpeed ({gone[key].partition('. ')[0]}); remove it"
        elif key not in valid:
            where = f"in '{'.'.join(path)}'" if path else "at the top level"
            home = "it belongs in 'zero_optimization'" if not path and key in valid_keys(zero) else ""
            sentence = (
                f"unknown key '{key}' {where}; "
                f"{home or nearest(key, [*valid, *([] if path else ['inheritune'])])}"
            )
        elif deprecated:
            sentence = f"'{name}' is deprecated; write {deprecated} instead"
        elif twin and canonical != key:
            sentence = f"'{name}' and '{twin}' are one key; keep '{canonical}'"
        elif isinstance(value, dict):
            found += _unknown(value, (*path, key))
        found += [Problem(name, "refuse", sentence)] if sentence else []
    return found


class _Watched(dict):
    """A block that notes which of its keys are asked for."""

    def __init__(self, *pairs):
        super().__init__(*pairs)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # so that `key in block.keys()` is seen too


_PROBE = "no such key"


@cache
def valid_keys(path: tuple = ()) -> dict[str, tuple[str, str]]:
    """{spelling: (canonical name, what replaces it if it is deprecated)} of the keys that the installed
    DeepSpeed reads in the block at `path` (() is the whole JSON), found by letting it read one; {} if nothing
    is read there by name."""
    from pydantic import ValidationError

    watched = _Watched({_PROBE: 0})
    nested: dict = watched
    for key in reversed(path):
        nested = {key: nested}
    nested.setdefault(MICRO, 1)
    error = _read(nested)  # its parser stumbles in many ways over a block where it wants a value
    if isinstance(error, ValidationError):  # a pydantic block refuses the probe, and so names its class
        return _fields(error)
    return {key: (key, "") for key in watched.asked - {_PROBE}}


def _fields(error) -> dict[str, tuple[str, str]]:
    """valid_keys of the pydantic block that refused the probe."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    from inheritune.config.experiment import model_at

    def below(model):
        return [model, *(found for child in model.__subclasses__() for found in below(child))]

    problem = next((p for p in error.errors() if p["loc"] and p["loc"][-1] == _PROBE), None)
    owner = next((model for model in below(DeepSpeedConfigModel) if model.__name__ == error.title), None)
    block = model_at(owner, problem["loc"][:-1]) if owner and problem else None
    found = {}
    for name, field in block.model_fields.items() if block else ():
        extra = field.json_schema_extra or {}
        deprecated = str(extra.get("new_param") or "nothing") if extra.get("deprecated") else ""
        found |= dict.fromkeys({name, field.alias or name}, (field.alias or name, deprecated))
    return found


def _read(settings: dict) -> Exception | None:
    """Let DeepSpeed read `settings`.  -> what it raises"""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(settings)
    except Exception as error:
        return error
    return None


def deepspeed_refuses(settings: dict) -> list[Problem]:
    """What DeepSpeed's own reader refuses, block by block or else as a whole; it says why, we say where."""
    from pydantic import ValidationError

    plain = {key: value for key, value in settings.items() if key != "inheritune"}
    errors = {name: _read({MICRO: 1, name: value}) for name, value in plain.items()}
    errors = {name: error for name, error in errors.items() if error} or {
        "these keys together": _read({**plain})
    }
    found = []
    for name, error in errors.items():
        for problem in error.errors() if isinstance(error, ValidationError) else ():
            key, why = (
                ".".join(map(str, (name, *problem["loc"]))),
                problem["msg"].removeprefix("Value error, "),
            )
            got = f" = {problem['input']!r}" if problem["loc"] else ""
            found.append(
                Problem(key, "refuse", f"DeepSpeed refuses {key}{got}: {why}; correct it or leave it out")
            )
        if error and not isinstance(error, ValidationError):
            got = f" = {settings[name]!r}" if name in settings else ""
            found.append(
                Problem(name, "refuse", f"DeepSpeed refuses {name}{got}: {error}; correct it or leave it out")
            )
    return found


def _by_rules(values: dict) -> list[Problem]:
    """The verdicts of dslint.yaml: keys that do nothing at this stage, and its rules."""
    stage = values.get("zero_optimization.stage", 0)
    zero = {f"zero_optimization.{key}": name for key, (name, _) in valid_keys(("zero_optimization",)).items()}
    values = {
        f"zero_optimization.{zero[key]}" if key in zero else key: value for key, value in values.items()
    }
    found = []
    for rule in VERDICTS["rules"]:
        key = rule["key"]
        told = any(key == p.key or key.startswith(f"{p.key}.") for p in found)
        if not told and stage in rule.get("stages", [stage]) and _holds(rule, values):
            sentence = rule["say"].format(key=key, value=values.get(key), stage=stage)
            found.append(Problem(key, rule["severity"], sentence))
    for key, stages in VERDICTS["stages"].items():
        if key in values and stage not in stages and not any(p.key.startswith(key) for p in found):
            sentence = (
                f"'{key}' does nothing at ZeRO {stage} (only at {', '.join(map(str, stages))}); remove it"
            )
            found.append(Problem(key, "warn", sentence))
    return found


def _holds(rule: dict, values: dict) -> bool:
    """Whether the rule's key has one of the values in `is` (any, without it; it is missing, with `absent`)
    and none of `isnt`, the keys of `with` have theirs, and no key of `unless` has."""

    def has(key, among):
        return key in values and (among is None or values[key] in among)

    own = rule["key"] not in values if rule.get("absent") else has(rule["key"], rule.get("is"))
    own = own and values.get(rule["key"]) not in rule.get("isnt", [])
    others = all(has(*pair) for pair in rule.get("with", {}).items())
    return own and others and not any(has(*pair) for pair in rule.get("unless", {}).items())


def _by_ranks(values: dict, ranks: int, model: Model) -> list[Problem]:
    """What the number of GPUs decides."""
    found = []
    zero = "zero_optimization."
    second = values.get(f"{zero}zero_hpz_partition_size", 1)
    if isinstance(second, int) and second > 1 and (second >= ranks or ranks % second):
        severity = "warn" if second >= ranks else "refuse"
        why = (
            "keeps a second copy of the weights for nothing"
            if second >= ranks
            else "does not divide their number"
        )
        got = f"'{zero}zero_hpz_partition_size' = {second} with {ranks} GPU(s) {why}"
        sentence = f"{got}; write the GPUs of one node of several, or remove it"
        found.append(Problem(f"{zero}zero_hpz_partition_size", severity, sentence))
    blocks = {
        "offload_optimizer": 16,
        "offload_param": 4,
    }  # bytes per parameter: master, two moments, gradient; weights
    moved = {
        name: size for name, size in blocks.items() if values.get(f"{zero}{name}.device", "none") != "none"
    }
    stage = values.get(f"{zero}stage", 0)
    if stage and ranks == 1 and not moved:
        sentence = (
            f"'{zero}stage' = {stage} on 1 GPU shards nothing and saves no memory; offload, or take "
            f"zero0.json"
        )
        found.append(Problem(f"{zero}stage", "warn", sentence))
    pinned = {name: size for name, size in moved.items() if values.get(f"{zero}{name}.pin_memory", True)}
    return found + (_by_memory(pinned, ranks, model) if pinned else [])


def _by_memory(pinned: dict[str, int], ranks: int, model: Model) -> list[Problem]:
    """Pinned host memory, `pinned` {block: bytes per parameter}, against the --mem of this job. (CUDA's
    pinned memory counts there; `ulimit -l` does not bind it.)"""
    from inheritune.models.architectures import count_parameters, hf_config

    allowed = environment.number("SLURM_MEM_PER_NODE") * 2**20  # of MiB; 0 is all of the node's
    here = environment.number("LOCAL_WORLD_SIZE") or min(ranks, 8)  # ranks of one host
    need = (
        sum(pinned.values()) * count_parameters(hf_config(model, model.layers)) * here / ranks
        if allowed
        else 0
    )
    if need <= allowed:
        return []
    key = f"zero_optimization.{next(iter(pinned))}.pin_memory"
    got = f"'{key}' locks {need / 1e9:.1f} GB of each host, the job's --mem is {allowed / 1e9:.1f} GB"
    return [Problem(key, "warn", f"{got}; ask for more, use more GPUs, or write false")]


def _by_timeout() -> list[Problem]:
    """DEEPSPEED_TIMEOUT, how long ranks wait for each other (dist.start: 60 minutes where it is not set).
    DeepSpeed cannot even be imported where it is no number."""
    key = "DEEPSPEED_TIMEOUT"
    try:
        patience = environment.number(key)
    except UserError as error:
        return [Problem(key, "refuse", str(error))]
    short = (
        f"{key}={patience} minutes: one slow save or evaluation ends the job on all ranks; set 60, or unset "
        f"it"
    )
    return [Problem(key, "warn", short)] if patience < 30 else []
