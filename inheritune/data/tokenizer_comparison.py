"""Whether the tokenizer of a model from elsewhere gives the ids of prepared data."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inheritune.config.sections import Data
from inheritune.data.batches import Tokens
from inheritune.data.tokenizer import PROBE
from inheritune.data.tokenizer_loading import load_tokenizer

SAMPLE_TOKENS = 20_000
"""Validation tokens whose text is encoded again. Tokenizers that agree on a fixed text may differ on this."""

Encode = Callable[[str], list[int]]


def open_encoder(folder: Path) -> Encode | None:
    """Return what encodes a text as the model in `folder` expects it, or None if it holds no tokenizer that
    can be opened.

    A sentencepiece model goes before its conversions, which do not always give its ids."""
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        with contextlib.suppress(Exception):  # of another format, such as tiktoken's; or damaged
            return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    with contextlib.suppress(Exception):  # the tokenizers library raises nothing more precise
        return encode_with(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    return None


def encode_with(tokenizer: Any) -> Encode:
    """Return what encodes a text by a tokenizer of transformers, with nothing added."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def has_same_ids(encode: Encode, tokens: Tokens | None, data: Data | None = None) -> bool:
    """Return whether `encode` gives the ids of the data's tokenizer, on a probe and on the text of the first
    validation tokens, None where nothing is prepared. `data`: what names the tokenizer; by default the
    manifest of `tokens`."""
    texts, folder = [PROBE], None
    if tokens:
        folder, described = tokens.folder / "tokenizer", tokens.manifest["tokenizer"]
        texts += _read_pieces(tokens, folder, int(described["end_of_text"]))
        data = data or Data.model_construct(tokenizer=described["name"], tokenizer_revision=None)
    if data is None:
        raise ValueError("either the tokens or the data must be given")
    expected = load_tokenizer(data, folder).encode_batch(texts)
    return all(list(encode(text)) == ids.tolist() for text, ids in zip(texts, expected, strict=True))


def _read_pieces(tokens: Tokens, folder: Path, end_of_text: int) -> list[str]:
    """Return the text of the first validation tokens in pieces that cannot spell a special token: others
    encode <s> and [PAD] as the tokens themselves."""
    ids = tokens.read(0, min(tokens.n_tokens, SAMPLE_TOKENS))
    decode = _open_decoder(folder)
    borders = np.flatnonzero(ids == end_of_text)
    documents = [decode(part[part != end_of_text].tolist()) for part in np.split(ids, borders)]
    return [piece for document in documents for piece in re.split(r"[<\[\n]", document) if piece]


def _open_decoder(folder: Path) -> Callable[[list[int]], str]:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    import sentencepiece

    found: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return found.decode
