"""Configs of well-known families without transformers: what a cut of whole blocks needs of them.

transformers and torch take seconds to import, and a plain cut copies bytes. plain_families.yaml states, for
one version of transformers, what its config classes fill in and which tensors its models have. A config with
anything that the file does not cover, and any other version of transformers, is left to transformers itself
(`describe_plain` returns None), so the result is the same either way.
"""

import math
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from inheritune.models.architectures import Shape
from inheritune.models.dtypes import DTYPES

MAX_PLAIN_LAYERS = 1000  # of a config that needs no second look


@cache
def _read_table() -> dict[str, Any]:
    """Return plain_families.yaml, {} where another version of transformers is installed."""
    text = (Path(__file__).parent / "plain_families.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        is_known = version("transformers") == table["transformers"]
    except PackageNotFoundError:
        is_known = False
    return table if is_known else {}


def list_setting_names() -> list[str]:
    """Return the keys of a generation_config.json, as transformers has them."""
    if table := _read_table():
        return list(table["settings"])
    from transformers import GenerationConfig

    return list(GenerationConfig().to_dict())


class PlainConfig:
    """A config that describes blocks all alike, with the attributes that transformers' object has for it.

    `values` are the family's keys, as its config class fills them in."""

    def __init__(self, model_type: str, values: dict[str, Any]):
        self.model_type = model_type
        self._row, self._values = _read_table()["families"][model_type], values
        self.takes_token_types: bool = self._row.get("token_types", False)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values, those that transformers computes among them."""
        return {"model_type": self.model_type, **self._values}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "PlainConfig":
        """Return the config of `raw`, which is another one's `to_dict` of another depth."""
        found = describe_plain(raw)
        assert found is not None, f"a depth of {raw} makes no other kind of config"
        return found

    def describe(self, dtype: str) -> dict[str, Any]:
        """Return config.json of a model stored in `dtype`, as transformers writes it."""
        own = {"model_type": self.model_type, "architectures": [self._row["class"]], "dtype": dtype}
        return {**self._values, **own, "transformers_version": _read_table()["transformers"]}

    def list_shapes(self) -> dict[str, Shape]:
        """Return {name: shape} of the model's tensors, in its order; a tied head is left out."""
        values, shapes = _add_sizes(self._row, self._values), {}
        for name, stated in self._row["tensors"].items():
            inside = stated if isinstance(stated, dict) else {"": stated}
            for i in range(values[self._row["layers"]]) if isinstance(stated, dict) else [0]:
                for rest, dims in inside.items():
                    if shape := _compute_shape(dims, values):
                        shapes[name.format(i=i) + rest] = shape
        return shapes


def _add_sizes(row: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `head_width` and `mlp_width`, computed where the config does not state them."""
    width, heads = (values[key] for key in row["heads"])
    head_width = values.get("head_dim") or width // heads
    return {**values, "head_width": head_width, "mlp_width": values.get("n_inner") or 4 * width}


def _compute_shape(dims: list[str], values: Mapping[str, Any]) -> Shape | None:
    """Return the shape of `dims`, or None if its condition (the last of them) does not hold."""
    *sizes, last = dims
    word, _, key = last.partition(" ")
    if key and bool(values[key]) != (word == "if"):
        return None
    terms = sizes if key else dims
    return tuple(math.prod(int(f) if f.isdecimal() else values[f] for f in t.split("*")) for t in terms)


# --- reading ------------------------------------------------------------------------------------------------

UNUSED = {
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "problem_type": None,
}
"""Keys of every config class whose defaults are not written."""
REPLACED = ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type", "_name_or_path")
"""Keys that the writer states anew."""


def describe_plain(raw: Any) -> PlainConfig | None:
    """Return the config that `raw`, the content of a config.json, describes; None if plain_families.yaml
    does not cover it, in which case transformers is to read it."""
    families = _read_table().get("families", {})
    row = families.get(raw.get("model_type")) if isinstance(raw, dict) else None
    if row is None or not all(_is_replaced(key, raw[key]) for key in REPLACED if key in raw):
        return None
    rope = _read_rope(row, raw)
    older = {"rope_scaling", *(older for older, _ in row.get("rope", {}).values())} if rope else set()
    values = {key: raw.get(key, default) for key, default in row["fields"].items()}
    others = {key: value for key, value in raw.items() if key not in {*values, *older, *REPLACED}}
    if rope is None or not all(_is_usual(row, key, value) for key, value in values.items()):
        return None
    if not all(_is_harmless(key, value) for key, value in others.items()) or not _fits_together(row, values):
        return None
    values |= {key: value for key, value in others.items() if key not in UNUSED}
    _fill(row, values)
    if rope:
        values["rope_parameters"] = rope
    return PlainConfig(raw["model_type"], values)


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_replaced(key: str, value: Any) -> bool:
    """Return whether the value of a key of REPLACED is as it should be."""
    if key == "architectures":
        return value is None or (isinstance(value, list) and all(type(name) is str for name in value))
    if key in ("dtype", "torch_dtype"):
        return value is None or value in [dtype.name for dtype in DTYPES.values()]
    return type(value) is str or (key == "transformers_version" and value is None)


def _is_harmless(key: str, value: Any) -> bool:
    """Return whether a key outside the family's own changes nothing but itself."""
    table = _read_table()
    if key in UNUSED:
        return _is_same(value, UNUSED[key])
    if key in table["flags"]:
        return type(value) is bool
    return _is_count(value) if key == "n_ctx" else key in table and _is_same(value, table[key])


def _is_usual(row: dict[str, Any], key: str, value: Any) -> bool:
    """Return whether the value of one of the family's own keys is of the kind that models have."""
    default = row["fields"][key]
    if key.endswith("_token_id"):
        is_list = key == "eos_token_id" and type(value) is list
        return value is None or all(type(i) is int for i in (value if is_list else [value]))
    if key in ("rope_parameters", "layer_types") or (key in row.get("counts", ()) and value is None):
        return True
    if key in row.get("fixed", ()) or default is None and key not in row.get("counts", ()):
        return _is_same(value, default)
    if type(default) is str:
        known = _read_table()["activations"] if key in ("hidden_act", "activation_function") else [default]
        return type(value) is str and value in known
    if type(default) is float:
        return type(value) is float and 0 <= value <= 1
    return _is_count(value) if type(default) is not bool else type(value) is bool


def _read_rope(row: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_parameters` of the default kind as transformers completes them, {} for a family without;
    None for positions of any other kind."""
    if "rope" not in row:
        return {}
    stated = raw.get("rope_parameters")
    stated = {} if stated is None else stated
    if not isinstance(stated, dict) or raw.get("rope_scaling") is not None:
        return None
    if stated.keys() - row["rope"].keys() - {"rope_type"} or stated.get("rope_type", "default") != "default":
        return None
    older = {key: raw.get(name, default) for key, (name, default) in row["rope"].items()}
    rope = {**older, "rope_type": "default", **stated}
    is_usual = all(type(rope[key]) in (int, float) and rope[key] > 0 for key in row["rope"])
    return rope if is_usual and math.isfinite(sum(rope[key] for key in row["rope"])) else None


def _fits_together(row: dict[str, Any], values: dict[str, Any]) -> bool:
    """Return whether the numbers make a model whose blocks are all alike."""
    layers, vocabulary = values[row["layers"]], values["vocab_size"]
    width, heads = (values[key] for key in row["heads"])
    kv_heads = values.get("num_key_value_heads") or heads
    head_width = _add_sizes(row, values)["head_width"]
    ids = [values[key] for key in values if key.endswith("_token_id")]
    flat = [i for found in ids for i in (found if type(found) is list else [found]) if i is not None]
    return (
        layers <= MAX_PLAIN_LAYERS
        and width % heads == 0
        and heads % kv_heads == 0
        and not (head_width % 2 and "rope" in row)
        and all(0 <= i < vocabulary for i in flat)
        and values.get("layer_types") in (None, ["full_attention"] * layers)
    )


def _fill(row: dict[str, Any], values: dict[str, Any]) -> None:
    """Fill in what the family's config class computes."""
    width, heads = (values[key] for key in row["heads"])
    computed = {"num_key_value_heads": heads, "head_dim": width // heads}
    for key in row.get("filled", ()):
        values[key] = computed[key] if values[key] is None else values[key]
    for key in row.get("nulled", ()):
        values[key] = None
    if "layer_types" in values:
        values["layer_types"] = ["full_attention"] * values[row["layers"]]
