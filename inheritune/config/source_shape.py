"""The shape of an existing model, read from its config.json: what `model: {from: FOLDER_OR_ID}` stands for.

The file alone is read, as JSON. transformers is asked only for keys that the file leaves to its family's
defaults, because it takes seconds to import.
"""

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inheritune.config.catalog import FAMILIES
from inheritune.config.paths import resolve_path
from inheritune.config.reading import read_text, refuse_duplicate_keys
from inheritune.config.values import LENGTH
from inheritune.errors import UserError, is_machine_limit, summarize_error

CONFIG = "config.json"
SHAPE_KEYS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "positions": ("max_position_embeddings", "n_positions"),
    "vocab_size": ("vocab_size",),
    "tied_head": ("tie_word_embeddings",),
}
"""Key of `model` -> its names in a config.json. Every family has them, by default or by name."""
OPTIONAL_KEYS = {
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "mlp_width": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
}
"""Keys that some families lack."""
UNLIMITED = "positions"
"""The key of SHAPE_KEYS that a family without position embeddings (Bloom's ALiBi) lacks."""
PADDING = 128
"""Rows by which an embedding may be padded: GPT-2's 50257 are 50304 in the paper."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def refuse_config(raw: Any, path: Path) -> None:
    """Raise UserError for a config.json that is not a decoder's in transformers' own format: of another
    program, quantized, an encoder-decoder."""
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f"{path} names no 'model_type'; it is not a Hugging Face model config")
    if raw.get("quantization_config") is not None:
        raise UserError(
            f"{path} describes a quantized model (quantization_config); inherit from the unquantized weights"
        )
    if raw.get("is_encoder_decoder"):
        raise UserError(
            f"{path} describes an encoder-decoder ({raw['model_type']}); only decoder-only models can be "
            f"sliced"
        )


def refuse_revision(revision: str | None, folder: Path) -> None:
    """Raise UserError if a revision was given for a folder."""
    if revision:
        raise UserError(
            f"revision '{revision}' was given, but {folder} is a folder: only a Hub id has revisions; leave "
            f"it out"
        )


def refuse_adapter(folder: Path) -> None:
    """Raise UserError if a folder without a model holds an adapter of one."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is an adapter without the model it adapts; merge it into its base model first"
        )


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def take_text_part(raw: dict) -> dict:
    """Return the config of the language model in `raw`, which describes it beside an image or audio encoder.

    Any other config is returned as it is."""
    text = raw.get("text_config")
    if not (isinstance(text, dict) and isinstance(text.get("model_type"), str)):
        return raw
    shared = ("tie_word_embeddings", "dtype", "torch_dtype", *SPECIAL_IDS)
    return {key: raw[key] for key in shared if raw.get(key) is not None} | text


# --- finding the file ---------------------------------------------------------------------------------------


