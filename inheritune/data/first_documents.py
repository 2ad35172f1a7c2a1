"""A look at the first documents before anything is written: is there one, and does it have the text's key?"""

import itertools
import json
from collections.abc import Iterator

from inheritune.data.decoders import make_column_error
from inheritune.data.documents import Corpus, DocumentBatch, batch_documents
from inheritune.errors import UserError

ROWS = 20
"""First rows of JSON that are looked at: one or two may be odd, but not all."""


def check_first_documents(corpus: Corpus) -> None:
    """Raise UserError if there is no document at all, none in a group that has a weight, or if none of a
    group's first rows has the key of the text."""
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
        if len(objects) == len(rows) and not any(key in row for row in objects):
            names = dict.fromkeys(name for row in objects for name in row)
            raise make_column_error(corpus.groups[group][file], key, names)
    return True


def _list_raws(batches: Iterator[DocumentBatch], first: list[bytes | None]) -> list[bytes | None]:
    return [*first, *(raw for batch in batches for raw in batch.raws)]


def _parse_row(raw: bytes | None) -> object:
    try:
        return json.loads(raw or b"")
    except (ValueError, RecursionError):
        return None
