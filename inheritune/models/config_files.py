"""A model's config and generation settings: reading them, and writing them for other programs too.

This repository runs on transformers 5. Its checkpoints are also opened with transformers 4 and with programs
built on it, which read the same files by other keys: a config without `rope_theta` means 10000 to them. So
every writer (`inherit`, final/, weights kept at a step, `export`) takes what it writes from here. The
tokenizer's files come from tokenizer_files.py.
"""

import copy
import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import TYPE_CHECKING, cast

from inheritune.config.source_shape import SPECIAL_IDS, refuse_config, take_text_part
from inheritune.errors import UserError, is_machine_limit
from inheritune.files.json_files import read_json, write_json
from inheritune.files.writing import write_text
from inheritune.models.architectures import find_depth_key
from inheritune.models.dtypes import Dtype
from inheritune.models.plain_configs import PlainConfig, describe_plain, list_setting_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# --- config.json --------------------------------------------------------------------------------------------

MAX_LAYERS = 10_000  # of a config that is read; far above any model


def load_config(path: Path, plain: bool = False) -> "PreTrainedConfig":
    """Load the transformers configuration in `path`, by the classes of transformers alone.

    With `plain` it is a PlainConfig where that is enough, which needs neither transformers nor torch. Code
    stored alongside is never run. Raises UserError for a family outside the architecture table and for a
    model that is quantized, an encoder-decoder, or of a class that transformers does not have."""
    raw = read_json(path)
    if plain and (found := describe_plain(raw)):
        return cast("PreTrainedConfig", found)
    from transformers import CONFIG_MAPPING

    refuse_config(raw, path)
    raw = take_text_part(raw)
    if raw.pop("auto_map", None):
        _check_classes(raw, path)
    layers = raw.get(find_depth_key(raw["model_type"]), 1)
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:  # building such a model would not finish
        raise UserError(
            f"{path} describes a model of {str(layers)[:50]} layers; 1 to {MAX_LAYERS} can be sliced"
        )
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # transformers raises many kinds for a value that it did not expect
        if is_machine_limit(error):
            raise
        raise UserError(
            f"{path} is not a valid {raw['model_type']} config: {' '.join(str(error).split())[:300]}"
        ) from None


def _check_classes(raw: dict, path: Path) -> None:
    """Raise UserError unless transformers has the classes that a config with an auto_map names."""
    import transformers
    from transformers import CONFIG_MAPPING

    named = raw.get("architectures")
    names = named if isinstance(named, list) else []
    foreign = [str(name) for name in names if not hasattr(transformers, str(name))]
    if foreign or raw["model_type"] not in CONFIG_MAPPING:
        what = ", ".join(foreign) or raw["model_type"]
        raise UserError(
            f"{path} needs code that comes with the model (auto_map: {what}), which is never run; only "
            f"families of transformers itself can be sliced"
        )


def write_config(path: Path, config: "PreTrainedConfig", dtype: Dtype) -> None:
    """Write config.json of a causal language model stored in `dtype`, for transformers 4 and 5."""
    described = add_older_keys(_describe_config(config, dtype))
    write_text(path, json.dumps(described, indent=2, sort_keys=True) + "\n")


def _describe_config(config: "PreTrainedConfig", dtype: Dtype) -> dict:
    """Return config.json as transformers 5 writes it."""
    if isinstance(config, PlainConfig):
        return config.describe(dtype.name)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(config)
    config.dtype = dtype.torch
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    described: dict = json.loads(config.to_json_string())
    return described


# --- keys of transformers 4 ---------------------------------------------------------------------------------

