"""The check of a DeepSpeed JSON, before a run is queued and again at its start.

DeepSpeed ignores keys that it does not know at the top level, keys that do nothing at the chosen ZeRO stage,
and "auto". Three things are compared with the JSON instead:

- the keys that exist, from the installed DeepSpeed (`valid_keys` in deepspeed_keys.py);
- what each key means here, from dslint.yaml, which has a verdict for each;
- the values, which DeepSpeed's own reader judges (`find_refusals` in deepspeed_keys.py).

A test fails if a new DeepSpeed has a key without a verdict.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from inheritune.config import environment
from inheritune.config.sections import Model, Train
from inheritune.config.units import format_bytes
from inheritune.config.values import Kind
from inheritune.engines.deepspeed_keys import MICRO, find_refusals, valid_keys
from inheritune.errors import UserError, suggest_name

OWN_KEYS = ("activation_checkpointing", "compile", "background_saves", "gather_in_bf16")
COMPILED_AT_3 = (
    "'inheritune.compile' compiles little at ZeRO 3: DeepSpeed's hooks, which gather the weights of each "
    "module, break the graph, and past torch's limit of compilations blocks run uncompiled; use ZeRO 0 to 2, "
    "or set it to false"
)
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
"""The whole numbers of the JSON and their valid ranges."""
VERDICTS = yaml.safe_load((Path(__file__).parent / "dslint.yaml").read_text(encoding="utf-8"))
OFFLOADED_BYTES = {"offload_optimizer": 16, "offload_param": 4}
"""Bytes per parameter that each block moves to the host: master, two moments, gradient; weights."""
ZERO = ("zero_optimization",)
"""The path of the block of ZeRO's settings."""


@dataclass(frozen=True)
class Problem:
    """A fault of the JSON at the dotted path `key`. A refused JSON trains nothing; a warning is logged
    once."""

    key: str
    severity: Literal["refuse", "warn"]
    sentence: str


def check_problems(path: str | Path, problems: list[Problem]) -> list[str]:
    """Return the sentences of the warnings. Raises UserError with every refusal in one message if there is
    one."""
    refused = [problem.sentence for problem in problems if problem.severity == "refuse"]
    if refused:
        raise UserError(f"{path}: {refused[0]}" if len(refused) == 1 else "\n  ".join([f"{path}:", *refused]))
    return [f"{path}: {problem.sentence}" for problem in problems]


def lint(settings: dict, model: Model, train: Train, ranks: int | None = None) -> list[Problem]:
    """Return every problem of the JSON `settings` (as parsed) for the experiment's `model` and `train`, on
    `ranks` GPUs if that number is known. Memory is estimated for the whole reference, of which the other runs
    are slices."""
    values = {key: value for key, value in flatten(settings).items() if key.partition(".")[0] != "inheritune"}
    checks: tuple[Callable[[], list[Problem]], ...] = (
        lambda: check_form(settings),
        lambda: _check_keys({key: value for key, value in settings.items() if key != "inheritune"}),
        lambda: _check_rules(flatten(settings) | {"train.precision": train.precision}),
        lambda: _check_ranks(values, ranks, model) if ranks else [],
        lambda: [refuse(key, sentence) for key, sentence in find_refusals(settings)],
    )
    found: list[Problem] = []
    for check in checks:  # each relies on what those before it refuse
        if not any(problem.severity == "refuse" for problem in found):
            found += check()
    return found


def check_at_start(
    path: str | Path, settings: dict, model: Model, train: Train, ranks: int | None
) -> list[str]:
    """Return the warnings of `lint`. Raises UserError for its refusals, and if this machine, which is about
    to run the JSON, cannot build what DeepSpeed needs for offloading to a disk."""
    warnings = check_problems(path, lint(settings, model, train, ranks))
    values = flatten(settings)
    for block in OFFLOADED_BYTES:
        key = f"zero_optimization.{block}.device"
        if values.get(key) == "nvme" and not _has_disk_reader():
            raise UserError(
                f"{path}: '{key}' = nvme: DeepSpeed's asynchronous disk reader (async_io) cannot be compiled "
                f"here; install libaio with its headers (libaio-dev), g++ and ninja, or write cpu"
            )
    return warnings


