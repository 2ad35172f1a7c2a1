"""The interface of a tokenizer, encoding that survives a text which cannot be encoded, and the check that a
model has room for the ids.

The spelling of a special token inside a document is encoded as ordinary characters, and nothing is added
around the text. `tokenizer_loading.py` opens the tokenizer that an experiment names.
"""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from inheritune.data.chat_template import ChatTemplate
from inheritune.errors import UserError, is_machine_limit, summarize_error

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PROBE = (
    "def f(x):\n\treturn x  +   1  # naïve café, 12345.67\r\n\n\n  Ünïcödé — “quotes” 漢字 かな 한국어 "
    "العربية 🤗👩‍👧\x00\x7f https://example.org/a_b?c=d  it's WE'LL    "
)
"""A text by which two tokenizers are compared."""


class Tokenizer:
    """What every kind of tokenizer offers."""

    name: str
    """As in the experiment."""
    vocab_size: int
    end_of_text: int
    """Id of the token that separates documents."""
    chat_template: ChatTemplate | None = None
    """How chats become text; None if the tokenizer has no template."""

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def dtype(self) -> str:
        """Smallest unsigned type, little-endian, that holds every id."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the kind and of all that decides ids. Two different tokenizers never share one."""
        return xxhash.xxh3_128_hexdigest(f"{self.kind}:{self.end_of_text}:".encode() + self._content())

    def describe(self) -> dict:
        """Return the tokenizer's entry in the manifest."""
        facts = {"name": self.name, "class": self.kind, "vocab_size": self.vocab_size}
        return {**facts, "end_of_text": self.end_of_text, "fingerprint": self.fingerprint}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text as a 1-D integer array, with nothing added.

        The special tokens of a ChatText are tokens."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Fill `folder` with a Hugging Face tokenizer of the same ids and with what `load_tokenizer` needs to
        reopen it."""
        raise NotImplementedError

    def _content(self) -> bytes:
        """Return all that decides ids, as bytes."""
        raise NotImplementedError


def encode_each(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[np.ndarray], list[tuple[int, str]]]:
    """Return (ids of each text that can be encoded, [(index, defect)] of those that cannot).

    An encoder may fail at a single text (tiktoken does at a million blanks in a row). That is a property of
    this text and no reason to lose the others. Running out of memory is not, and is raised."""
    try:
        return tokenizer.encode_batch(texts), []
    except Exception as error:  # the libraries raise nothing more precise
        if is_machine_limit(error):
            raise
        log.debug("a batch of %d texts cannot be encoded; encoding each text by itself", len(texts))
    rows, refused = [], []
    for index, text in enumerate(texts):
        try:
            rows += tokenizer.encode_batch([text])
        except Exception as error:
            if is_machine_limit(error):
                raise
            refused.append((index, f"not encoded by the tokenizer ({summarize_error(error)[:100]})"))
    return rows, refused


def check_vocabulary(tokenizer_size: int, model_size: int, where: str) -> None:
    """Raise UserError if the tokenizer has ids beyond the model's embedding. A padded, larger embedding is
    fine."""
    if tokenizer_size > model_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer_size} ids, the model's vocabulary only {model_size}; set "
            f"model.vocab_size to at least {tokenizer_size}, or choose another tokenizer"
        )
