"""Documents: which files a data section names, the documents in them, in order, and the text of each.

`Corpus` lists the files: the embedded corpus, local globs, or a pinned data set of the Hub, which is
downloaded file by file as reading proceeds. `batch_documents` streams their documents as raw bytes.
`extract_text` returns the text of one or says why it cannot be used. Every reader notices whether its file is
complete, as far as the format allows: see decoders.py and the table in tests/damage.md.
"""

import codecs
import io
import itertools
import json
import logging
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import xxhash

from inheritune.config.sections import Data, Source
from inheritune.data.chat_template import ChatTemplate
from inheritune.data.decoders import (
    BYTE_ORDER_MARK,
    count_parquet,
    find_parquet_kind,
    read_json_documents,
    read_lines,
    read_parquet,
    report_read_errors,
)
from inheritune.data.hub_files import download_file, list_split_files, make_hub_finder
from inheritune.data.local_files import drop_links, find_local_files, list_standard_library
from inheritune.data.streamed_formats import BUILDERS, find_streamed_kind, stream_documents
from inheritune.errors import UserError
from inheritune.files.markers import hash_file

log = logging.getLogger(__name__)

KINDS = {
    ".txt": "text",
    ".py": "python",
    ".parquet": "text",
    **dict.fromkeys(BUILDERS, "text"),
} | dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz"), "json")
"""How each kind of file holds its documents, by the end of its name. A column of chats is "json"."""
ONE_DOCUMENT = (".txt", ".py")
"""Kinds of files that are one document each."""
QUADRATIC = {"punycode", "idna"}
"""Encodings that a coding line may name and whose decoding time grows with the square of the text's
length."""
MOST_NULS = 0.1
"""Largest share of NULs in a document. UTF-16 of English has one in two characters; a text with a stray NUL,
or with a table of them, has far fewer."""


