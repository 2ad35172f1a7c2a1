"""Encoded documents in units, which parts of a preparation write and the join reads.

A unit is a file, or a run of small files that are one document each. Its folder parts/000012/ in the data
folder has the ids, a table of the documents, and unit.json, which says what it was made from. The folder
appears at once, when it is complete.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inheritune.data.documents import ONE_DOCUMENT, Corpus, DocumentBatch
from inheritune.data.worker_pool import Encoded
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import find_damage, hash_folder
from inheritune.files.storage import explain_disk_error
from inheritune.files.writing import replace_atomically

PARTS = "parts"
"""Folder of the units in the data folder; it is removed once they are joined."""
UNIT_FILES = 256
"""Small files of a unit."""
IDS, TABLE, UNIT = "ids.bin", "table.npz", "unit.json"


class Unit(NamedTuple):
    """Files of a group that are encoded together."""

    number: int
    group: str
    first: int
    """Index of the first file in its group."""
    stop: int
    """Index after the last file."""


def list_units(corpus: Corpus) -> list[Unit]:
    """Return the units of all files, in the order of the groups."""
    units: list[Unit] = []
    for group, names in corpus.groups.items():
        first = 0
        while first < len(names):
            stop = first + 1
            while (
                stop < min(len(names), first + UNIT_FILES)
                and names[first].endswith(ONE_DOCUMENT)
                and names[stop].endswith(ONE_DOCUMENT)
            ):
                stop += 1
            units.append(Unit(len(units), group, first, stop))
            first = stop
    return units


@dataclass(slots=True)
class EncodedDocument:
    """A document of a unit. It has the length of the raw document, by which batches are cut."""

    size: int
    ids: np.ndarray
    defect: str | None
    digest: bytes

    def __len__(self) -> int:
        return self.size


class EncodedUnits:
    """The units of a data folder. For `batch_documents` it stands in for the Corpus that they were made
    from."""

    def __init__(self, corpus: Corpus, folder: Path, inputs: str, fingerprint: str):
        """`inputs` is the state of the corpus, `fingerprint` that of the tokenizer: a unit that was made from
        others does not count."""
        self.corpus, self.folder, self.groups = corpus, folder / PARTS, corpus.groups
        self.origin = {"inputs": inputs, "tokenizer": fingerprint}
        self.units = list_units(corpus)
        self._unit_of = {name: unit for unit in self.units for name in self._list_names(unit)}
        self._facts: dict[int, dict] = {}
        """unit.json of the complete units."""
        self._open: tuple[int, list[EncodedDocument], list[tuple[int, int]], dict] | None = None

    def _list_names(self, unit: Unit) -> list[str]:
        return self.groups[unit.group][unit.first : unit.stop]

    def path(self, unit: Unit) -> Path:
        """Return the unit's folder."""
        return self.folder / f"{unit.number:06d}"

    def write(self, unit: Unit, stream: Iterator[tuple[DocumentBatch, Encoded]], dtype: str) -> None:
        """Write a unit from its encoded batches. Raises UserError if the disk is full."""
        columns: dict[str, list[np.ndarray]] = {"sizes": [], "lengths": [], "files": [], "lines": []}
        kinds: dict[str, str] = {}
        defects: list[tuple[int, str]] = []
        digests: list[bytes] = []
        n_documents = 0
        with replace_atomically(self.path(unit)) as place:
            place.mkdir()
            try:
                with open(place / IDS, "wb") as out:
                    for batch, encoded in stream:
                        out.write(np.ascontiguousarray(encoded.ids, dtype).data)
                        files, lines = np.array(batch.places, np.int64).reshape(-1, 2).T
                        found = {
                            "sizes": batch.sizes,
                            "lengths": encoded.lengths,
                            "files": files,
                            "lines": lines,
                        }
                        for name, column in found.items():
                            columns[name].append(np.asarray(column, np.int64))
                        kinds |= dict.fromkeys(map(str, np.unique(files)), batch.kind)
                        defects += [(n_documents + index, defect) for index, defect in encoded.defects]
                        digests += encoded.digests
                        n_documents += len(encoded.lengths)
            except OSError as error:
                raise explain_disk_error(error, self.path(unit)) from error
            empty = np.zeros(0, np.int64)
            arrays: dict[str, Any] = {
                name: np.concatenate([empty, *parts]) for name, parts in columns.items()
            }
            padded = b"".join(digest.ljust(16, b"\0") for digest in digests)
            np.savez(place / TABLE, digests=np.frombuffer(padded, np.uint8), **arrays)
            facts = {"documents": n_documents, "tokens": int(arrays["lengths"].sum()), "dtype": dtype}
            facts |= {"kinds": kinds, "defects": defects, "files": hash_folder(place, only=(IDS, TABLE))}
            write_json(place / UNIT, {**self.origin, **facts})

    def read_facts(self, unit: Unit) -> dict | None:
        """Return what unit.json says of a complete unit of these documents; None if there is none."""
        if unit.number not in self._facts:
            path = self.path(unit) / UNIT
            facts = read_json(path) if path.is_file() else {}
            if {key: facts.get(key) for key in self.origin} != self.origin:
                return None
            self._facts[unit.number] = facts
        return self._facts[unit.number]

    def has_enough(self) -> bool:
        """Return whether the units up to the first missing one hold `max_tokens`, and all documents of the
        batch in which these end: small files share one, also with those of the next unit of their group.

        In a mixture, or where duplicates are left out, all units are needed."""
        data, tokens = self.corpus.data, 0
        if not data.max_tokens or data.shares or data.deduplicate:
            return False
        for unit in self.units:
            facts, names = self.read_facts(unit), self.groups[unit.group]
            if facts is None:
                return False
            tokens += facts["tokens"]
            ends_batch = unit.stop == len(names) or not names[unit.stop - 1].endswith(ONE_DOCUMENT)
            if tokens >= data.max_tokens and ends_batch:
                return True
        return tokens >= data.max_tokens

    def list_missing(self) -> list[Unit]:
        """Return the units that the join still needs."""
        return [] if self.has_enough() else [unit for unit in self.units if self.read_facts(unit) is None]

    # --- as batch_documents reads a corpus ------------------------------------------------------------------

    def get_text_key(self, group: str) -> str:
        """Return the key of the group's documents."""
        return self.corpus.get_text_key(group)

    def kind(self, name: str) -> str:
        """Return how the file held its documents."""
        unit = self._unit_of[name]
        kinds = self._load(unit)[3]["kinds"]
        return kinds.get(str(self.groups[unit.group].index(name, unit.first)), "text")

    def documents(self, name: str) -> Iterator[tuple[int, EncodedDocument]]:
        """Yield (line, document) of each document of a file, in order."""
        unit = self._unit_of[name]
        index = self.groups[unit.group].index(name, unit.first)
        _, documents, places, _ = self._load(unit)
        for document, (file, line) in zip(documents, places, strict=True):
            if file == index:
                yield line, document

    def count(self, name: str) -> int:
        """Return the number of documents of a file, usable or not."""
        unit = self._unit_of[name]
        facts = self.read_facts(unit)
        if facts is None:  # beyond max_tokens
            return self.corpus.count(name)
        if unit.stop - unit.first == 1:
            return facts["documents"]
        return sum(1 for _ in self.documents(name))

    def _load(self, unit: Unit) -> tuple[int, list[EncodedDocument], list[tuple[int, int]], dict]:
        """Return (number, documents, [(index of the file, line)], facts) of a unit.

        Raises UserError if it is missing or damaged."""
        if self._open is not None and self._open[0] == unit.number:
            return self._open
        place, facts = self.path(unit), self.read_facts(unit)
        if facts is None or any(find_damage(place, facts["files"])):
            raise UserError(f"{place} is missing or damaged; remove it, and run the parts again")
        table = np.load(place / TABLE, allow_pickle=False)
        ids = np.fromfile(place / IDS, facts["dtype"])
        rows = np.split(ids, table["lengths"].cumsum()[:-1]) if len(table["lengths"]) else []
        defects, digests = dict(facts["defects"]), table["digests"].tobytes()
        found = [digests[at : at + 16] for at in range(0, len(digests), 16)] or [b""] * len(rows)
        documents = [
            EncodedDocument(size, row, defects.get(number), digest if len(row) else b"")
            for number, (size, row, digest) in enumerate(
                zip(table["sizes"].tolist(), rows, found, strict=True)
            )
        ]
        places: list[tuple[int, int]] = list(
            zip(table["files"].tolist(), table["lines"].tolist(), strict=True)
        )
        self._open = (unit.number, documents, places, facts)
        return self._open


def collect_batch(batch: DocumentBatch, dtype: str, deduplicate: bool) -> Encoded:
    """Return the tokens of a batch whose documents are EncodedDocuments."""
    documents: list[EncodedDocument] = batch.raws  # type: ignore[assignment]
    batch.raws = []
    ids = np.concatenate([np.zeros(0, dtype), *(document.ids for document in documents)])
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    defects = [(index, document.defect) for index, document in enumerate(documents) if document.defect]
    return Encoded(ids, lengths, defects, [document.digest for document in documents] if deduplicate else [])
