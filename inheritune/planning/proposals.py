"""Changes of a DeepSpeed JSON that save memory, the cheapest first."""

import copy
import itertools
import math
from typing import Any

from inheritune.planning.states import ZERO_DEFAULTS, read_offloads

STAGE_SLOWDOWN = (1.0, 1.01, 1.06, 1.25)
"""Rough factors on the time of a step, by ZeRO stage. Only the order of these and the factors below matters,
because the cheapest change that fits is proposed."""
SMALL_BUCKETS = (
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
)
ON_HOST = {"device": "cpu", "pin_memory": True}

Change = tuple[float, dict[str, Any]]
"""(slowdown, {dotted key: new value})."""


def propose_changes(settings: dict) -> list[Change]:
    """Return every change of `settings` that saves memory, the cheapest first."""
    optimizer_away, _ = read_offloads(settings)
    found = []
    for chosen in itertools.product(*_list_choices(settings)):
        patch = {key: value for _, keys in chosen for key, value in keys.items()}
        if not _is_possible(patch, optimizer_away):
            continue
        stage = patch["zero_optimization.stage"]
        patch = {key: value for key, value in patch.items() if stage == 3 or "stage3_" not in key}
        slowdown = math.prod(cost for cost, _ in chosen)
        found.append((slowdown, {k: v for k, v in patch.items() if get_value(settings, k) != v}))
    return sorted(found, key=lambda change: (change[0], len(change[1])))


def _list_choices(settings: dict) -> list[list[Change]]:
    """Return the possible values of each kind of setting: micro batch, activation checkpointing, ZeRO stage,
    buckets, and offloading of the optimizer and of the weights."""
    zero, micro = settings.get("zero_optimization", {}), settings["train_micro_batch_size_per_gpu"]
    stage = int(zero.get("stage", 0))
    small = {
        f"zero_optimization.{key}": int(min(1e7, zero.get(key, ZERO_DEFAULTS[key]))) for key in SMALL_BUCKETS
    }
    return [
        [
            (1.05**halved, {"train_micro_batch_size_per_gpu": micro >> halved})
            for halved in range(micro.bit_length())
        ],
        [(1.0, {}), (1.33, {"inheritune.activation_checkpointing": True})],
        [
            (STAGE_SLOWDOWN[s] / STAGE_SLOWDOWN[stage], {"zero_optimization.stage": s})
            for s in range(stage, 4)
        ],
        [(1.0, {}), (1.03, small)],
        [(1.0, {}), (2.0, {"zero_optimization.offload_optimizer": ON_HOST})],
        [(1.0, {}), (2.5, {"zero_optimization.offload_param": ON_HOST})],
    ]


def _is_possible(patch: dict, optimizer_away: bool) -> bool:
    """Return whether DeepSpeed can offload what `patch` asks for at the ZeRO stage of `patch`.

    `optimizer_away`: whether the JSON offloads the optimizer already."""
    stage = patch["zero_optimization.stage"]
    optimizer = "zero_optimization.offload_optimizer" in patch
    if optimizer and not stage:
        return False
    weights = "zero_optimization.offload_param" in patch
    return not weights or (stage == 3 and (optimizer or optimizer_away))


def get_value(settings: dict, key: str) -> Any:
    """Return the value of a dotted key, or None."""
    outer, _, inner = key.rpartition(".")
    return (settings.get(outer, {}) if outer else settings).get(inner)


def apply_change(settings: dict, patch: dict) -> dict:
    """Return a copy of `settings` with the dotted keys of `patch` set."""
    new = copy.deepcopy(settings)
    for key, value in patch.items():
        outer, _, inner = key.rpartition(".")
        (new.setdefault(outer, {}) if outer else new)[inner] = value
    return new