def _has_disk_reader() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


def refuse(key: str, sentence: str) -> Problem:
    """Return the problem of a JSON that must not be used."""
    return Problem(key, "refuse", sentence)


def check_form(settings: dict) -> list[Problem]:
    """Return the problems that can be found without DeepSpeed: keys of the experiment, the 'inheritune'
    block, numbers, the micro batch, the stage, "auto", the timeout."""
    found = _check_timeout()
    for key in settings:
        if key in VERDICTS["experiment"]:
            home = VERDICTS["experiment"][key]
            sentence = f"sets '{key}', which belongs to the experiment ({home}); remove it from the JSON"
            found.append(refuse(key, sentence))
    found += _check_own_block(settings.get("inheritune", {}))
    found += _check_numbers(flatten(settings))
    micro = settings.get(MICRO)
    if isinstance(micro, bool) or not isinstance(micro, int) or micro < 1:
        found.append(refuse(MICRO, f"{MICRO} must be a positive number of sequences (got {micro!r})"))
    zero = settings.get("zero_optimization", {})
    found += _check_stage(zero)
    found += check_compile(settings)
    return found + _check_auto(settings, {problem.key for problem in found})


def check_compile(settings: dict) -> list[Problem]:
    """Return the problem of compiled blocks at ZeRO 3, which `check` and `plan` tell alike."""
    values = flatten(settings)
    if values.get("zero_optimization.stage") != 3 or values.get("inheritune.compile") is not True:
        return []
    return [Problem("inheritune.compile", "warn", COMPILED_AT_3)]


def _check_own_block(own: object) -> list[Problem]:
    """Return the problems of `own`, this repository's block of the JSON."""
    if not isinstance(own, dict):
        sentence = (
            f"'inheritune' must be an object with {', '.join(OWN_KEYS[:-1])} and {OWN_KEYS[-1]}, not {own!r}"
        )
        return [refuse("inheritune", sentence)]
    found = []
    for key, value in own.items():
        path = f"inheritune.{key}"
        if key not in OWN_KEYS:
            found.append(refuse(path, f"unknown key '{key}' in 'inheritune'; {suggest_name(key, OWN_KEYS)}"))
        elif not isinstance(value, bool):
            found.append(refuse(path, f"inheritune.{key} must be true or false (got {value!r})"))
    return found


def _check_stage(zero: object) -> list[Problem]:
    """Return the problem of `zero`, the block zero_optimization, if it names no stage of DeepSpeed's."""
    key, got = "zero_optimization", zero
    if isinstance(zero, dict):
        key, got = "zero_optimization.stage", zero.get("stage", 0)
        if not isinstance(got, bool) and got in (0, 1, 2, 3):
            return []
    sentence = f'{key} (got {got!r}): write "zero_optimization": {{"stage": N}} with N one of 0, 1, 2, 3'
    return [refuse(key, sentence)]


def _check_auto(settings: dict, known: set[str]) -> list[Problem]:
    """Return the problems of values "auto", except at or below the keys `known` to be wrong."""
    found = []
    for key, value in flatten(settings).items():
        if value == "auto" and key not in known and key.partition(".")[0] not in known:
            found.append(
                refuse(
                    key,
                    f"'{key}' is \"auto\", which only the Hugging Face Trainer fills in; give a value or "
                    f"leave the key out",
                )
            )
    return found


def _check_numbers(values: dict) -> list[Problem]:
    """Return the problems of sizes and counts: DeepSpeed reads true as 1, and divides by some of them."""
    found = []
    for key, value in values.items():
        kind = NUMBERS.get(key) if value != "auto" else None  # `_check_auto` handles "auto"
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        problem = ""
        if isinstance(value, float) and not math.isfinite(value):
            problem = "is not finite"
        elif kind and not whole:
            problem = "is not a valid integer"
        elif kind and kind.problem(value):
            problem = f"must be {kind.problem(value)}"
        if problem:
            found.append(refuse(key, f"{key} = {value!r} {problem}; correct it or leave it out"))
    return found


