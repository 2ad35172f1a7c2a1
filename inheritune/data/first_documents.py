"""A look at the first documents before anything is written: is there one, and does it have the text's key?"""

import itertools
import json
from collections.abc import Iterator

from inheritune.config.sections import Data
from inheritune.data.bpe_training import parse_bpe_size
from inheritune.data.decoders import make_column_error
from inheritune.data.documents import Corpus, DocumentBatch, batch_documents
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError

ROWS = 20
"""First rows of JSON that are looked at: one or two may be odd, but not all."""


def check_first_documents(corpus: Corpus) -> None:
    """Raise UserError if there is no document at all, none in a group that has a weight, if none of a group's
    first rows has the key of the text, or if they are chats and the tokenizer has no chat template."""
    empty = [group for group in corpus.groups if not _check_group(corpus, group)]
    name, shares = corpus.data.name, corpus.data.shares
    if len(empty) == len(corpus.groups):
        raise UserError(f"{name}: empty corpus, no usable document (no document at all)")
    if missing := next((group for group in empty if group in shares), None):
        raise UserError(f"{name}: '{missing}' has a weight and no document; leave it out, or name its files")


def _check_group(corpus: Corpus, group: str) -> bool:
    """Check the first rows of a group. Returns whether it has any document."""
    batches = batch_documents(corpus, group, (0, 0), 1)
    first = next(batches, None)
    if first is None:
        return False
    file, key, kind = first.places[0][0], first.key, first.kind
    if kind == "json":
        same = itertools.takewhile(lambda batch: batch.places[0][0] == file, batches)
        rows = [_parse_row(raw) for raw in _list_raws(itertools.islice(same, ROWS), first.raws)]
        objects = [row for row in rows if isinstance(row, dict) and row]
        if any(isinstance(row.get(key), list) for row in objects):
            _check_template(corpus.data, key)
        if len(objects) == len(rows) and not any(key in row for row in objects):
            names = dict.fromkeys(name for row in objects for name in row)
            raise make_column_error(corpus.groups[group][file], key, names)
    return True


def _check_template(data: Data, key: str) -> None:
    """Raise UserError if the tokenizer cannot turn chats into text."""
    if parse_bpe_size(data.tokenizer) is None and load_tokenizer(data).chat_template is not None:
        return
    raise UserError(
        f"data.tokenizer: '{key}' holds chats (lists of messages), and tokenizer '{data.tokenizer}' has no "
        f"chat template; name the tokenizer of a chat model, or a text_key that holds text"
    )


def _list_raws(batches: Iterator[DocumentBatch], first: list[bytes | None]) -> list[bytes | None]:
    return [*first, *(raw for batch in batches for raw in batch.raws)]


def _parse_row(raw: bytes | None) -> object:
    try:
        return json.loads(raw or b"")
    except (ValueError, RecursionError):
        return None
