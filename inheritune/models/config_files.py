"""A model's config and generation settings as other programs read them.

This repository runs on transformers 5. Its users also open checkpoints with transformers 4 and with programs
built on it, which read the same files by other keys: a config without `rope_theta` means 10000 to them. So
every writer (`inherit`, final/, weights kept at a step, `export`) takes what it writes from here; the
tokenizer's files are those of tokenizer_files.py.
"""

from codecs import BOM_UTF8
from pathlib import Path

from inheritune.files.rundir import read_json, write_json

# --- config.json --------------------------------------------------------------------------------------------

RENAMED = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Families for which transformers 4 has names of its own."""
EXACT_SCALING = {"olmo": ["factor"], "olmo2": ["factor"], "phi3": ["short_factor", "long_factor"]}
"""Families for which transformers 4 refuses a `rope_scaling` with other keys than `type` and these."""
OLDER_KEYS = {"torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
OLDER_KEYS |= {
    "original_max_position_embeddings",
    *(name for names in RENAMED.values() for name in names.values()),
}


def add_older_keys(described: dict) -> dict:
    """`described`, a config as transformers 5 writes it, with the keys by which transformers 4 knows the same
    values.

    transformers 5 reads them too, and prefers `rope_scaling` to all of `rope_parameters`: so both say the
    same. Where each type of layer has its own positions, transformers 4 knows those of full attention and the
    frequency of sliding attention."""
    described = _drop_type(described)
    rope = described.get("rope_parameters") or {}
    older = {"torch_dtype": described["dtype"]} if described.get("dtype") else {}
    if "full_attention" in rope:
        if sliding := rope.get("sliding_attention"):
            older["rope_local_base_freq"] = sliding["rope_theta"]
        rope = rope["full_attention"] or {}
    names = RENAMED.get(described["model_type"], {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            older[names.get(key, key)] = rope[key]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = _older_scaling(rope, described["model_type"])
        if rope["rope_type"] == "longrope":
            older["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {key: value for key, value in described.items() if key != "rope_scaling"} | older


def drop_older_keys(described: dict) -> dict:
    """`described`, a config as transformers 5 holds it, without what repeats its values in words of
    transformers 4."""
    return {key: value for key, value in _drop_type(described).items() if key not in OLDER_KEYS}


def _drop_type(described: dict) -> dict:
    """`described` without the `type` of its positions, which transformers 5 calls `rope_type` and keeps
    beside that."""
    rope = described.get("rope_parameters")
    if not isinstance(rope, dict):
        return described
    by_layer = {key: value for key, value in rope.items() if key != "type"}
    for key, value in by_layer.items():
        if isinstance(value, dict):
            by_layer[key] = {name: its for name, its in value.items() if name != "type"}
    return {**described, "rope_parameters": by_layer}


def _older_scaling(rope: dict, family: str) -> dict:
    """`rope_scaling` for the positions `rope` (flat, as in `rope_parameters`)."""
    elsewhere = {"rope_theta", "partial_rotary_factor", "rope_type"}
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    if isinstance(scaling.get("factor"), int):
        scaling["factor"] = float(scaling["factor"])  # OLMo's config refuses an integer
    exact = {key: scaling[key] for key in EXACT_SCALING.get(family, ()) if key in scaling}
    if exact and not scaling.keys() - exact.keys() - {"original_max_position_embeddings"}:
        return {"type": rope["rope_type"], **exact}  # Phi 3 states the original length outside
    return {"rope_type": rope["rope_type"], **scaling}


# --- generation_config.json ---------------------------------------------------------------------------------

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def settings_in_config(raw: dict) -> dict:
    """The generation_config.json of `raw`, a config.json of transformers 4 that states temperature, top_p or
    the like itself; {} if it states none. transformers 5 passes over them there, and both read the file
    before the config."""
    from transformers import GenerationConfig

    kept_in_both = {
        *SPECIAL_IDS,
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "transformers_version",
    }
    names = [key for key in GenerationConfig().to_dict() if key not in kept_in_both]
    settings = {key: raw[key] for key in names if raw.get(key) is not None}
    return settings | {key: raw[key] for key in SPECIAL_IDS if raw.get(key) is not None} if settings else {}


def copy_settings(source: Path, target: Path) -> list[str]:
    """Write the generation settings of the checkpoint `source` into `target`, a new one; returns the file's
    name, or none."""
    name = "generation_config.json"
    if (source / name).is_file():
        (target / name).write_bytes((source / name).read_bytes().removeprefix(BOM_UTF8))
    elif settings := settings_in_config(read_json(source / "config.json")):
        write_json(target / name, settings, seal=False)
    return [name] if (target / name).is_file() else []
