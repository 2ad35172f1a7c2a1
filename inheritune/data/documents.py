"""Documents: which files a data section names, the documents in them, in order, and the text of each.

`Corpus` lists the files: the embedded corpus, local globs, or a pinned data set of the Hub, which is
downloaded file by file as reading proceeds. `batch_documents` streams their documents as raw bytes.
`extract_text` returns the text of one or says why it cannot be used. Every reader notices whether its file is
complete, as far as the format allows: see decoders.py and the table in tests/damage.md.
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

from inheritune.config.paths import REPOSITORY
from inheritune.config.sections import Data
from inheritune.data.decoders import (
    BYTE_ORDER_MARK,
    count_parquet,
    read_json_documents,
    read_lines,
    read_parquet,
    report_read_errors,
)
from inheritune.errors import UserError
from inheritune.files.hub import translate_hub_errors
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import hash_file

log = logging.getLogger(__name__)

KINDS = {".txt": "text", ".py": "python", ".parquet": "text"} | dict.fromkeys(
    (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz"), "json"
)
"""How each kind of file holds its documents, by the end of its name."""
ONE_DOCUMENT = (".txt", ".py")
"""Kinds of files that are one document each."""
QUADRATIC = {"punycode", "idna"}
"""Encodings that a coding line may name and whose decoding time grows with the square of the text's
length."""
MOST_NULS = 0.1
"""Largest share of NULs in a document. UTF-16 of English has one in two characters; a text with a stray NUL,
or with a table of them, has far fewer."""
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Corpus:
    """The files of a data section, in order, by group. There is one group without a name unless `data.files`
    is a mapping."""

    def __init__(self, data: Data, folder: Path):
        """`folder` keeps the listing of a Hub data set, so that a machine without internet sees the same
        files."""
        self.data = data
        self.groups: dict[str, list[str]] = {}
        if data.source == "embedded":
            self.groups[""] = _list_standard_library()
        else:
            find = _find_local_files if data.source == "files" else _make_hub_finder(data, folder)
            patterns = data.files if isinstance(data.files, dict) else {"": data.files}
            for group in sorted(patterns):  # the hash of the data section ignores the order of the keys
                names = (name for pattern in patterns[group] for name in find(pattern))
                self.groups[group] = list(dict.fromkeys(names))
        if data.source == "files":
            self.groups = _drop_links(self.groups)
        for name in itertools.chain(*self.groups.values()):
            _find_suffix(name)

    def path(self, name: str) -> Path:
        """Return the file on this machine. A file of the Hub is downloaded when it is first asked for."""
        if self.data.source == "embedded":
            return Path(sysconfig.get_path("stdlib")) / name
        return _download_file(self.data, name) if self.data.source == "hub" else Path(name)

    def describe(self, name: str) -> dict:
        """Return the file's entry in the manifest: name, bytes, and the Hub's commit or a local file's hash,
        by which a later `prepare` finds whether it has changed."""
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
        path, suffix = self.path(name), _find_suffix(name)
        with report_read_errors(path):
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
        """Return the number of documents in a file, usable or not."""
        suffix = _find_suffix(name)
        if suffix == ".parquet":
            return count_parquet(self.path(name), self.data.text_key)
        return sum(1 for _ in self.documents(name)) if KINDS[suffix] == "json" else 1


def _find_suffix(name: str) -> str:
    """Return the key of KINDS that `name` ends with. Raises UserError if there is none."""
    suffix = next((suffix for suffix in sorted(KINDS, key=len, reverse=True) if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            f"{name}: documents are read from {', '.join(KINDS)} files only; convert it, or narrow data.files"
        )
    return suffix


def _list_standard_library() -> list[str]:
    """Return the .py files of this Python's standard library, without tests and installed packages."""
    stdlib, found = sysconfig.get_path("stdlib"), []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        found += [
            os.path.relpath(os.path.join(folder, name), stdlib) for name in names if name.endswith(".py")
        ]
    return sorted(found)


def _find_local_files(pattern: str) -> list[str]:
    """Return the sorted files that match, from the current folder or else from the repository.

    A pattern that is a file's own name means that file, even if it holds a bracket or a star."""
    given = os.path.expanduser(os.path.expandvars(pattern))
    for base in (os.getcwd(), str(REPOSITORY)):
        literal = os.path.join(base, given)
        if os.path.isfile(literal):
            return [literal]
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


