"""Files of a tokenizer as other programs read them: what transformers 4 and 5, and programs built on them,
read alike.

A tokenizer without `model_input_names` returns token_type_ids to transformers 4; classes of transformers 5
are unknown to it. So every writer of a tokenizer (`inherit`, final/, weights kept at a step, `export`, a
prepared data set) takes it from here.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterable
from pathlib import Path

from inheritune.errors import UserError

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["vocab.json", "merges.txt", "tokenizer.model"]
"""Files that decide a tokenizer's ids."""
TEMPLATES = ["chat_template.jinja", "additional_chat_templates/*.jinja"]
"""Patterns of the files that say how a chat becomes text."""
FILES = [*TOKENIZER_FILES, *TEMPLATES]
INPUT_NAMES = ["input_ids", "attention_mask"]

_OF_ONE_MACHINE = {
    "name_or_path",
    "local_files_only",
    "is_local",
    "cache_dir",
    "token",
    "use_auth_token",
    "device_map",
}
_OF_ONE_VERSION = {
    "backend",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "files_loaded",
    "_commit_hash",
}
ANY_FAST_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers 4 and 5 that takes tokenizer.json as it is."""


def tokenizer_config(raw: dict, backend: dict | None = None, token_types: bool = False) -> dict:
    """`raw`, a tokenizer_config.json, in words that transformers 4 and 5 both read.

    `backend` is the tokenizer.json beside it, None if there is none. `token_types`: whether the model takes
    token_type_ids, which transformers 4 otherwise returns from a tokenizer that does not state its
    outputs."""
    dropped = {
        key
        for key in raw
        if key in _OF_ONE_MACHINE | _OF_ONE_VERSION or key.endswith(("_file", "_dir", "_path"))
    }
    config = {key: value for key, value in raw.items() if key not in dropped}
    extra, named = raw.get("extra_special_tokens") or {}, raw.get("model_specific_special_tokens") or {}
    if isinstance(extra, list):  # in transformers 5 what 4 calls additional_special_tokens
        earlier = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = earlier + [token for token in extra if token not in earlier]
    else:
        named = {**extra, **named}
    if named:
        config["extra_special_tokens"] = named
    if str(config.get("tokenizer_class")).endswith("Backend"):  # classes of transformers 5
        del config["tokenizer_class"]
        config |= {} if backend is None else {"tokenizer_class": ANY_FAST_CLASS}
    if backend is not None:
        config.pop("auto_map", None)  # the code is not carried along, and not needed
    stated = raw.get("model_input_names") or INPUT_NAMES
    config["model_input_names"] = [name for name in stated if token_types or name != "token_type_ids"]
    return config


def trained_config(raw: dict, backend: dict) -> dict:
    """`tokenizer_config` of a tokenizer that a run was trained with: its ids are those that `backend` gives
    as it is, and its decoded text is the text."""
    config = tokenizer_config(raw, backend)
    config |= {"tokenizer_class": ANY_FAST_CLASS, "clean_up_tokenization_spaces": False}
    prefix = (backend.get("pre_tokenizer") or {}).get("add_prefix_space")
    return (
        config if prefix is None else {**config, "add_prefix_space": prefix}
    )  # transformers 4 takes back what is not stated


def special_tokens_map(raw: dict) -> dict:
    """`raw`, a special_tokens_map.json, in words that transformers 4 and 5 both read."""
    extra = raw.get("extra_special_tokens")
    if not isinstance(extra, list):
        return raw
    rest = {key: value for key, value in raw.items() if key != "extra_special_tokens"}
    return {**rest, "additional_special_tokens": [*rest.get("additional_special_tokens", []), *extra]}


def find_files(folder: Path, patterns: Iterable[str] = FILES) -> list[str]:
    """Names, relative to `folder`, of the tokenizer's files that are there; what is hidden (.DS_Store) is not
    a tokenizer's."""
    found = (path.relative_to(folder) for pattern in patterns for path in sorted(folder.glob(pattern)))
    shown = (path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    return [name for name in shown if (folder / name).is_file()]


def write_tokenizer(
    folder: Path, files: dict[str, bytes], trained: bool = False, token_types: bool = False
) -> None:
    """Write a tokenizer's `files` ({name: content}) into `folder`: its configuration as `trained_config` has
    it, or as `tokenizer_config`, JSON without a byte order mark, and what needs no change as it is.

    Raises UserError for a file of JSON that cannot be read."""
    backend = _parsed(files, "tokenizer.json") if "tokenizer.json" in files else None
    for name, content in files.items():
        if name in ("tokenizer_config.json", "special_tokens_map.json"):
            raw = _parsed(files, name)
            if name == "special_tokens_map.json":
                config = special_tokens_map(raw)
            elif trained and backend is not None:
                config = trained_config(raw, backend)
            else:
                config = tokenizer_config(raw, backend, token_types)
            if config != raw:
                content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        if name.endswith(".json"):
            content = content.removeprefix(BOM_UTF8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _parsed(files: dict[str, bytes], name: str) -> dict:
    try:
        parsed = json.loads(files[name].removeprefix(BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} of the tokenizer cannot be read as JSON ({error}); restore it") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{name} of the tokenizer holds no JSON object; restore it")
    return parsed


def copy_tokenizer(source: Path, target: Path, patterns: Iterable[str] = FILES, **options) -> list[str]:
    """Write the files of the tokenizer in `source` that match `patterns` into `target`; returns their names.
    `options` are those of `write_tokenizer`, which also says what is raised."""
    names = find_files(source, patterns)
    write_tokenizer(target, {name: (source / name).read_bytes() for name in names}, **options)
    return names