class Corpus:
    """The files of a data section, in order, by group. There is one group without a name unless `data.files`
    is a mapping, or the documents are a mixture, whose parts are groups."""

    def __init__(self, data: Data, folder: Path):
        """`folder` keeps the listing of a Hub data set, so that a machine without internet sees the same
        files."""
        self.data = data
        self.groups: dict[str, list[str]] = {}
        self._origins: dict[str, tuple[Source, str]] = {}
        """The source of each file, and its name there."""
        # the hash of the data section ignores the order of the keys
        for number, (part, source) in enumerate(sorted(data.sources.items())):
            kept = folder / (f"hub_files_{number}.json" if part else "hub_files.json")
            for group, names in _list_files(source, kept).items():
                self._add_group(part or group, source, names)
        local = {group: names for group, names in self.groups.items() if self._is_local(names)}
        self.groups |= drop_links(local)

    def _is_local(self, names: list[str]) -> bool:
        return bool(names) and self._origins[names[0]][0].source == "files"

    def _add_group(self, group: str, source: Source, names: list[str]) -> None:
        """Add the files of a group. Those of a mixture's data sets are named with the data set."""
        start = f"{source.repo}/" if source.source == "hub" and source is not self.data else ""
        self.groups[group] = []
        for name in names:
            _find_suffix(name)
            if self._origins.setdefault(start + name, (source, name))[0] is not source:
                raise UserError(f"data.interleave: {start + name} belongs to two parts; leave it in one")
            self.groups[group].append(start + name)

    def path(self, name: str) -> Path:
        """Return the file on this machine. A file of the Hub is downloaded when it is first asked for."""
        source, own_name = self._origins[name]
        if source.source == "embedded":
            return Path(sysconfig.get_path("stdlib")) / own_name
        return download_file(source, own_name) if source.source == "hub" else Path(own_name)

    def get_own_name(self, name: str) -> str:
        """Return the name of a file in its own source."""
        return self._origins[name][1]

    def get_text_key(self, group: str) -> str:
        """Return the key or column of a group's documents."""
        return self.data.sources.get(group, self.data).text_key

    def describe(self, name: str) -> dict:
        """Return the file's entry in the manifest: name, bytes, and the Hub's commit or a local file's hash,
        by which a later `prepare` finds whether it has changed."""
        entry, source = self._size_of(name), self._origins[name][0]
        if source.source == "hub":
            return entry | {"revision": source.revision}
        return entry | {"xxh3": hash_file(self.path(name))}

    def _size_of(self, name: str) -> dict:
        return {"name": name, "bytes": self.path(name).stat().st_size}

    def state(self) -> str:
        """Return a hash that changes when the documents do: names with sizes and times of change, or names
        with the commit of a Hub data set."""

        def facts_of(name: str) -> dict | str:
            if self._origins[name][0].source == "hub":
                return name
            return self._size_of(name) | {"changed_ns": self.path(name).stat().st_mtime_ns}

        names = {group: [facts_of(name) for name in names] for group, names in self.groups.items()}
        revisions = [source.revision for _, source in sorted(self.data.interleave.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps([names, self.data.revision, *revisions]).encode())

    def kind(self, name: str) -> str:
        """Return how a file holds its documents: a value of KINDS."""
        suffix, key = _find_suffix(name), self._origins[name][0].text_key
        if suffix == ".parquet":
            return find_parquet_kind(self.path(name), key)
        if suffix in BUILDERS:
            with report_read_errors(self.path(name)):
                return find_streamed_kind(self.path(name), suffix, key)
        return KINDS[suffix]

    def documents(self, name: str) -> Iterator[tuple[int, bytes | None]]:
        """Yield (line, row or element from 1, raw bytes) of each document of a file, in order.

        Raises UserError if the file is damaged, or ends in the middle of a frame, an archive or an array."""
        path, suffix, key = self.path(name), _find_suffix(name), self._origins[name][0].text_key
        with report_read_errors(path):
            if suffix == ".parquet":
                yield from read_parquet(path, key)
            elif suffix in BUILDERS:
                yield from stream_documents(path, suffix, key)
            elif suffix.startswith(".json") and not suffix.startswith(".jsonl"):
                yield from read_json_documents(path, key)
            elif KINDS[suffix] == "json":
                yield from read_lines(path)
            elif suffix == ".txt":
                yield 1, path.read_bytes().removeprefix(BYTE_ORDER_MARK)
            else:  # Python's own reader of coding lines takes the mark into account
                yield 1, path.read_bytes()

    def count(self, name: str) -> int:
        """Return the number of documents in a file, usable or not."""
        suffix = _find_suffix(name)
        if suffix == ".parquet":
            return count_parquet(self.path(name), self._origins[name][0].text_key)
        return 1 if suffix in ONE_DOCUMENT else sum(1 for _ in self.documents(name))


def _list_files(source: Source, kept: Path) -> dict[str, list[str]]:
    """Return the names of a source's files by group. `kept`: the file that keeps the listing of a data set of
    the Hub."""
    if source.source == "embedded":
        return {"": list_standard_library()}
    if source.source == "hub" and not source.files:
        return {"": list_split_files(source, kept)}
    if source.source == "hub":
        find = make_hub_finder(source, kept)
    else:
        find = partial(find_local_files, split=source.split)
    patterns = source.files if isinstance(source.files, dict) else {"": source.files}
    groups = {}
    for group in sorted(patterns):  # the hash of the data section ignores the order of the keys
        names = (name for pattern in patterns[group] for name in find(pattern))
        groups[group] = list(dict.fromkeys(names))
    return groups


def _find_suffix(name: str) -> str:
    """Return the key of KINDS that `name` ends with. Raises UserError if there is none."""
    suffix = next((suffix for suffix in sorted(KINDS, key=len, reverse=True) if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            f"{name}: documents are read from {', '.join(KINDS)} files only; convert it, or narrow data.files"
        )
    return suffix


# --- batches and texts --------------------------------------------------------------------------------------


class DocumentFiles(Protocol):
    """What `batch_documents` needs of a corpus."""

    groups: dict[str, list[str]]

    def get_text_key(self, group: str) -> str: ...

    def kind(self, name: str) -> str: ...

    def documents(self, name: str) -> Iterator[tuple[int, Any]]: ...


@dataclass
class DocumentBatch:
    """Consecutive documents of one group and kind."""

    group: str
    kind: str
    key: str = "text"
    """The key of the text in a row of JSON."""
    raws: list[bytes | None] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(index of the file in its group, line) of each document."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of each raw document."""
    size: int = 0
    end: tuple[int, int] = (0, 0)
    """Where the next batch starts: (index of the file, number of its documents that are read)."""


def batch_documents(
    corpus: DocumentFiles,
    group: str,
    start: tuple[int, int],
    batch_bytes: int,
    stop: int | None = None,
) -> Iterator[DocumentBatch]:
    """Yield the group's documents from `start` on, in batches of about `batch_bytes`; with `stop`, only those
    before the file of that index.

    They are cut by size alone, so a start at an earlier batch's end gives the same remaining batches."""
    names = corpus.groups[group]
    batch: DocumentBatch | None = None
    for index in range(start[0], len(names) if stop is None else stop):
        suffix = _find_suffix(names[index])
        kind, done = corpus.kind(names[index]), start[1] if index == start[0] else 0
        for line, raw in itertools.islice(corpus.documents(names[index]), done, None):
            if batch is not None and (batch.size >= batch_bytes or batch.kind != kind):
                yield batch
                batch = None
            batch = batch or DocumentBatch(group, kind, corpus.get_text_key(group))
            done += 1
            batch.raws.append(raw)
            batch.places.append((index, line))
            batch.sizes.append(0 if raw is None else len(raw))
            batch.size += batch.sizes[-1] + 64  # so that empty documents fill a batch too
            batch.end = (index, done)
        if batch is not None and suffix not in ONE_DOCUMENT:  # the next file may need a download first
            yield batch
            batch = None
    if batch is not None:
        yield batch


class UnusableDocument(Exception):
    """A document that is left out. The message is the kind of defect that the manifest counts."""


def extract_text(kind: str, raw: bytes | None, key: str, template: ChatTemplate | None = None) -> str:
    """Return the document's text: a ChatText if it is a chat, which needs a `template`.

    Raises UnusableDocument."""
    if not raw:
        raise UnusableDocument("empty text")
    text = _decode(kind, raw)
    if kind == "json":
        text = _get_row_text(text, key, template)
    if not text:
        raise UnusableDocument("empty text")
    if text.count("\0") > MOST_NULS * len(text):
        raise UnusableDocument("NUL characters: UTF-16 without a mark, or no text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as \ud83d, or decoded by a coding line
        raise UnusableDocument("not UTF-8") from None
    return text


def _decode(kind: str, raw: bytes) -> str:
    """Return the text of raw bytes, in UTF-8 or in the encoding that a Python file's coding line names.

    Raises UnusableDocument."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnusableDocument("UTF-16, not UTF-8")
    encoding = "utf-8"
    try:
        if kind == "python":
            encoding = codecs.lookup(tokenize.detect_encoding(io.BytesIO(raw).readline)[0]).name
            if encoding in QUADRATIC:
                raise LookupError
        return raw.decode(encoding)
    except LookupError:  # a coding line may name something that is not a text encoding, such as rot13
        raise UnusableDocument("coding line that is no text encoding") from None
    except (UnicodeError, SyntaxError):  # SyntaxError: a coding line that names no encoding
        raise UnusableDocument("not UTF-8") from None


def _get_row_text(line: str, key: str, template: ChatTemplate | None) -> str:
    """Return the text or the rendered chat that a line of JSON holds under `key`. Raises UnusableDocument."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UnusableDocument("invalid JSON") from None
    if not isinstance(row, dict):
        raise UnusableDocument("not a JSON object")
    if key not in row:
        raise UnusableDocument(f"no key '{key}'")
    if isinstance(row[key], list) and template is not None:
        try:
            return template.render(row[key])
        except ValueError as defect:
            raise UnusableDocument(str(defect)) from None
    if not isinstance(row[key], str):
        raise UnusableDocument(f"'{key}' is not text")
    return row[key]