def _drop_links(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return `groups` with each real file once: under its own name if that was found, else under its first
    link's.

    A link to a folder above itself would give each document many times, in both parts of the split. Raises
    UserError if a file belongs to two groups."""
    taken: dict[str, str] = {}
    result = {}
    for group, names in groups.items():
        real = {name: os.path.realpath(name) for name in names}
        own = {place for name, place in real.items() if os.path.abspath(name) == place}
        kept: dict[str, str] = {}
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


def _pin_of(data: Data) -> tuple[str, str]:
    """Return (repository, commit) of a Hub data set. Raises UserError if `data.revision` is not a commit."""
    if data.repo is None or not re.fullmatch("[0-9a-f]{40}", data.revision or ""):
        raise UserError(
            f"data.revision: '{data.revision}' is not a commit of {data.repo}; write the 40 digits that the "
            f"Hub shows under 'Files and versions', so that the data cannot change under the experiment"
        )
    return data.repo, str(data.revision)


def _download_file(data: Data, name: str) -> Path:
    """Return the path of one file of the data set in the Hub's cache; download it if it is missing there."""
    import huggingface_hub

    repo, revision = _pin_of(data)
    with translate_hub_errors(f"{name} of {repo}@{revision}", f"datasets/{repo}"):
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=revision))


def _make_hub_finder(data: Data, folder: Path) -> Callable[[str], list[str]]:
    """Return a function from a pattern to the sorted names in the data set that match it.

    The names come from the listing kept in `folder`, else from the Hub. A name without a wildcard needs
    neither."""
    repo, revision = _pin_of(data)

    def find(pattern: str) -> list[str]:
        if not glob.has_magic(pattern):
            return [pattern]
        listed = _list_hub_files(repo, revision, folder / "hub_files.json")
        found = [name for name in listed if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"data.files: '{pattern}' matches none of the {len(listed)} files of {repo} at {revision}"
            )
        return found

    return find


def _list_hub_files(repo: str, revision: str, kept: Path) -> list[str]:
    """Return the sorted names of all files of a Hub data set: from `kept`, else from the Hub, then kept.

    Offline and without a kept listing, the names in the Hub's cache are used. A warning says so, because a
    part of the files is other data."""
    import huggingface_hub
    from huggingface_hub import constants

    if kept.is_file():
        return read_json(kept)
    what, page = f"the listing of {repo}@{revision}", f"datasets/{repo}"
    if constants.HF_HUB_OFFLINE:
        with translate_hub_errors(what, page):
            cache = Path(
                huggingface_hub.snapshot_download(
                    repo, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
        found = sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())
        log.warning("offline: %s@%s is taken to be the %d files in %s", repo, revision, len(found), cache)
        return found
    with translate_hub_errors(what, page):
        found = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=revision))
    write_json(kept, found)
    return found


# --- batches and texts --------------------------------------------------------------------------------------


@dataclass
class DocumentBatch:
    """Consecutive documents of one group and kind."""

    group: str
    kind: str
    raws: list[bytes | None] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(index of the file in its group, line) of each document."""
    size: int = 0
    end: tuple[int, int] = (0, 0)
    """Where the next batch starts: (index of the file, number of its documents that are read)."""


def batch_documents(
    corpus: Corpus, group: str, start: tuple[int, int], batch_bytes: int
) -> Iterator[DocumentBatch]:
    """Yield the group's documents from `start` on, in batches of about `batch_bytes`.

    They are cut by size alone, so a start at an earlier batch's end gives the same remaining batches."""
    names = corpus.groups[group]
    batch: DocumentBatch | None = None
    for index in range(start[0], len(names)):
        suffix = _find_suffix(names[index])
        kind, done = KINDS[suffix], start[1] if index == start[0] else 0
        for line, raw in itertools.islice(corpus.documents(names[index]), done, None):
            if batch is not None and (batch.size >= batch_bytes or batch.kind != kind):
                yield batch
                batch = None
            batch = batch or DocumentBatch(group, kind)
            done += 1
            batch.raws.append(raw)
            batch.places.append((index, line))
            batch.size += len(raw or b"") + 64  # so that empty documents fill a batch too
            batch.end = (index, done)
        if batch is not None and suffix not in ONE_DOCUMENT:  # the next file may need a download first
            yield batch
            batch = None
    if batch is not None:
        yield batch


class UnusableDocument(Exception):
    """A document that is left out. The message is the kind of defect that the manifest counts."""


def extract_text(kind: str, raw: bytes | None, key: str) -> str:
    """Return the document's text. Raises UnusableDocument."""
    if not raw:
        raise UnusableDocument("empty text")
    text = _decode(kind, raw)
    if kind == "json":
        text = _get_row_text(text, key)
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


def _get_row_text(line: str, key: str) -> str:
    """Return the text that a line of JSON holds under `key`. Raises UnusableDocument."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UnusableDocument("invalid JSON") from None
    if not isinstance(row, dict):
        raise UnusableDocument("not a JSON object")
    if key not in row:
        raise UnusableDocument(f"no key '{key}'")
    if not isinstance(row[key], str):
        raise UnusableDocument(f"'{key}' is not text")
    return row[key]