def flatten(block: dict, path: str = "") -> dict:
    """Return {"zero_optimization": {...}, "zero_optimization.stage": 3, ...}: blocks and values by path."""
    found: dict[str, Any] = {}
    for key, value in block.items():
        found[f"{path}{key}"] = value
        if isinstance(value, dict):
            found |= flatten(value, f"{path}{key}.")
    return found


def _check_keys(block: dict, path: tuple = ()) -> list[Problem]:
    """Return the problems of keys that this DeepSpeed has removed, does not know or calls deprecated, and of
    two spellings of one key."""
    from deepspeed.runtime import config

    removed = {(): config._REMOVED_TOP_LEVEL_CONFIG_KEYS, ZERO: config._REMOVED_ZERO_CONFIG_KEYS}
    gone = removed.get(path, {})
    valid = {key: what for key, what in valid_keys(path).items() if key not in gone}
    if not valid:  # the block is a value, or holds names that the user chooses
        return []
    found: list[Problem] = []
    for key, value in block.items():
        name = ".".join((*path, key))
        sentence = _explain_key(key, name, path, block, valid, gone)
        if sentence:
            found.append(refuse(name, sentence))
        elif isinstance(value, dict):
            found += _check_keys(value, (*path, key))
    return found


def _explain_key(
    key: str,
    name: str,
    path: tuple,
    block: dict,
    valid: dict[str, tuple[str, str]],
    gone: dict[str, str],
) -> str:
    """Return what is wrong with `key` of the `block` at `path`, or "". `name` is its full path."""
    if key in gone:
        return f"'{name}' was removed from DeepSpeed ({gone[key].partition('. ')[0]}); remove it"
    if key not in valid:
        where = f"in '{'.'.join(path)}'" if path else "at the top level"
        if not path and key in valid_keys(ZERO):
            home = "it belongs in 'zero_optimization'"
        else:
            home = suggest_name(key, valid if path else [*valid, "inheritune"])
        return f"unknown key '{key}' {where}; {home}"
    canonical, deprecated = valid[key]
    if deprecated:
        return f"'{name}' is deprecated; write {deprecated} instead"
    twin = next((other for other in block if other != key and valid.get(other, ("",))[0] == canonical), None)
    if twin and canonical != key:
        return f"'{name}' and '{twin}' are one key; keep '{canonical}'"
    return ""


def _check_rules(values: dict) -> list[Problem]:
    """Return the problems that dslint.yaml knows: its rules, and keys that do nothing at this stage."""
    stage = values.get("zero_optimization.stage", 0)
    canonical = {
        f"zero_optimization.{key}": f"zero_optimization.{name}" for key, (name, _) in valid_keys(ZERO).items()
    }
    values = {canonical.get(key, key): value for key, value in values.items()}
    found: list[Problem] = []
    for rule in VERDICTS["rules"]:
        key = rule["key"]
        known = any(key == p.key or key.startswith(f"{p.key}.") for p in found)
        if not known and stage in rule.get("stages", [stage]) and _matches_rule(rule, values):
            sentence = rule["say"].format(key=key, value=values.get(key), stage=stage)
            found.append(Problem(key, rule["severity"], sentence))
    for key, stages in VERDICTS["stages"].items():
        if key in values and stage not in stages and not any(p.key.startswith(key) for p in found):
            only = ", ".join(map(str, stages))
            sentence = f"'{key}' does nothing at ZeRO {stage} (only at {only}); remove it"
            found.append(Problem(key, "warn", sentence))
    return found