def find_config(source: str, revision: str | None = None, may_download: bool = True) -> Path:
    """Return the path of config.json of `source`: a folder, or a Hub id in the Hub's cache.

    A file that the cache lacks is downloaded (`may_download`, and unless HF_HUB_OFFLINE=1). Raises UserError
    if there is none."""
    folder = resolve_path(source)
    if folder.is_dir():
        return _find_in_folder(folder, revision)
    if folder.is_file():
        raise UserError(
            f"'{source}' is a file; name the folder of the model (init reads a GGUF file, and names the "
            f"folder that it converts it to)"
        )
    if not HUB_ID.fullmatch(source):
        raise UserError(f"'{source}' is neither a folder nor a Hub id (owner/name)")
    if not find_spec("huggingface_hub"):
        raise UserError(
            f"'{source}' is no local folder, and the Hub's cache needs the package huggingface-hub"
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(source, CONFIG, revision=revision)
    if isinstance(found, str):
        return Path(found)
    try:
        if not may_download:
            raise FileNotFoundError("it is not in the cache")
        return Path(hf_hub_download(source, CONFIG, revision=revision))
    except Exception as error:  # the Hub's library and its HTTP client raise many kinds
        if is_machine_limit(error):
            raise
        raise UserError(
            f"'{source}' is no local folder, and its {CONFIG} is not available from the Hub "
            f"({summarize_error(error)}); download it first"
        ) from None


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a whole commit, which cannot move as a branch or a tag can."""
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def find_commit(source: str, revision: str | None = None) -> str | None:
    """Return the commit of a Hub id at `revision` (None: as the cache's main is now); None for a folder or a
    file, and for a model that is neither cached nor on the Hub."""
    if resolve_path(source).exists():
        return None
    try:
        folder = find_config(source, revision).parent
    except UserError:
        return revision
    return folder.name if folder.parent.name == "snapshots" else revision


def _find_in_folder(folder: Path, revision: str | None) -> Path:
    """Return config.json in `folder`. Raises UserError if it has none."""
    refuse_revision(revision, folder)
    if (folder / CONFIG).is_file():
        return folder / CONFIG
    refuse_adapter(folder)
    raise UserError(f"{folder} holds no {CONFIG}, so it is not the folder of a Hugging Face model")


# --- reading the shape --------------------------------------------------------------------------------------


def read_shape(path: Path) -> dict[str, Any]:
    """Return the keys of `model` (family, layers, width ...) of the model with the config.json `path`.

    Raises UserError for a file that is not a decoder's, and for a family that has no entry in
    architectures.yaml, of which no random start could be made."""
    return _read_shape(path, path.stat().st_mtime_ns)


@cache
def _read_shape(path: Path, mtime_ns: int) -> dict[str, Any]:
    """Return `read_shape` of the file as it was at `mtime_ns`."""
    try:
        raw = json.loads(read_text(path), object_pairs_hook=lambda pairs: refuse_duplicate_keys(path, pairs))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it") from None
    refuse_config(raw, path)
    raw = take_text_part(raw)
    family = raw["model_type"]
    if family not in FAMILIES:
        raise UserError(
            f"{path} describes the family '{family}', of which blocks can be cut with inherit but no run be "
            f"trained: it has no entry in inheritune/models/architectures.yaml (docs/new_architecture.md)"
        )
    if any(_get_first(raw, names) is None for names in SHAPE_KEYS.values()):
        raw = _complete_config(raw, path)
    shape = {key: _get_first(raw, names) for key, names in (SHAPE_KEYS | OPTIONAL_KEYS).items()}
    if shape[UNLIMITED] is None:
        shape[UNLIMITED] = LENGTH.le
    missing = [names[0] for key, names in SHAPE_KEYS.items() if shape[key] is None]
    if missing:
        raise UserError(f"{path} does not say its {missing[0]}; restore the file")
    if raw.get("multi_query") and not raw.get("new_decoder_architecture"):  # GPT-BigCode, Falcon 7B
        shape["kv_heads"] = 1
    if isinstance(shape["mlp_width"], list):  # one of each layer
        shape["mlp_width"] = max(shape["mlp_width"])
    return {"family": family, **{key: value for key, value in shape.items() if value is not None}}


def _get_first(raw: dict, names: tuple[str, ...]) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _complete_config(raw: dict, path: Path) -> dict:
    """Return `raw` with the defaults of its family, as transformers has them."""
    try:
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        names = {names[0]: getattr(config, names[0], None) for names in SHAPE_KEYS.values()}
        return {**config.to_dict(), **names}
    except Exception as error:  # transformers raises many kinds for a value that it did not expect
        if is_machine_limit(error):
            raise
        raise UserError(
            f"{path} is not a valid {raw['model_type']} config: {' '.join(str(error).split())[:300]}"
        ) from None


# --- comparing ----------------------------------------------------------------------------------------------


def find_contradictions(stated: dict[str, Any], shape: dict[str, Any], where: str | Path) -> list[str]:
    """Return a sentence for each key of `stated` (of `model`) that has another value in `shape`, that of the
    model `where`. What only one of the two has is left out."""
    return [
        f"{key} is {stated[key]}, but {shape[key]} in {where}"
        for key in shape
        if stated.get(key) is not None and stated[key] != shape[key]
    ]
