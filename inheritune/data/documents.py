"""Documents: which files a data section names, the documents in them, in order, and the text of each.

`Source` lists the files (the embedded corpus, local globs, a pinned data set of the Hub, downloaded file by
file as reading goes). `read_batches` streams their documents as raw bytes, `parse` makes text of one or says
why it cannot be used. Every reader notices whether its file ended whole, as far as the format tells:
decoders.py, and the table in tests/damage.md.
"""

import codecs
import fnmatch
import glob
import io
import itertools
import json
import logging
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from inheritune.config.experiment import REPOSITORY, Data
from inheritune.data.decoders import (
    BYTE_ORDER_MARK,
    count_parquet,
    decoding,
    read_json_documents,
    read_lines,
    read_parquet,
)
from inheritune.errors import UserError
from inheritune.files.hub import hub_errors
from inheritune.files.rundir import hash_file, read_json, write_json

log = logging.getLogger(__name__)

KINDS = {".txt": "text", ".py": "python", ".parquet": "text"} | dict.fromkeys(
    (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz"), "json"
)
QUADRATIC = {"punycode", "idna"}
"""Encodings that a coding line may name and whose decoders take a time that grows with the square of a text's
length."""
MOST_NULS = 0.1
"""Of a document's characters: UTF-16 of English has one in two, a text with a stray NUL or a table of them
far fewer."""
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Source:
    """The files of a data section, in order, by group (one group without a name unless `data.files` is a
    mapping)."""

    def __init__(self, data: Data, folder: Path):
        """`folder` keeps the listing of a Hub data set, so that a machine without internet sees the same
        files."""
        self.data = data
        self.groups: dict[str, list[str]] = {}
        if data.source == "embedded":
            self.groups[""] = _standard_library()
        else:
            if data.source == "hub" and not re.fullmatch("[0-9a-f]{40}", data.revision):
                raise UserError(
                    f"data.revision: '{data.revision}' is no commit of {data.repo}; write the 40 digits that "
                    f"the Hub shows "
                    f"under 'Files and versions', so that the data cannot change under the experiment"
                )
            patterns = data.files if isinstance(data.files, dict) else {"": data.files}
            find = _local_files if data.source == "files" else _hub_listing(data, folder)
            for group in sorted(patterns):  # the hash of the data section does not see the order of the keys
                self.groups[group] = list(
                    dict.fromkeys(name for pattern in patterns[group] for name in find(pattern))
                )
        if data.source == "files":
            self.groups = _each_file_once(self.groups)
        for name in itertools.chain(*self.groups.values()):
            _suffix(name)

    def path(self, name: str) -> Path:
        """The file on this machine; a file of the Hub is downloaded when it is first asked for."""
        if self.data.source == "embedded":
            return Path(sysconfig.get_path("stdlib")) / name
        return _hub_file(self.data, name) if self.data.source == "hub" else Path(name)

    def describe(self, name: str) -> dict:
        """Return the file's entry in the manifest: name, bytes, and the Hub's commit or a local file's hash,
        by which a later `prepare` tells whether it has changed."""
        entry = self._size_of(name)
        if self.data.source == "hub":
            return entry | {"revision": self.data.revision}
        return entry | {"xxh3": hash_file(self.path(name))}

    def _size_of(self, name: str) -> dict:
        return {"name": name, "bytes": self.path(name).stat().st_size}

    def state(self) -> str:
        """Return a hash that changes when the documents do: names with sizes and times of change, or names
        with the commit of a Hub data set."""

        def facts_of(name: str) -> dict | str:
            if self.data.source == "hub":
                return name
            return self._size_of(name) | {"changed_ns": self.path(name).stat().st_mtime_ns}

        names = {group: [facts_of(name) for name in names] for group, names in self.groups.items()}
        return xxhash.xxh3_128_hexdigest(json.dumps([names, self.data.revision]).encode())

    def documents(self, name: str) -> Iterator[tuple[int, bytes | None]]:
        """Yield (line, row or element from 1, raw bytes) of each document of a file, in order.

        Raises UserError if the file is damaged, or ends in the middle of a frame, an archive or an array."""
        path, suffix = self.path(name), _suffix(name)
        with decoding(path):
            if suffix == ".parquet":
                yield from read_parquet(path, self.data.text_key)
            elif suffix.startswith(".json") and not suffix.startswith(".jsonl"):
                yield from read_json_documents(path, self.data.text_key)
            elif KINDS[suffix] == "json":
                yield from read_lines(path)
            elif suffix == ".txt":
                yield 1, path.read_bytes().removeprefix(BYTE_ORDER_MARK)
            else:  # Python's own reader of coding lines takes the mark into account
                yield 1, path.read_bytes()

    def count(self, name: str) -> int:
        """Documents in a file, usable or not."""
        if _suffix(name) == ".parquet":
            return count_parquet(self.path(name), self.data.text_key)
        return sum(1 for _ in self.documents(name)) if KINDS[_suffix(name)] == "json" else 1


def _suffix(name: str) -> str:
    suffix = next((suffix for suffix in sorted(KINDS, key=len, reverse=True) if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            f"{name}: documents are read from {', '.join(KINDS)} files only; convert it, or narrow data.files"
        )
    return suffix


def _standard_library() -> list[str]:
    """The .py files of this Python's standard library, tests and installed packages left out."""
    stdlib, found = sysconfig.get_path("stdlib"), []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        found += [
            os.path.relpath(os.path.join(folder, name), stdlib) for name in names if name.endswith(".py")
        ]
    return sorted(found)


def _local_files(pattern: str) -> list[str]:
    """Return the sorted files that match, from the current folder or else from the repository. A pattern that
    is a file's own name is that file, though it holds a bracket or a star."""
    given = os.path.expanduser(os.path.expandvars(pattern))
    for base in (os.getcwd(), str(REPOSITORY)):
        whole = os.path.join(base, given)
        if os.path.isfile(whole):
            return [whole]
        found = glob.glob(
            given if os.path.isabs(given) else os.path.join(glob.escape(base), given), recursive=True
        )
        if names := sorted(name for name in found if os.path.isfile(name)):
            return names
    brackets = (
        " ([ and ] mean a set of letters in a pattern; write [[] for a bracket)" if "[" in given else ""
    )
    raise UserError(
        f"data.files: '{pattern}' matches no file, neither from {os.getcwd()} nor from {REPOSITORY}{brackets}"
    )


def _each_file_once(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return `groups` with each real file once: under its own name if that was found, else under its first
    link's. (A link to a folder above itself would give each document many times, in both parts of the split.)

    Raises UserError if a file belongs to two groups."""
    taken: dict[str, str] = {}
    result = {}
    for group, names in groups.items():
        real = {name: os.path.realpath(name) for name in names}
        own = {place for name, place in real.items() if os.path.abspath(name) == place}
        kept = {}
        for name, place in real.items():
            if place not in kept and (place not in own or os.path.abspath(name) == place):
                kept[place] = name
        for place, name in kept.items():
            if place in taken:
                raise UserError(
                    f"data.files: {name} belongs to the groups '{taken[place]}' and '{group}'; leave it in "
                    f"one"
                )
            taken[place] = group
        result[group] = list(kept.values())
        if links := len(names) - len(kept):
            log.warning(
                "data.files: %d names are links to other files of the list; each file is read once", links
            )
    return result


# --- the Hub ------------------------------------------------------------------------------------------------


def _hub_file(data: Data, name: str) -> Path:
    """Path of one file of the data set in the Hub's cache, downloaded if it is not there."""
    import huggingface_hub

    with hub_errors(f"{name} of {data.repo}@{data.revision}", f"datasets/{data.repo}"):
        return Path(
            huggingface_hub.hf_hub_download(data.repo, name, repo_type="dataset", revision=data.revision)
        )


def _hub_listing(data: Data, folder: Path) -> Callable[[str], list[str]]:
    """A function from a pattern to the sorted names it matches. The names come from the listing kept in
    `folder`, else from the Hub (and are kept); a name without a wildcard needs neither. Offline and never
    listed, the names in the cache must do, which is said: a part of them gives other data."""
    kept = folder / "hub_files.json"

    def names() -> list[str]:
        import huggingface_hub
        from huggingface_hub import constants

        if kept.is_file():
            return read_json(kept)
        if constants.HF_HUB_OFFLINE:
            with hub_errors(f"the listing of {data.repo}@{data.revision}", f"datasets/{data.repo}"):
                cache = Path(
                    huggingface_hub.snapshot_download(
                        data.repo, repo_type="dataset", revision=data.revision, local_files_only=True
                    )
                )
            found = sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())
            log.warning(
                "offline: %s@%s is taken to be the %d files in %s",
                data.repo,
                data.revision,
                len(found),
                cache,
            )
            return found
        with hub_errors(f"the listing of {data.repo}@{data.revision}", f"datasets/{data.repo}"):
            found = huggingface_hub.HfApi().list_repo_files(
                data.repo, repo_type="dataset", revision=data.revision
            )
        write_json(kept, sorted(found))
        return sorted(found)

    def find(pattern: str) -> list[str]:
        if not glob.has_magic(pattern):
            return [pattern]
        listed = names()
        found = [name for name in listed if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"data.files: '{pattern}' matches none of the {len(listed)} files of {data.repo} at "
                f"{data.revision}"
            )
        return found

    return find


# --- batches and texts --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Consecutive documents of one group and kind."""

    group: str
    kind: str
    raws: list[bytes | None] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(index of the file in its group, line) of each document."""
    size: int = 0
    end: tuple[int, int] = (0, 0)
    """Where the next batch starts: (index of the file, documents of it that are read)."""


def read_batches(source: Source, group: str, start: tuple[int, int], batch_bytes: int) -> Iterator[Batch]:
    """The group's documents from `start` on. Cut by size alone, so a start at an earlier batch's end gives
    the same rest."""
    names, batch = source.groups[group], None
    for index in range(start[0], len(names)):
        kind, done = KINDS[_suffix(names[index])], start[1] if index == start[0] else 0
        for line, raw in itertools.islice(source.documents(names[index]), done, None):
            if batch is not None and (batch.size >= batch_bytes or batch.kind != kind):
                yield batch
                batch = None
            batch = batch or Batch(group, kind)
            done += 1
            batch.raws.append(raw)
            batch.places.append((index, line))
            batch.size += len(raw or b"") + 64  # so that empty documents fill a batch too
            batch.end = (index, done)
        if batch is not None and _suffix(names[index]) not in (
            ".txt",
            ".py",
        ):  # the next file may have to be downloaded first
            yield batch
            batch = None
    if batch is not None:
        yield batch


class Unusable(Exception):
    """A document that is left out; the text is the kind of defect that the manifest counts."""


def parse(kind: str, raw: bytes | None, key: str) -> str:
    """Return the document's text. Raises Unusable."""
    if not raw:
        raise Unusable("empty text")
    text = _decode(kind, raw)
    if kind == "json":
        text = _text_of_row(text, key)
    if not text:
        raise Unusable("empty text")
    if text.count("\0") > MOST_NULS * len(text):
        raise Unusable("NUL characters: UTF-16 without a mark, or no text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as \ud83d, or decoded by a coding line
        raise Unusable("not UTF-8") from None
    return text


def _decode(kind: str, raw: bytes) -> str:
    """Return the text of raw bytes: UTF-8, or of a Python file what its coding line says. Raises Unusable."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unusable("UTF-16, not UTF-8")
    encoding = "utf-8"
    try:
        if kind == "python":
            encoding = codecs.lookup(tokenize.detect_encoding(io.BytesIO(raw).readline)[0]).name
            if encoding in QUADRATIC:
                raise LookupError
        return raw.decode(encoding)
    except LookupError:  # a coding line may name what is no encoding of text, such as rot13
        raise Unusable("coding line that is no text encoding") from None
    except (UnicodeError, SyntaxError):  # SyntaxError: a coding line that names no encoding
        raise Unusable("not UTF-8") from None


def _text_of_row(line: str, key: str) -> str:
    """Return what a line of JSON holds under `key`. Raises Unusable."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise Unusable("invalid JSON") from None
    if not isinstance(row, dict):
        raise Unusable("not a JSON object")
    if key not in row:
        raise Unusable(f"no key '{key}'")
    if not isinstance(row[key], str):
        raise Unusable(f"'{key}' is not text")
    return row[key]
