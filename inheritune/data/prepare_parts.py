"""One part of a preparation: it encodes its share of the files, and the part that ends last joins all.

    python -m inheritune prepare EXPERIMENT --part 2/8

Parts run at any time, on any machine that sees the data folder. Their units (encoded_units.py) are the same
whichever part makes them, and the join reads them in the order of the documents: the shards have the same
bytes as those of one process, at any number of parts. While the join runs, the tokens are on disk twice.
"""

import logging
import math
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.data.documents import Corpus, DocumentBatch, batch_documents
from inheritune.data.encoded_units import PARTS, EncodedUnits, Unit
from inheritune.data.preparation import BATCH_BYTES, MIXED_BATCH_BYTES, Preparation
from inheritune.data.progress_meter import ProgressMeter
from inheritune.data.worker_pool import Encoded, encode_batches, open_pool
from inheritune.errors import Stopped, UserError
from inheritune.files.lock import Lock
from inheritune.files.markers import is_prepared
from inheritune.files.writing import remove_path
from inheritune.runtime import signals

log = logging.getLogger(__name__)


def parse_part(text: str) -> tuple[int, int]:
    """Return (number from 1, number of parts) of "2/8". Raises UserError if it is none."""
    number, slash, parts = str(text).partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--part takes a part of all, such as 2/8 (got '{text}')")
    return int(number), int(parts)


class PartPreparation:
    """Part `number` of `parts` of the preparation of a data folder, which is not prepared yet."""

    def __init__(self, experiment: Experiment, folder: Path, corpus: Corpus, part: tuple[int, int]):
        """Make the tokenizer, if no other part has."""
        self.data, self.folder, self.corpus = experiment.data, folder, corpus
        self.number, self.parts = part
        shared = Preparation(experiment.data, folder, corpus, only_tokenizer=True)
        self.dtype, self.tokenizer_dir = shared.tokenizer.dtype, shared.tokenizer_dir
        self.encoded = EncodedUnits(corpus, folder, shared.inputs, shared.tokenizer.fingerprint)
        self.meter, self.tokens = ProgressMeter(0), 0

    def encode(self, pool: Executor, window: int) -> None:
        """Encode the units of this part that are missing."""
        (self.folder / PARTS).mkdir(exist_ok=True)
        for unit in self.encoded.units[self.number - 1 :: self.parts]:
            if self.encoded.read_facts(unit) is not None or self.encoded.has_enough():
                continue
            # the same part may run twice
            with Lock(self.encoded.path(unit), signals.get_stop_signal, wait=math.inf):
                if self.encoded.read_facts(unit) is None:
                    if is_prepared(self.folder):  # the units were joined and removed meanwhile
                        break
                    self.encoded.write(unit, self._stream(unit, pool, window), self.dtype)
        self.meter.close()

    def _stream(self, unit: Unit, pool: Executor, window: int) -> Iterator[tuple[DocumentBatch, Encoded]]:
        """Yield the encoded batches of a unit. Raises Stopped when asked to stop."""
        size = MIXED_BATCH_BYTES if self.data.shares else BATCH_BYTES
        batches = batch_documents(self.corpus, unit.group, (unit.first, 0), size, unit.stop)
        for batch, encoded in encode_batches(batches, pool, window):
            yield batch, encoded
            self.tokens += len(encoded.ids)
            self.meter.show(self.tokens, None)
            if signals.get_stop_signal():
                raise Stopped(
                    f"preparing part {self.number} of {self.parts} of {self.folder} stopped; the same "
                    f"command resumes with the file that it was at"
                )

    def list_missing_parts(self) -> list[int]:
        """Return the numbers of the parts that are not complete."""
        return sorted({unit.number % self.parts + 1 for unit in self.encoded.list_missing()})


def run_part(
    experiment: Experiment, folder: Path, corpus: Corpus, part: tuple[int, int], workers: int
) -> None:
    """Encode a part, then join all parts if this one was the last.

    Raises UserError as `prepare` does. The folder's lock may not be held by the caller."""
    with Lock(folder, signals.get_stop_signal, wait=math.inf):
        if is_prepared(folder):
            return
        preparation = PartPreparation(experiment, folder, corpus, part)
    try:
        with open_pool(workers, experiment.data, preparation.tokenizer_dir) as pool:
            preparation.encode(pool, 2 * workers + 2)
    except (OSError, UserError):
        if not is_prepared(folder):  # else the others had enough tokens, and the join removed the units
            raise
    missing = preparation.list_missing_parts()
    if missing and not is_prepared(folder):  # in this order: the join removes the units after the manifest
        log.info(
            "part %d of %d of %s is encoded; not complete yet: part %s; the part that ends last joins all",
            *part,
            folder,
            ", ".join(map(str, missing)),
        )
        return
    with Lock(folder, signals.get_stop_signal, wait=math.inf):
        if not is_prepared(folder):
            Preparation(experiment.data, folder, corpus, only_tokenizer=True).join(preparation.encoded)
        remove_path(folder / PARTS)
