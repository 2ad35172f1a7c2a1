"""Documents to token shards: `prepare(experiment)` fills the experiment's data folder, once, for every run
that reads it.

    data/<name>-<hash>/  train_00000.bin ... val_00000.bin ...  tokenizer/  manifest.json (last: without it
    nothing is there)

The parent reads documents in source order and hands batches of raw bytes to one process per core, which parse
and encode them; the parent puts the results in order again, splits them and writes raw little-endian ids. The
bytes depend on the data section and the documents only: not on the number of workers, nor on how often the
program was killed and started again (`progress.json` says up to which document the files are good; everything
after that is cut and redone).
"""

import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from inheritune.config.experiment import Data, Experiment, resolve_path
from inheritune.data.documents import Batch, Source, Unusable, parse, read_batches
from inheritune.data.tokens import Tokenizer, bpe_size, encode_each, load_tokenizer, train_bpe
from inheritune.errors import Stopped, UserError
from inheritune.files.lock import Lock
from inheritune.files.rundir import (
    break_links,
    damages,
    data_dir,
    disk_error,
    hash_file,
    hash_folder,
    marked_files,
    read_json,
    remove,
    remove_leftovers,
    replacing,
    sync_file,
    write_json,
)
from inheritune.runtime import signals

log = logging.getLogger(__name__)

BATCH_BYTES = 1 << 19  # of documents per task: 0.1 s of work for one core
MIXED_BATCH_BYTES = 1 << 16  # groups with weights alternate by batch, so theirs are smaller
BPE_SAMPLE_BYTES = 50_000_000
LONGEST_WORD = 10_000  # letters: the standard library's longest has 138
SAVE_EVERY_S = 60.0
EXAMPLES = 5  # named documents per kind of defect
LICENCES = {"embedded": "Python Software Foundation License Version 2 (PSF-2.0)"}


def prepare(experiment: Experiment, workers: int | None = None) -> Path:
    """Tokenize the experiment's documents into its data folder, unless that was done, and return the folder.

    `workers` processes encode (default: one per core this process may use). Documents that cannot be used are
    counted and named in manifest.json. Raises UserError if a source is missing, unreadable or without any
    usable document, or if the disk is full; started again it goes on where it stopped."""
    data, folder = experiment.data, data_dir(experiment)
    workers = workers or len(os.sched_getaffinity(0))
    if _is_prepared(folder):  # asked without the lock first: the folder may belong to someone else
        report_changes(experiment, folder)
        return folder
    with Lock(
        folder, signals.asked_to_stop, wait=math.inf
    ):  # a second prepare of the same data waits here, then finds it done
        if _is_prepared(folder):
            report_changes(experiment, folder)
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        remove(folder / "manifest.json")
        job = _Job(data, folder, Source(data, folder))
        with _pool(workers, data, job.tokenizer_dir) as pool:
            try:
                job.run(pool, window=2 * workers + 2)
            except BrokenProcessPool:
                for worker in (
                    multiprocessing.active_children()
                ):  # they ignore the SIGTERM by which the pool would end them
                    worker.kill()
                raise UserError(
                    f"a worker process was killed while preparing {folder} (out of memory?); start again "
                    f"with fewer "
                    f"workers than {workers}: what is written is kept"
                ) from None
        return folder


def _is_prepared(folder: Path) -> bool:
    """Whether the manifest is there and each file has the content that it says."""
    if not (folder / "manifest.json").is_file():
        return False
    if damage := next(damages(folder, marked_files(folder / "manifest.json")), None):
        log.warning("%s: preparing again", damage)
        return False
    log.info("%s is already prepared", folder)
    return True


