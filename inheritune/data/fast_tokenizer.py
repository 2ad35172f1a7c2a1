"""Tokenizers of the tokenizers library ('fast' in transformers): opened from a saved folder, from any Hugging
Face folder, or from the Hub; and the writing of such a folder."""

import json
import tempfile
from codecs import BOM_UTF8
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from inheritune.config.paths import resolve_path
from inheritune.data.chat_template import ChatText, read_chat_template
from inheritune.data.tokenizer import PROBE, Tokenizer
from inheritune.data.tokenizer_files import (
    TEMPLATES,
    TOKENIZER_PATTERNS,
    copy_tokenizer,
    find_files,
    write_tokenizer,
)
from inheritune.errors import UserError, is_machine_limit, summarize_error
from inheritune.files.hub import translate_hub_errors


def set_byte_level(backend: Any) -> None:
    """Let a tokenizers.Tokenizer split and join text by bytes, as GPT-2 does."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def save_backend(backend: Any, folder: Path, end_of_text: str, **special: str | None) -> None:
    """Write tokenizer.json of a tokenizers.Tokenizer and the configuration by which AutoTokenizer opens it.

    They are written here because transformers 5 names a class that 4.57 lacks (TokenizersBackend)."""
    config = {"eos_token": end_of_text, "bos_token": end_of_text, "unk_token": end_of_text, **special}
    files = {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config)}
    write_tokenizer(folder, {name: text.encode() for name, text in files.items()}, trained=True)


class FastTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, opened from its saved folder: bpe:N or any of the Hub.

    transformers is not asked again: with torch, it takes seconds and 200 MB in every worker process."""

    SAVED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *TEMPLATES)

    def __init__(self, name: str, folder: Path):
        from tokenizers import Tokenizer as Backend

        if not all((folder / file).is_file() for file in self.SAVED_FILES[:2]):
            raise UserError(
                f"tokenizer '{name}': {folder} holds no tokenizer.json and tokenizer_config.json; run "
                f"'prepare' first"
            )
        self._files = {file: (folder / file).read_bytes() for file in find_files(folder, self.SAVED_FILES)}
        try:
            self._backend = Backend.from_buffer(self._files["tokenizer.json"])
            config = json.loads(self._files["tokenizer_config.json"])
            end_token = _find_end_token(config)
        except Exception as error:  # the tokenizers library raises nothing more precise
            if is_machine_limit(error):
                raise
            raise UserError(
                f"tokenizer '{name}' in {folder} cannot be read ({summarize_error(error)}); restore it"
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a document is ordinary text
        end_id = None if end_token is None else self._backend.token_to_id(end_token)
        if end_id is None:
            raise UserError(
                f"tokenizer '{name}' has no end-of-text (EOS) token, which separates documents; use one that "
                f"has one"
            )
        self.name, self.vocab_size = name, max(self._backend.get_vocab().values()) + 1
        self.end_of_text = end_id
        added = self._backend.get_added_tokens_decoder().values()
        special = {token.content: token.normalized for token in added if token.special}
        jinja = self._files.get("chat_template.jinja")
        normalizer = self._backend.normalizer
        self.chat_template = read_chat_template(
            config, jinja.decode() if jinja else None, special, normalizer and normalizer.normalize_str
        )

    @cached_property
    def _chat_backend(self) -> Any:
        """The same tokenizer, for texts in which special tokens are tokens."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if any(isinstance(text, ChatText) for text in texts):
            return [self._encode_one(text) for text in texts]
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, np.uint32) for row in encoded]

    def _encode_one(self, text: str) -> np.ndarray:
        backend = self._chat_backend if isinstance(text, ChatText) else self._backend
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32)

    def _content(self) -> bytes:
        # padding, truncation, templates and decoding do not decide ids
        parts = json.loads(self._backend.to_str())
        added = [(token["id"], token["content"]) for token in parts["added_tokens"]]
        return json.dumps([parts["model"], parts["normalizer"], parts["pre_tokenizer"], added]).encode()

    def save(self, folder: Path) -> None:
        write_tokenizer(folder, self._files, trained=True)


def _find_end_token(config: dict) -> str | None:
    """Return the end-of-text token of a tokenizer_config.json, which is a text or an object with one."""
    token = config.get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def open_pretrained(name: str, revision: str | None) -> FastTokenizer:
    """Open the tokenizer in a folder, in the Hub's cache or on the Hub by transformers, without running
    third-party code."""
    from transformers import AutoTokenizer

    local = resolve_path(name)
    if local.is_file():
        raise UserError(f"tokenizer '{name}' is a file; name its folder, {local.parent}")
    if local.is_dir():
        tokenizer = _open_folder(name, local)
    else:
        with translate_hub_errors(f"tokenizer '{name}'", name):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer '{name}' ({type(tokenizer).__name__}) has no 'fast' form (tokenizer.json); use one "
            f"that has one"
        )
    if not tokenizer.encode(PROBE, add_special_tokens=False):
        raise UserError(
            f"tokenizer '{name}' has no vocabulary (transformers makes an empty one without files); "
            f"add tokenizer.json, or tokenizer.model, or vocab.json and merges.txt"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return FastTokenizer(name, Path(folder))


def _open_folder(name: str, folder: Path) -> Any:
    """Open the tokenizer in `folder` by transformers.

    transformers cannot read JSON that begins with a byte order mark. Such a folder is read from a copy
    without it."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as copy:
        if any(path.read_bytes().startswith(BOM_UTF8) for path in folder.glob("*.json")):
            # the model's config names the family
            copy_tokenizer(folder, Path(copy), ["config.json", *TOKENIZER_PATTERNS])
            folder = Path(copy)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if is_machine_limit(error):
                raise
            raise UserError(
                f"tokenizer '{name}' cannot be opened ({summarize_error(error)}); restore its folder"
            ) from None
