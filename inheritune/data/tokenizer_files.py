"""Files of a tokenizer in a form that transformers 4, transformers 5 and programs built on them read alike.

transformers 4 returns token_type_ids from a tokenizer without `model_input_names`, and it does not know the
classes of transformers 5. So every writer of a tokenizer (`inherit`, final/, weights kept at a step,
`export`, a prepared data set) uses this module.
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
TOKENIZER_PATTERNS = [*TOKENIZER_FILES, *TEMPLATES]
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
"""The class of transformers 4 and 5 that uses tokenizer.json as it is."""


def convert_tokenizer_config(raw: dict, backend: dict | None = None, token_types: bool = False) -> dict:
    """Return `raw`, a tokenizer_config.json, with keys that transformers 4 and 5 both read.

    `backend` is the tokenizer.json alongside it, None if there is none. `token_types` says whether the model
    takes token_type_ids, which transformers 4 otherwise returns from a tokenizer that does not state its
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
        if backend is not None:
            config["tokenizer_class"] = ANY_FAST_CLASS
    if backend is not None:
        config.pop("auto_map", None)  # its code is not copied, and not needed
    stated = raw.get("model_input_names") or INPUT_NAMES
    config["model_input_names"] = [name for name in stated if token_types or name != "token_type_ids"]
    return config


def convert_trained_config(raw: dict, backend: dict) -> dict:
    """Return `convert_tokenizer_config` of a tokenizer that a run was trained with: its ids are those that
    `backend` gives as it is, and its decoded text is the text."""
    config = convert_tokenizer_config(raw, backend)
    config |= {"tokenizer_class": ANY_FAST_CLASS, "clean_up_tokenization_spaces": False}
    prefix = (backend.get("pre_tokenizer") or {}).get("add_prefix_space")
    if prefix is not None:  # transformers 4 replaces what is not stated by its default
        config["add_prefix_space"] = prefix
    return config


def convert_special_tokens(raw: dict) -> dict:
    """Return `raw`, a special_tokens_map.json, with keys that transformers 4 and 5 both read."""
    extra = raw.get("extra_special_tokens")
    if not isinstance(extra, list):
        return raw
    rest = {key: value for key, value in raw.items() if key != "extra_special_tokens"}
    return {**rest, "additional_special_tokens": [*rest.get("additional_special_tokens", []), *extra]}


def find_files(folder: Path, patterns: Iterable[str] = TOKENIZER_PATTERNS) -> list[str]:
    """Return the names, relative to `folder`, of the tokenizer's files in it. Hidden files (.DS_Store) are
    not a tokenizer's."""
    found = (path.relative_to(folder) for pattern in patterns for path in sorted(folder.glob(pattern)))
    shown = (path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    return [name for name in shown if (folder / name).is_file()]


def write_tokenizer(
    folder: Path, files: dict[str, bytes], trained: bool = False, token_types: bool = False
) -> None:
    """Write a tokenizer's `files` ({name: content}) into `folder`.

    Its configuration is converted by `convert_trained_config` if `trained`, else by
    `convert_tokenizer_config`. JSON loses its byte order mark. All else is written as it is.

    Raises UserError for a JSON file that cannot be read."""
    backend = _parse_json(files, "tokenizer.json") if "tokenizer.json" in files else None
    for name, content in files.items():
        if name in ("tokenizer_config.json", "special_tokens_map.json"):
            raw = _parse_json(files, name)
            if name == "special_tokens_map.json":
                config = convert_special_tokens(raw)
            elif trained and backend is not None:
                config = convert_trained_config(raw, backend)
            else:
                config = convert_tokenizer_config(raw, backend, token_types)
            if config != raw:
                content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        if name.endswith(".json"):
            content = content.removeprefix(BOM_UTF8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _parse_json(files: dict[str, bytes], name: str) -> dict:
    """Return the JSON object in a tokenizer's file. Raises UserError if it holds none."""
    try:
        parsed = json.loads(files[name].removeprefix(BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} of the tokenizer cannot be read as JSON ({error}); restore it") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{name} of the tokenizer holds no JSON object; restore it")
    return parsed


def count_ids(folder: Path) -> int:
    """Return one more than the largest id that tokenizer.json in `folder` gives, 0 without that file.

    Raises UserError if the file cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return 0
    parsed = _parse_json({path.name: path.read_bytes()}, path.name)
    model = parsed.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary or []) - 1]
    ids += [token.get("id", -1) for token in parsed.get("added_tokens") or [] if isinstance(token, dict)]
    return max(ids, default=-1) + 1


def check_embedding(folder: Path, n_rows: int) -> None:
    """Raise UserError if the tokenizer in `folder` has ids beyond the model's embedding of `n_rows` rows."""
    if (n_ids := count_ids(folder)) > n_rows:
        raise UserError(
            f"the tokenizer in {folder} has {n_ids} ids and the model's embedding {n_rows} rows: they belong "
            f"to two models; put the model's own tokenizer there, or remove the tokenizer's files"
        )


def copy_tokenizer(
    source: Path,
    target: Path,
    patterns: Iterable[str] = TOKENIZER_PATTERNS,
    trained: bool = False,
    token_types: bool = False,
) -> list[str]:
    """Write the files of the tokenizer in `source` that match `patterns` into `target` by `write_tokenizer`,
    and return their names."""
    names = find_files(source, patterns)
    files = {name: (source / name).read_bytes() for name in names}
    write_tokenizer(target, files, trained, token_types)
    return names
