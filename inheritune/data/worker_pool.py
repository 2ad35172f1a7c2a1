"""Encoding in worker processes: a pool in which each worker has the tokenizer loaded, and the stream of
encoded batches in the order of the documents."""

import logging
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from inheritune.config.sections import Data
from inheritune.data.documents import DocumentBatch, UnusableDocument, extract_text
from inheritune.data.tokenizer import Tokenizer, encode_each
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.runtime import signals

log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """The tokens of one batch of documents."""

    ids: np.ndarray
    """(tokens,), of the tokenizer's dtype, end of text included."""
    lengths: np.ndarray
    """(documents,) int64: tokens of each document, 0 if it is unusable."""
    defects: list[tuple[int, str]]
    """(index of the document, defect) of the unusable ones."""
    digests: list[bytes]
    """The xxh3-128 hash of each document's text, empty for an unusable one; no hashes unless duplicates are
    left out."""


# --- the pool -----------------------------------------------------------------------------------------------


_worker: tuple[Tokenizer, Data] | None = None


def _start_worker(data: Data, tokenizer_dir: Path) -> None:
    global _worker
    _worker = load_tokenizer(data, tokenizer_dir), data


def _start_process(data: Data, tokenizer_dir: Path) -> None:
    signals.ignore_signals()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _start_worker(data, tokenizer_dir)


def _exit_with_parent() -> None:
    """Wait for the end of the parent, then end this process: a killed parent cannot stop its workers, and
    they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Process(SpawnProcess):
    """A worker process. No signal ends it before it ignores them (`_start_process`)."""

    def start(self) -> None:
        with signals.hold_signals():
            super().start()


class _Spawn(SpawnContext):
    """Starts workers as new processes: a fork would copy the parent's threads (pyarrow) half alive."""

    Process = _Process


def _start_pool(workers: int, data: Data, tokenizer_dir: Path) -> Executor:
    if workers > 1:
        # multiprocessing's own process removes the locks where a second Ctrl-C ends this one; its warning
        # about that is of no use
        sys.warnoptions.append("ignore:resource_tracker")
        try:
            return ProcessPoolExecutor(workers, _Spawn(), _start_process, (data, tokenizer_dir))
        except OSError as error:  # its locks are in /dev/shm
            log.warning("several workers need a writable /dev/shm (%s): preparing with one", error.strerror)
    return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(data, tokenizer_dir))


@contextmanager
def open_pool(workers: int, data: Data, tokenizer_dir: Path) -> Iterator[Executor]:
    """Open an executor of `workers` processes, each with the tokenizer loaded. A single worker is a thread of
    this process."""
    pool = _start_pool(workers, data, tokenizer_dir)
    try:
        yield pool
    except BrokenProcessPool:
        _end_broken_pool(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_broken_pool(pool: Executor) -> None:
    """Let a pool that has lost a worker end: its workers ignore the SIGTERM by which it would end them, and
    Python before 3.11.5 waits for ever for a batch to be written into the pipe that nobody reads any more
    (CPython issue 94777)."""
    for worker in multiprocessing.active_children():
        worker.kill()
    queue = getattr(pool, "_call_queue", None)
    if queue is not None:
        with suppress(OSError):
            queue._reader.close()


# --- encoding -----------------------------------------------------------------------------------------------


def encode_documents(kind: str, key: str, raws: list[bytes | None]) -> Encoded:
    """Encode a batch of documents, as `extract_text` takes them, with this worker's tokenizer."""
    if _worker is None:
        raise RuntimeError("_start_worker has not run in this process")
    tokenizer, data = _worker
    texts, used, bad = [], [], []
    for index, raw in enumerate(raws):
        try:
            texts.append(extract_text(kind, raw, key, tokenizer.chat_template))
            used.append(index)
        except UnusableDocument as defect:
            bad.append((index, str(defect)))
    extracted = used
    rows, refused = encode_each(tokenizer, texts)
    bad = sorted([*bad, *((used[index], defect) for index, defect in refused)])
    used = [document for index, document in enumerate(used) if index not in dict(refused)]
    end = np.array([tokenizer.end_of_text])
    lengths = np.zeros(len(raws), np.int64)
    lengths[used] = [len(row) + 1 for row in rows]
    parts = [part for row in rows for part in ((end, row) if data.end_of_text == "prepend" else (row, end))]
    ids = np.zeros(0, tokenizer.dtype)
    if parts:
        ids = np.concatenate(parts, dtype=tokenizer.dtype, casting="unsafe")
    digests = [b""] * len(raws) if data.deduplicate else []
    if digests:
        for index, text in zip(extracted, texts, strict=True):
            digests[index] = xxhash.xxh3_128_digest(text.encode())
    return Encoded(ids, lengths, bad, digests)


def _submit(pool: Executor, batch: DocumentBatch) -> "Future[Encoded]":
    """Hand a batch to a worker. The pool starts its workers here. One that is killed while it starts closes
    the pipe through which it is told what to do: that too is a broken pool."""
    try:
        return pool.submit(encode_documents, batch.kind, batch.key, batch.raws)
    except BrokenPipeError as error:
        raise BrokenProcessPool("a worker process ended while it started") from error


def encode_batches(
    batches: Iterator[DocumentBatch], pool: Executor, window: int
) -> Iterator[tuple[DocumentBatch, Encoded]]:
    """Yield each batch, without its raw bytes, and its tokens, in order.

    At most `window` batches are in progress, so memory does not grow with the data. Raises what reading
    raised, after the batches that came before it."""
    waiting: deque[tuple[DocumentBatch, Future[Encoded]]] = deque()
    more, failure = True, None
    while more or waiting:
        while more and len(waiting) < window:
            try:
                batch = next(batches, None)
            except UserError as error:  # in reading ahead: the batches before it may be all that is wanted
                batch, failure = None, error
            if batch is None:
                more = False
            else:
                waiting.append((batch, _submit(pool, batch)))
                batch.raws = []
        if waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    if failure:
        raise failure
