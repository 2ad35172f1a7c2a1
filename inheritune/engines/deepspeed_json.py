"""The DeepSpeed JSON: reading it, and completing it with what the experiment owns.

ds_configs/*.json hold settings that change memory and speed. Settings that change the mathematics belong to
the experiment and are added here; a JSON that sets one of them too is refused (dslint.py), so that each
number has one home.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.config.paths import REPOSITORY, resolve_path
from inheritune.config.reading import read_text, refuse_duplicate_keys
from inheritune.config.sections import Train
from inheritune.engines import dslint
from inheritune.errors import UserError, suggest_name

if TYPE_CHECKING:
    import torch


def load_deepspeed_json(path: str | Path) -> dict:
    """Return the settings of a DeepSpeed JSON, which may have comments. Raises UserError if it is missing,
    malformed or sets what the experiment owns; `dslint.lint` finds the other problems."""
    import hjson

    file = resolve_path(str(path))
    if not file.is_file():
        known = sorted(p.name for p in file.parent.glob("*.json")) if file.parent.is_dir() else []
        known = known or sorted(f"ds_configs/{p.name}" for p in (REPOSITORY / "ds_configs").glob("*.json"))
        raise UserError(f"DeepSpeed JSON {path} does not exist; {suggest_name(file.name, known)}")

    text = read_text(file)
    try:
        settings = hjson.loads(text, object_pairs_hook=partial(refuse_duplicate_keys, path))
    # hjson's own errors, and those of numbers such as 1e400
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(settings).__name__}")
    dslint.check_problems(path, dslint.check_form(settings))
    return settings


def make_deepspeed_config(settings: dict, train: Train, micro_batch: int, accumulation: int) -> dict:
    """Return the complete configuration for `deepspeed.initialize`: the JSON's settings plus what the
    experiment owns."""
    config = {key: value for key, value in settings.items() if key != "inheritune"}
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation
    config["gradient_clipping"] = train.clip
    config["zero_allow_untested_optimizer"] = True
    # torch's fused AdamW works with offload too, and nothing is compiled
    config["zero_force_ds_cpu_optimizer"] = False
    # the throughput timer would wait for the GPU twice in each micro batch
    config.setdefault("timers", {"throughput": {"enabled": False}})
    if train.precision == "bf16_autocast":  # no module's gradients are summed over ranks in bf16
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def get_zero_stage(settings: dict) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def resolve_precision(train: Train, device: torch.device) -> Train:
    """Return `train` with precision `auto` replaced: bf16_autocast on a GPU, fp32 on the CPU (where bf16
    products are slower)."""
    chosen = "bf16_autocast" if device.type == "cuda" else "fp32"
    return train.model_copy(update={"precision": chosen}) if train.precision == "auto" else train