def _matches_rule(rule: dict, values: dict) -> bool:
    """Return whether the rule applies to `values`. Its key has one of the values in `is` (any, without it; or
    is missing, with `absent`; or is no multiple of `multiple`) and none of `isnt`, the keys of `with` have
    theirs, and no key of `unless` has."""

    def has(key: str, among: list | None) -> bool:
        return key in values and (among is None or values[key] in among)

    own = rule["key"] not in values if rule.get("absent") else has(rule["key"], rule.get("is"))
    own = own and values.get(rule["key"]) not in rule.get("isnt", [])
    if own and "multiple" in rule:
        own = values[rule["key"]] % rule["multiple"] != 0
    others = all(has(*pair) for pair in rule.get("with", {}).items())
    return own and others and not any(has(*pair) for pair in rule.get("unless", {}).items())


def _check_ranks(values: dict, ranks: int, model: Model) -> list[Problem]:
    """Return the problems that depend on the number of GPUs."""
    found = _check_secondary_partition(values.get("zero_optimization.zero_hpz_partition_size", 1), ranks)
    moved = {
        name: size
        for name, size in OFFLOADED_BYTES.items()
        if values.get(f"zero_optimization.{name}.device", "none") != "none"
    }
    stage = values.get("zero_optimization.stage", 0)
    if stage and ranks == 1 and not moved:
        sentence = (
            f"'zero_optimization.stage' = {stage} on 1 GPU shards nothing and saves no memory; offload, or "
            f"take zero0.json"
        )
        found.append(Problem("zero_optimization.stage", "warn", sentence))
    pinned = {
        name: size for name, size in moved.items() if values.get(f"zero_optimization.{name}.pin_memory", True)
    }
    return found + (_check_memory(pinned, ranks, model) if pinned else [])


def _check_secondary_partition(size: object, ranks: int) -> list[Problem]:
    """Return the problem of a secondary partition of `size` GPUs that does not fit `ranks` GPUs."""
    if not isinstance(size, int) or size <= 1 or (size < ranks and ranks % size == 0):
        return []
    severity: Literal["refuse", "warn"] = "warn" if size >= ranks else "refuse"
    why = (
        "keeps a second copy of the weights for nothing" if size >= ranks else "does not divide their number"
    )
    key = "zero_optimization.zero_hpz_partition_size"
    got = f"'{key}' = {size} with {ranks} GPU(s) {why}"
    return [Problem(key, severity, f"{got}; write the GPUs of one node of several, or remove it")]


def _check_memory(pinned: dict[str, int], ranks: int, model: Model) -> list[Problem]:
    """Return the problem of pinned host memory, `pinned` {block: bytes per parameter}, that exceeds the --mem
    of this job. (CUDA's pinned memory counts there; `ulimit -l` does not limit it.)"""
    from inheritune.models.networks import build_config, count_parameters

    allowed = (environment.read_number("SLURM_MEM_PER_NODE") or 0) * 2**20  # of MiB; 0 is all of the node's
    here = environment.read_number("LOCAL_WORLD_SIZE") or min(ranks, 8)  # ranks of one host
    if not allowed:
        return []
    need = sum(pinned.values()) * count_parameters(build_config(model, model.layers)) * here / ranks
    if need <= allowed:
        return []
    key = f"zero_optimization.{next(iter(pinned))}.pin_memory"
    need_gb, allowed_gb = format_bytes(need, "GB"), format_bytes(allowed, "GB")
    got = f"'{key}' locks {need_gb} of each host, the job's --mem is {allowed_gb}"
    return [Problem(key, "warn", f"{got}; ask for more, use more GPUs, or write false")]


def _check_timeout() -> list[Problem]:
    """Return the problem of a DEEPSPEED_TIMEOUT, how long ranks wait for each other, that is too short or not
    a number: then DeepSpeed cannot even be imported."""
    key = "DEEPSPEED_TIMEOUT"
    try:
        minutes = environment.read_number(key)
    except UserError as error:
        return [refuse(key, str(error))]
    if minutes is None or minutes >= 30:
        return []
    sentence = (
        f"{key}={minutes} minutes: one slow save or evaluation ends the job on all ranks; set 60, or unset it"
    )
    return [Problem(key, "warn", sentence)]