def report_changes(experiment: Experiment, folder: Path) -> None:
    """Warn if the documents are no longer those that the data in `folder` was prepared from, and say how to
    prepare anew.

    Sizes are compared, and the content of files that are newer than the manifest. A data set of the Hub is
    pinned by its commit. Raises UserError if the names of the experiment now mean another corpus altogether
    (`check_same_corpus`)."""
    manifest, prepared = read_json(folder / "manifest.json"), shlex.quote(str(folder / "manifest.json"))
    anew = (
        f"to prepare anew, for runs that begin anew too: rm {prepared} && python -m inheritune prepare "
        f"{experiment.given}"
    )
    if tokenizer_changed(experiment.data, manifest):
        log.warning(
            "%s was prepared with other files of tokenizer %s, and stays as it is; %s",
            folder,
            experiment.data.tokenizer,
            anew,
        )
    before, data = {file["name"]: file for file in manifest["source_files"]}, experiment.data
    if data.source == "hub" or not before:
        return
    try:
        source = Source(data, folder)
    except UserError:  # no file matches any more
        return
    now = list(itertools.chain(*source.groups.values()))
    read_all = manifest.get("all_files", True)  # else reading ended at max_tokens, before the last file
    added = [name for name in now if name not in before] if read_all else []
    gone = [name for name in before if name not in now]
    if len(gone) == len(before):
        check_same_corpus(source, before, folder)
        return
    since = (folder / "manifest.json").stat().st_mtime
    changed = [
        name for name in before if name in now and _has_changed(source.path(name), before[name], since)
    ]
    found = {"new": added, "gone": gone, "changed": changed}
    parts = [
        f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for what, names in found.items()
        if names
    ]
    if parts:
        log.warning(
            "%s was prepared from other documents: %s. It stays as it is; %s", folder, ", ".join(parts), anew
        )


def check_corpus(experiment: Experiment, folder: Path) -> None:
    """`check_same_corpus` of prepared data, where the documents can be seen from here. (A compute node may
    see none.)"""
    if experiment.data.source != "files":
        return
    try:
        source = Source(experiment.data, folder)
    except UserError:
        return
    check_same_corpus(
        source, {file["name"]: file for file in read_json(folder / "manifest.json")["source_files"]}, folder
    )


def tokenizer_changed(data: Data, manifest: dict) -> bool:
    """Return whether the tokenizer that `data` names by a path gives other ids than the one that data was
    prepared with."""
    if not resolve_path(data.tokenizer).exists():
        return False
    return load_tokenizer(data).fingerprint != manifest["tokenizer"]["fingerprint"]


def check_same_corpus(source: Source, before: dict[str, dict], folder: Path) -> None:
    """Raises UserError if none of the files that data was prepared from (`before`: name to entry of the
    manifest) is among those of `source`, and their contents are others too: a relative path, or a variable,
    then means another corpus here.

    Files that were moved have the same contents. Where there are none, they are taken to be deleted on
    purpose."""
    names = list(itertools.chain(*source.groups.values()))
    if source.data.source != "files" or not before or not names or set(names) & set(before):
        return
    known = {entry.get("xxh3") for entry in before.values()} | {None}
    other = next((name for name in names if source.describe(name)["xxh3"] not in known), None)
    if other is not None:
        raise UserError(
            f"{folder} was prepared from {next(iter(before))} and the like; from here data.files means other "
            f"documents, such "
            f"as {other}; give data another name, or write absolute paths in data.files"
        )


def _has_changed(path: Path, before: dict, since: float) -> bool:
    """Whether a file is not as its entry in the manifest says. Older manifests have sizes only."""
    facts = path.stat()
    if facts.st_size != before["bytes"]:
        return True
    newer = max(facts.st_mtime, facts.st_ctime) > since  # a copy may keep the time of what it was copied from
    return "xxh3" in before and newer and hash_file(path) != before["xxh3"]


# --- encoding in processes ----------------------------------------------------------------------------------


_worker: tuple[Tokenizer, Data] | None = None


def _start_worker(data: Data, tokenizer_dir: Path) -> None:
    global _worker
    _worker = load_tokenizer(data, tokenizer_dir), data


def _start_process(data: Data, tokenizer_dir: Path) -> None:
    signals.ignore()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def leave_with_parent():  # a killed parent cannot tell its workers, and they would wait for it for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _start_worker(data, tokenizer_dir)


class _Process(SpawnProcess):
    """A worker, which no signal ends before it ignores them (`_start_process`)."""

    def start(self) -> None:
        with signals.held_back():
            super().start()


class _Spawn(SpawnContext):
    """Starts workers anew: a fork would copy the parent's threads (pyarrow) half alive."""

    Process = _Process


def _start_pool(workers: int, data: Data, tokenizer_dir: Path) -> Executor:
    if workers > 1:
        # multiprocessing's own process removes the locks where a second Ctrl-C ends this one; there is no
        # need to hear of it
        sys.warnoptions.append("ignore:resource_tracker")
        try:
            return ProcessPoolExecutor(workers, _Spawn(), _start_process, (data, tokenizer_dir))
        except OSError as error:  # its locks lie in /dev/shm
            log.warning("several workers need a writable /dev/shm (%s): preparing with one", error.strerror)
    return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(data, tokenizer_dir))