RENAMED = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Families whose keys transformers 4 calls by other names."""
EXACT_SCALING = {"olmo": ["factor"], "olmo2": ["factor"], "phi3": ["short_factor", "long_factor"]}
"""Families for which transformers 4 refuses a `rope_scaling` with keys other than `type` and these."""
OLDER_TYPES = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
"""Types of positions that transformers 4.57 has. A family with another one, as Gemma 4, is newer."""
OLDER_KEYS = {
    "torch_dtype",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "num_experts",
    *(name for names in RENAMED.values() for name in names.values()),
}
"""Keys by which transformers 4 reads values that transformers 5 has under others."""


def add_older_keys(described: dict) -> dict:
    """Return `described`, a config as transformers 5 writes it, with the keys that transformers 4 reads.

    transformers 5 reads them too, and prefers `rope_scaling` to all of `rope_parameters`, so the two must
    agree; positions that transformers 4 lacks are not described to it. Where each type of layer has its own,
    transformers 4 has keys for those of full attention and for the frequency of sliding attention."""
    described = _drop_type(described)
    rope = described.get("rope_parameters") or {}
    older = {"torch_dtype": described["dtype"]} if described.get("dtype") else {}
    if "full_attention" in rope:
        if sliding := rope.get("sliding_attention"):
            older["rope_local_base_freq"] = sliding["rope_theta"]
        rope = rope["full_attention"] or {}
    if rope.get("rope_type", "default") not in OLDER_TYPES:
        rope = {}
        older.pop("rope_local_base_freq", None)
    if described.get("num_local_experts") and _counts_experts_otherwise(described["model_type"]):
        older["num_experts"] = described["num_local_experts"]
    names = RENAMED.get(described["model_type"], {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            older[names.get(key, key)] = rope[key]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = _older_scaling(rope, described["model_type"])
        if rope["rope_type"] == "longrope":
            older["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {key: value for key, value in described.items() if key != "rope_scaling"} | older


def _counts_experts_otherwise(model_type: str) -> bool:
    """Return whether the family's `num_local_experts` has `num_experts` for another name (Qwen 3 MoE)."""
    from transformers import CONFIG_MAPPING

    named: dict[str, str] = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    return named.get("num_experts") == "num_local_experts"


def drop_older_keys(described: dict) -> dict:
    """Return `described`, a config as transformers 5 holds it, without the keys of transformers 4."""
    return {key: value for key, value in _drop_type(described).items() if key not in OLDER_KEYS}


def _drop_type(described: dict) -> dict:
    """Return `described` without the `type` of its positions.

    transformers 5 calls it `rope_type` and keeps the old key alongside."""
    rope = described.get("rope_parameters")
    if not isinstance(rope, dict):
        return described
    by_layer = {key: value for key, value in rope.items() if key != "type"}
    for key, value in by_layer.items():
        if isinstance(value, dict):
            by_layer[key] = {name: setting for name, setting in value.items() if name != "type"}
    return {**described, "rope_parameters": by_layer}


def _older_scaling(rope: dict, family: str) -> dict:
    """Return `rope_scaling` for the positions `rope` (flat, as in `rope_parameters`)."""
    elsewhere = {"rope_theta", "partial_rotary_factor", "rope_type"}
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    if isinstance(scaling.get("factor"), int):
        scaling["factor"] = float(scaling["factor"])  # OLMo's config refuses an integer
    exact = {key: scaling[key] for key in EXACT_SCALING.get(family, ()) if key in scaling}
    if exact and not scaling.keys() - exact.keys() - {"original_max_position_embeddings"}:
        return {"type": rope["rope_type"], **exact}  # Phi 3 states the original length outside
    return {"rope_type": rope["rope_type"], **scaling}


# --- generation_config.json ---------------------------------------------------------------------------------


def extract_settings(raw: dict) -> dict:
    """Return the generation_config.json of `raw`, a config.json of transformers 4 with settings in it.

    These are temperature, top_p or the like; the result is {} if it has none. transformers 5 ignores them
    there, and both versions read generation_config.json before the config."""
    kept_in_both = {
        *SPECIAL_IDS,
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "transformers_version",
    }
    names = [key for key in list_setting_names() if key not in kept_in_both]
    settings = {key: raw[key] for key in names if raw.get(key) is not None}
    if not settings:
        return {}
    return settings | {key: raw[key] for key in SPECIAL_IDS if raw.get(key) is not None}


def copy_settings(source: Path, target: Path) -> list[str]:
    """Write the generation settings of the checkpoint `source` into `target`, a new one.

    Returns the names of the files written: generation_config.json, or none."""
    name = "generation_config.json"
    if (source / name).is_file():
        (target / name).write_bytes((source / name).read_bytes().removeprefix(BOM_UTF8))
    elif settings := extract_settings(read_json(source / "config.json")):
        write_json(target / name, settings, seal=False)
    return [name] if (target / name).is_file() else []
