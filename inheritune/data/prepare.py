"""Documents to token shards: `prepare(experiment)` fills the experiment's data folder, once, for every run
that reads it.

    data/<name>-<hash>/  train_00000.bin ... val_00000.bin ...  tokenizer/  manifest.json

The manifest is written last. Without it the folder does not count as prepared.

The parent reads documents in source order and hands batches of raw bytes to one process per core, which parse
and encode them. The parent puts the results in order again, splits them and writes raw little-endian ids. The
bytes depend on the data section and the documents only: not on the number of workers, nor on how often the
program was killed and started again. `progress.json` says up to which document the files are good; everything
after that is cut off and redone.
"""

import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.data.corpus_changes import report_changes
from inheritune.data.documents import Corpus
from inheritune.data.encoded_units import PARTS
from inheritune.data.first_documents import check_first_documents
from inheritune.data.preparation import PROGRESS, Preparation
from inheritune.data.prepare_parts import parse_part, run_part
from inheritune.data.worker_pool import open_pool
from inheritune.errors import UserError
from inheritune.files.lock import Lock
from inheritune.files.markers import MANIFEST, find_damage, is_prepared, read_marked_files
from inheritune.files.rundir import get_data_dir
from inheritune.files.writing import remove_leftovers, remove_path
from inheritune.runtime import signals

log = logging.getLogger(__name__)


def prepare(experiment: Experiment, workers: int | None = None, part: str | None = None) -> Path:
    """Tokenize the experiment's documents into its data folder, unless that is done already, and return the
    folder.

    With `part`, such as 2/8, only that part's files are encoded, and the part that ends last joins all
    (prepare_parts.py). `workers` processes encode (default: one per core this process may use). Documents
    that cannot be used are counted and named in manifest.json. A second start resumes where the first one
    stopped. Raises UserError if a source is missing, unreadable or without any usable document, or if the
    disk is full."""
    data, folder = experiment.data, get_data_dir(experiment)
    workers, chosen = workers or len(os.sched_getaffinity(0)), parse_part(part) if part else (1, 1)
    if _is_prepared(folder):  # checked without the lock first: the folder may belong to another user
        report_changes(experiment, folder)
        return folder
    # a second prepare of the same data waits here, then finds it done
    with Lock(folder, signals.get_stop_signal, wait=math.inf):
        if _is_prepared(folder):
            report_changes(experiment, folder)
            return folder
        corpus = Corpus(data, folder)
        if not (folder / PROGRESS).is_file():
            check_first_documents(corpus)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        remove_path(folder / MANIFEST)
        in_parts = part is not None or (folder / PARTS).is_dir()
        if not in_parts:
            preparation = Preparation(data, folder, corpus)
            with (
                report_killed_worker(folder, workers),
                open_pool(workers, data, preparation.tokenizer_dir) as pool,
            ):
                preparation.run(pool, window=2 * workers + 2)
    if in_parts:  # without the lock, for the other parts
        with report_killed_worker(folder, workers):
            run_part(experiment, folder, corpus, chosen, workers)
    return folder


@contextmanager
def report_killed_worker(folder: Path, workers: int) -> Iterator[None]:
    """Raise UserError if a process of the pool was killed."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed while preparing {folder} (out of memory?); start again with fewer "
            f"workers than {workers}: what is written is kept"
        ) from None


def _is_prepared(folder: Path) -> bool:
    """Return whether the manifest exists and each file has the content that it says."""
    if not is_prepared(folder):
        return False
    if damage := next(find_damage(folder, read_marked_files(folder / MANIFEST)), None):
        log.warning("%s: preparing again", damage)
        return False
    log.info("%s is already prepared", folder)
    return True