@contextmanager
def _pool(workers: int, data: Data, tokenizer_dir: Path):
    """Executor of `workers` processes, each with the tokenizer loaded; one worker is a thread of this
    process."""
    pool = _start_pool(workers, data, tokenizer_dir)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(kind: str, raws: list[bytes | None]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
    """Ids of the batch, end of text included; tokens of each document, 0 if unusable; (document, defect) of
    those."""
    tokenizer, data = _worker
    texts, used, bad = [], [], []
    for index, raw in enumerate(raws):
        try:
            texts.append(parse(kind, raw, data.text_key))
            used.append(index)
        except Unusable as defect:
            bad.append((index, str(defect)))
    rows, refused = encode_each(tokenizer, texts)
    bad = sorted([*bad, *((used[index], defect) for index, defect in refused)])
    used = [document for index, document in enumerate(used) if index not in dict(refused)]
    end = np.array([tokenizer.end_of_text])
    lengths = np.zeros(len(raws), np.int64)
    lengths[used] = [len(row) + 1 for row in rows]
    parts = [part for row in rows for part in ((end, row) if data.end_of_text == "prepend" else (row, end))]
    ids = (
        np.concatenate(parts, dtype=tokenizer.dtype, casting="unsafe")
        if parts
        else np.zeros(0, tokenizer.dtype)
    )
    return ids, lengths, bad


def _encoded(batches: Iterator[Batch], pool: Executor, window: int) -> Iterator[tuple[Batch, tuple]]:
    """Each batch with its result, in order; at most `window` are under way, so memory does not grow with the
    data."""
    waiting, more, failure = deque(), True, None
    while more or waiting:
        while more and len(waiting) < window:
            try:
                batch = next(batches, None)
            except UserError as error:  # in reading ahead: what comes before it may be all that is wanted
                batch, failure = None, error
            if batch is None:
                more = False
            else:
                waiting.append((batch, pool.submit(_encode, batch.kind, batch.raws)))
                batch.raws = []
        if waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    if failure:
        raise failure


# --- writing ------------------------------------------------------------------------------------------------


class Shards:
    """The token files of one split, filled one after another. They are written in place: the manifest makes
    them exist."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, state: dict | None):
        """`state` is what `save` returned in an earlier process; what was written after it is cut off."""
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.tokens, self.documents, self.shards, self.filled, self._file = 0, 0, [], 0, None
        if state:
            self.tokens, self.documents, self.shards = state["tokens"], state["documents"], state["shards"]
            self.filled = state["open_bytes"] // self.dtype.itemsize
        own = {path.name for path in folder.iterdir() if re.fullmatch(rf"{split}_[0-9]{{5}}\.bin", path.name)}
        later = own - {shard["file"] for shard in self.shards}
        for name in later - ({self.path.name} if self.filled else set()):
            remove(folder / name)
        if self.filled:
            break_links(self.path)
            os.truncate(self.path, self.filled * self.dtype.itemsize)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.shards):05d}.bin"

    def write(self, ids: np.ndarray, documents: int) -> bool:
        """Append; true if a shard was filled. Raises UserError if the disk is full."""
        self.tokens += len(ids)
        self.documents += documents
        done = len(self.shards)
        while len(ids):
            part = ids[: self.shard_tokens - self.filled]
            try:
                if self._file is None:
                    self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open over many calls)
                view = memoryview(np.ascontiguousarray(part)).cast("B")
                while view:  # an unbuffered write may take a part only
                    view = view[self._file.write(view) :]
            except OSError as error:
                raise disk_error(error, self.path) from error
            self.filled, ids = self.filled + len(part), ids[len(part) :]
            if self.filled == self.shard_tokens:
                self.finish()
        return len(self.shards) > done

    def finish(self) -> None:
        """Close the open shard, if there is one, and record it with its hash."""
        if self.filled:
            self.save()
            if self._file:
                self._file.close()
            path, size = self.path, self.filled * self.dtype.itemsize
            self.shards.append(
                {"file": path.name, "tokens": self.filled, "bytes": size, "xxh3": hash_file(path)}
            )
            self.filled, self._file = 0, None

    def save(self) -> dict:
        """Make what is written survive a power cut; the state from which a later process can go on."""
        if self._file:
            sync_file(self._file.fileno())
        state = {"tokens": self.tokens, "documents": self.documents, "shards": self.shards}
        return state | {"open": self.path.name, "open_bytes": self.filled * self.dtype.itemsize}


def cut_words(text: str) -> Iterator[str]:
    """Yield `text` in pieces that hold no run of LONGEST_WORD letters without a blank, or blanks without a
    letter; an ordinary text is one piece. A BPE is trained in a time that grows with the square of its
    longest word: 8 MB of base64 take days."""
    start = 0
    for run in re.finditer(rf"(?<!\S)\S{{{LONGEST_WORD},}}|(?<!\s)\s{{{LONGEST_WORD},}}", text):
        for end in range(run.start() + LONGEST_WORD, run.end() + 1, LONGEST_WORD):
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


class _Job:
    """One preparation: the tokenizer, the split, and the state that makes it resumable."""

    def __init__(self, data: Data, folder: Path, source: Source):
        self.data, self.folder, self.source = data, folder, source
        self.tokenizer_dir, self.progress_file = folder / "tokenizer", folder / "progress.json"
        self.inputs = source.state()
        state = self._progress()
        self.counts = state.get("counts") or self._count()
        self.heldout, self.first = self._split()
        self.tokenizer = self._tokenizer()
        none, groups, splits = {}, source.groups, state.get("splits", {})
        self.position = {group: tuple(state.get("position", none).get(group, (0, 0))) for group in groups}
        self.read = {
            group: state.get("read", none).get(group, 0) for group in groups
        }  # documents, usable or not
        self.taken = {group: state.get("taken", none).get(group, 0) for group in groups}  # tokens
        self.bad = state.get("bad", {})
        self.splits = {
            name: Shards(folder, name, self.tokenizer.dtype, data.shard_tokens, splits.get(name))
            for name in ("train", "val")
        }
        self.save()

    tokens = property(lambda self: sum(split.tokens for split in self.splits.values()))

    def _progress(self) -> dict:
        """What an earlier, killed process left; nothing if the documents have changed since, or a file of it
        is gone."""
        if self.progress_file.is_file():
            state = read_json(self.progress_file)
            files = [
                (self.folder / shard["file"], shard["bytes"])
                for s in state["splits"].values()
                for shard in s["shards"]
            ]
            files += [
                (self.folder / split["open"], split["open_bytes"]) for split in state["splits"].values()
            ]
            whole = all(not size or path.is_file() and path.stat().st_size >= size for path, size in files)
            if state["inputs"] == self.inputs and whole:
                done = sum(split["tokens"] for split in state["splits"].values())
                log.info("going on after %d tokens in %s", done, self.folder)
                return state
            log.warning("%s was begun with other documents, or has lost files: starting anew", self.folder)
        remove(self.progress_file)
        remove(self.tokenizer_dir)  # trained on documents that may have changed
        return {}

    def save(self) -> None:
        """Write down how far the files are good; called between batches only."""
        splits = {name: split.save() for name, split in self.splits.items()}
        state = {"inputs": self.inputs, "counts": self.counts, "position": self.position, "read": self.read}
        write_json(self.progress_file, state | {"taken": self.taken, "bad": self.bad, "splits": splits})

    def _count(self) -> dict[str, int] | None:
        """Documents of each group, where the split needs them: this reads or downloads every file."""
        if self.data.validation.fraction is None:
            return None
        log.info("counting the documents of %s", self.data.name)
        return {group: sum(map(self._count_file, names)) for group, names in self.source.groups.items()}

    def _count_file(self, name: str) -> int:
        self._check_stop("counting documents")
        return self.source.count(name)

    def _check_stop(self, during: str) -> None:
        """Raises Stopped when asked to leave where nothing has been written yet."""
        if signals.asked_to_stop():
            raise Stopped(
                f"preparing {self.folder} stopped while {during}; the same command begins that anew"
            )

    def _split(self) -> tuple[np.ndarray | None, dict[str, int]]:
        """(documents,) bool: the documents that datasets' train_test_split(fraction, seed) puts into its test
        part (as nanoGPT does). All documents count, in the order of the source, the unusable ones too. And
        each group's first one."""
        if self.counts is None:
            return None, {}
        ends = list(itertools.accumulate(self.counts.values()))
        count, fraction = ends[-1], self.data.validation.fraction
        n_heldout = math.ceil(fraction * count)
        if count and n_heldout == count:
            raise UserError(
                f"{self.data.name}: of {count} document(s), validation.fraction {fraction} holds out "
                f"{n_heldout}, so none is "
                f"left to train on; give more files, write one document a line (.jsonl), or hold out the "
                f"first N tokens: "
                f"'validation: {{first_shard: true}}' with 'shard_tokens: N'"
            )
        heldout, order = (
            np.zeros(count, bool),
            np.random.default_rng(self.data.validation.seed).permutation(count),
        )
        heldout[order[:n_heldout]] = True
        return heldout, dict(zip(self.counts, [0, *ends], strict=False))

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, saved in the data folder by now, so that the workers and later users open the
        same."""
        data = self.data
        if not self.tokenizer_dir.is_dir():
            with replacing(self.tokenizer_dir) as folder:
                if bpe_size(data.tokenizer):
                    log.info("training tokenizer %s", data.tokenizer)
                    train_bpe(data.tokenizer, self._sample(), folder)
                else:
                    load_tokenizer(data).save(folder)
        return load_tokenizer(data, self.tokenizer_dir)

    def _sample(self) -> Iterator[str]:
        """Training documents for a tokenizer: the first 50 MB, each group with its share if there are
        weights. (With `first_shard` they hold the validation text too: which tokens that is, is only known
        once there are tokens.)"""
        weights, left, read, defects = self.data.weights, BPE_SAMPLE_BYTES, 0, Counter()
        for group in self.source.groups:
            if weights:
                left = BPE_SAMPLE_BYTES * weights[group] / sum(weights.values())
            number = self.first.get(group, 0)
            for batch in read_batches(self.source, group, (0, 0), BATCH_BYTES):
                self._check_stop("training the tokenizer")
                if self.heldout is not None and number + len(batch.raws) > len(self.heldout):
                    raise self._changed()
                for raw in batch.raws:
                    if left > 0 and (self.heldout is None or not self.heldout[number]):
                        try:
                            yield from cut_words(parse(batch.kind, raw, self.data.text_key))
                            left, read = left - len(raw), read + 1
                        except Unusable as defect:
                            defects[str(defect)] += 1
                    number += 1
                if left <= 0:
                    break
        if not read:
            raise self._empty(defects)

    def _empty(self, defects: dict[str, int]) -> UserError:
        return UserError(
            f"{self.data.name}: empty corpus, no usable document ({_list(defects) or 'no document at all'})"
        )

    def run(self, pool: Executor, window: int) -> None:
        """Encode and write all that is left, then the manifest."""
        progress, saved, start = _Progress(self), time.monotonic(), (time.monotonic(), self.tokens)
        limit = self.data.max_tokens or sys.maxsize
        for batch, result in self._mixed(pool, window) if self.tokens < limit else ():
            filled = self._write(batch, *result, limit)
            progress.show(self)
            if filled or time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
            if self.tokens >= limit:
                break
            if signals.asked_to_stop():
                self.save()
                raise Stopped(
                    f"preparing {self.folder} stopped at {self.tokens} tokens; the same command goes on from "
                    f"there"
                )
        progress.close()
        self._finish()
        spent, tokens = time.monotonic() - start[0], self.tokens - start[1]
        log.info("prepared %s: %d tokens, %.0f tokens/s", self.folder, self.tokens, tokens / spent)

    def _mixed(self, pool: Executor, window: int) -> Iterator[tuple[Batch, tuple]]:
        """Encoded batches of all groups: one group after another, or, with weights, each from the group that
        is furthest behind its share of the tokens. Reading then ends with the first group that has no more:
        the shares would not hold."""
        weights = self.data.weights
        size = MIXED_BATCH_BYTES if weights else BATCH_BYTES
        streams = {
            group: _encoded(read_batches(self.source, group, self.position[group], size), pool, window)
            for group in self.source.groups
        }
        if not weights:
            for stream in streams.values():
                yield from stream
            return
        while True:
            group = min(streams, key=lambda g: self.taken[g] / weights[g])
            item = next(streams[group], None)
            if item is None:
                log.info("group '%s' has no more documents: reading stops, so that the weights hold", group)
                return
            yield item

    def _write(
        self, batch: Batch, ids: np.ndarray, lengths: np.ndarray, bad: list[tuple[int, str]], limit: int
    ) -> bool:
        """Split one encoded batch over the two parts; true if a shard was filled."""
        names, data, first = self.source.groups[batch.group], self.data, self.read[batch.group]
        for index, defect in bad:
            entry = self.bad.setdefault(defect, {"count": 0, "examples": []})
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES:
                file, line = batch.places[index]
                entry["examples"].append(f"{names[file]}:{line}")
        ends = np.minimum(lengths.cumsum(), limit - self.tokens)  # max_tokens may cut a document
        lengths = np.diff(ends, prepend=0)
        ids = ids[: ends[-1]]
        if self.heldout is None:
            into_val = np.zeros(len(ids), bool)
            into_val[: max(0, data.shard_tokens - self.splits["val"].tokens)] = True
            val_documents = int((lengths > 0)[ends <= into_val.sum()].sum())
        else:
            if first + len(lengths) > self.counts[batch.group]:
                raise self._changed()
            held = self.heldout[self.first[batch.group] + first :][: len(lengths)]
            into_val, val_documents = np.repeat(held, lengths), int((held & (lengths > 0)).sum())
        filled = self.splits["val"].write(ids[into_val], val_documents)
        filled |= self.splits["train"].write(ids[~into_val], int((lengths > 0).sum()) - val_documents)
        self.taken[batch.group] += len(ids)
        self.read[batch.group] += len(lengths)
        self.position[batch.group] = batch.end
        return filled

    def _changed(self) -> UserError:
        return UserError(
            f"{self.data.name}: documents changed while they were read; once nothing writes to them, the "
            f"same command prepares "
            f"them from the first on"
        )

    def _finish(self) -> None:
        """Check that there is text, close the shards, write the manifest and drop the progress file."""
        if self.source.state() != self.inputs:
            raise self._changed()
        defects = {defect: entry["count"] for defect, entry in self.bad.items()}
        if not self.tokens:
            raise self._empty(defects)
        for name, split in self.splits.items():
            if not split.tokens:
                raise UserError(
                    f"{self.data.name}: all {self.tokens} tokens fall into the other part, none into "
                    f"'{name}'; prepare "
                    f"more text, or change data.validation or data.shard_tokens ({self.data.shard_tokens})"
                )
            split.finish()
        used = {
            g: names[: self.position[g][0] + 1] for g, names in self.source.groups.items() if self.read[g]
        }
        tokenizer, data = self.tokenizer, self.data
        splits = {
            n: {"tokens": s.tokens, "documents": s.documents, "shards": s.shards}
            for n, s in self.splits.items()
        }
        key = json.dumps([tokenizer.fingerprint, tokenizer.dtype, splits])
        manifest = {
            "name": data.name,
            "preparation": data.preparation(),
            "source_files": [self.source.describe(name) for names in used.values() for name in names],
            "all_files": sum(map(len, used.values())) == sum(map(len, self.source.groups.values())),
            "tokenizer": {
                "name": tokenizer.name,
                "class": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "fingerprint": tokenizer.fingerprint,
            },
            "dtype": tokenizer.dtype,
            "splits": splits,
            "bad_documents": self.bad,
            "fingerprint": xxhash.xxh3_128_hexdigest(key.encode()),
        }
        if data.source == "embedded":
            manifest |= {"python": platform.python_version(), "licence": LICENCES["embedded"]}
        files = hash_folder(self.folder / "tokenizer")
        manifest["tokenizer_files"] = {f"tokenizer/{name}": facts for name, facts in files.items()}
        write_json(self.folder / "manifest.json", manifest)
        remove(self.progress_file)
        if self.bad:
            log.warning(
                "%s: documents left out: %s; examples are in manifest.json", self.folder, _list(defects)
            )


def _list(defects: dict[str, int]) -> str:
    return ", ".join(f"{count} {defect}" for defect, count in defects.items())


class _Progress:
    """Tokens per second and an estimate of the rest: a bar on a terminal, a log line every half minute
    elsewhere."""

    def __init__(self, job: _Job):
        self.started, self.shown, self.before = time.monotonic(), time.monotonic(), job.tokens
        self.bar = tqdm(
            unit="tok", unit_scale=True, initial=job.tokens, disable=not sys.stderr.isatty(), mininterval=0.5
        )

    def show(self, job: _Job) -> None:
        if not self.bar.disable:
            self.bar.total = self._expected(job)
            self.bar.update(job.tokens - self.bar.n)
        elif time.monotonic() - self.shown > 30:
            self.shown = time.monotonic()
            spent = self.shown - self.started
            line = tqdm.format_meter(
                job.tokens, self._expected(job), spent, unit="tok", unit_scale=True, initial=self.before
            )
            log.info("%s", line)

    def _expected(self, job: _Job) -> int | None:
        """Tokens there will be: max_tokens, or as many per document as so far; None if neither is known."""
        known = [job.data.max_tokens] if job.data.max_tokens else []
        if job.counts and sum(job.read.values()):
            known.append(int(job.tokens * sum(job.counts.values()) / sum(job.read.values())))
        return min(known) if known else None

    def close(self) -> None:
        self.bar.close()
