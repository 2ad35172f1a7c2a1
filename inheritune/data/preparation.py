"""One preparation in progress: the tokenizer, the split into training and validation, the writing of encoded
documents, and the state from which a later process resumes."""

import itertools
import json
import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from inheritune.config.sections import Data
from inheritune.data.bpe_training import cut_long_words, parse_bpe_size, train_bpe
from inheritune.data.documents import (
    Corpus,
    DocumentBatch,
    UnusableDocument,
    batch_documents,
    extract_text,
)
from inheritune.data.duplicates import HASH_BYTES, SEEN, SeenTexts
from inheritune.data.encoded_units import EncodedUnits, collect_batch
from inheritune.data.held_out import HeldOut, hold_out
from inheritune.data.progress_meter import ProgressMeter
from inheritune.data.token_shards import Shards
from inheritune.data.tokenizer import Tokenizer
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.data.worker_pool import Encoded, encode_batches
from inheritune.errors import Stopped, UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import MANIFEST, hash_folder
from inheritune.files.writing import remove_path, replace_atomically
from inheritune.runtime import signals

log = logging.getLogger(__name__)

BATCH_BYTES = 1 << 19
"""Of documents per task: 0.1 s of work for one core."""
MIXED_BATCH_BYTES = 1 << 16
"""The same where groups have weights: they alternate by batch, so batches are smaller."""
BPE_SAMPLE_BYTES = 50_000_000
"""Of documents, from which a bpe:N is trained."""
SAVE_EVERY_S = 60.0
PROGRESS = "progress.json"
EXAMPLES = 5
"""Named documents per kind of defect."""
LICENCES = {"embedded": "Python Software Foundation License Version 2 (PSF-2.0)"}


class Preparation:
    """One preparation of a data folder: the tokenizer, the split, and the state that makes it resumable."""

    def __init__(self, data: Data, folder: Path, corpus: Corpus, only_tokenizer: bool = False):
        """`only_tokenizer`: the caller needs no more, so documents are counted only if it is trained on those
        that are not held out."""
        self.data, self.folder, self.corpus = data, folder, corpus
        self.encoded: EncodedUnits | None = None
        """The documents, if parts have encoded them already."""
        self.tokenizer_dir, self.progress_file = folder / "tokenizer", folder / PROGRESS
        self.inputs = corpus.state()
        state = self._load_progress()
        self.counts: dict[str, int] | None = state.get("counts")
        self.heldout: HeldOut | None = None
        if not only_tokenizer or parse_bpe_size(data.tokenizer) is not None:
            self.split_documents()
        self.tokenizer = self._open_tokenizer()
        if state.get("tokenizer", self.tokenizer.fingerprint) != self.tokenizer.fingerprint:
            changed = f"{self.tokenizer_dir} has changed since this preparation began"
            raise UserError(f"{changed}; delete {folder} and prepare again")
        self.position: dict[str, tuple[int, int]] = {}
        """Where reading of each group continues: (index of the file, number of its documents read)."""
        self.read: dict[str, int] = {}
        """Documents of each group that were read, usable or not."""
        self.taken: dict[str, int] = {}
        """Tokens of each group that were written."""
        for group in corpus.groups:
            self.position[group] = tuple(state.get("position", {}).get(group, (0, 0)))
            self.read[group] = state.get("read", {}).get(group, 0)
            self.taken[group] = state.get("taken", {}).get(group, 0)
        self.bad: dict[str, dict] = state.get("bad", {})
        self.duplicates: int = state.get("duplicates", 0)
        self.seen = SeenTexts(folder, state.get("seen", 0)) if data.deduplicate else None
        splits = state.get("splits", {})
        self.splits = {
            name: Shards(folder, name, self.tokenizer.dtype, data.shard_tokens, splits.get(name))
            for name in ("train", "val")
        }
        self.save()

    @property
    def tokens(self) -> int:
        """Tokens written so far, in both parts of the split."""
        return sum(split.tokens for split in self.splits.values())

    # --- progress -------------------------------------------------------------------------------------------

    def _load_progress(self) -> dict:
        """Return what an earlier, killed process left. It is empty if the documents have changed since, or if
        a file of it is gone."""
        if self.progress_file.is_file():
            state = read_json(self.progress_file)
            splits = state["splits"].values()
            files = [(shard["file"], shard["bytes"]) for split in splits for shard in split["shards"]]
            files += [(split["open"], split["open_bytes"]) for split in splits]
            files += [(SEEN, state.get("seen", 0) * HASH_BYTES)]
            if state["inputs"] == self.inputs and all(itertools.starmap(self._has_bytes, files)):
                if done := sum(split["tokens"] for split in splits):
                    log.info("resuming after %d tokens in %s", done, self.folder)
                return state
            log.warning("%s was started with other documents, or has lost files: starting anew", self.folder)
        remove_path(self.progress_file)
        remove_path(self.tokenizer_dir)  # trained on documents that may have changed
        return {}

    def _has_bytes(self, name: str, size: int) -> bool:
        """Return whether a file of the folder has at least `size` bytes. One of no bytes need not exist."""
        path = self.folder / name
        return not size or path.is_file() and path.stat().st_size >= size

    def save(self) -> None:
        """Record how far the files are good. Called between batches only."""
        splits = {name: split.save() for name, split in self.splits.items()}
        state: dict[str, Any] = {"inputs": self.inputs, "counts": self.counts, "position": self.position}
        state |= {"read": self.read, "taken": self.taken, "bad": self.bad, "splits": splits}
        state["tokenizer"] = self.tokenizer.fingerprint
        if self.seen:
            state |= {"seen": self.seen.save(), "duplicates": self.duplicates}
        write_json(self.progress_file, state)

    def _check_stop(self, during: str) -> None:
        """Raise Stopped when asked to stop where nothing has been written yet."""
        if signals.get_stop_signal():
            raise Stopped(
                f"preparing {self.folder} stopped while {during}; the same command starts that again"
            )

    def _make_changed_error(self) -> UserError:
        return UserError(
            f"{self.data.name}: documents changed while they were read; once nothing writes to them, the "
            f"same command prepares them from the start"
        )

    def _make_empty_error(self, defects: dict[str, int]) -> UserError:
        return UserError(
            f"{self.data.name}: empty corpus, no usable document "
            f"({_format_defects(defects) or 'no document at all'})"
        )

    # --- the split and the tokenizer ------------------------------------------------------------------------

    def split_documents(self) -> None:
        """Decide which documents are held out, if a random fraction is. Raises UserError if all are."""
        self.counts = self.counts or self._count_documents()
        self.heldout = hold_out(self.data, self.counts)

    def _count_documents(self) -> dict[str, int] | None:
        """Return the number of documents of each group, None unless the split needs it: this reads or
        downloads every file."""
        if self.data.validation.fraction is None:
            return None
        log.info("counting the documents of %s", self.data.name)
        return {group: sum(map(self._count_file, names)) for group, names in self.corpus.groups.items()}

    def _count_file(self, name: str) -> int:
        self._check_stop("counting documents")
        return (self.encoded or self.corpus).count(name)

    def _open_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, opened from the data folder, so that the workers and later users open the
        same. It is trained or saved there first if it is missing."""
        data = self.data
        if not self.tokenizer_dir.is_dir():
            with replace_atomically(self.tokenizer_dir) as folder:
                if parse_bpe_size(data.tokenizer):
                    log.info("training tokenizer %s", data.tokenizer)
                    train_bpe(data.tokenizer, self._sample_texts(), folder)
                else:
                    load_tokenizer(data).save(folder)
        return load_tokenizer(data, self.tokenizer_dir)

    def _sample_texts(self) -> Iterator[str]:
        """Yield training documents for a tokenizer: the first 50 MB, each group with its share if there are
        weights.

        With `first_shard` they include the validation text: which tokens that is, is known only once there
        are tokens."""
        weights, left, n_texts = self.data.shares, float(BPE_SAMPLE_BYTES), 0
        defects: Counter[str] = Counter()
        for group in self.corpus.groups:
            if weights:
                left = BPE_SAMPLE_BYTES * weights[group] / sum(weights.values())
            number = 0
            for batch in batch_documents(self.corpus, group, (0, 0), BATCH_BYTES):
                self._check_stop("training the tokenizer")
                for raw in self._select_training(group, batch.raws, number):
                    if left <= 0:
                        break
                    try:
                        text = extract_text(batch.kind, raw, batch.key)
                    except UnusableDocument as defect:
                        defects[str(defect)] += 1
                        continue
                    yield from cut_long_words(text)
                    left, n_texts = left - len(raw or b""), n_texts + 1
                number += len(batch.raws)
                if left <= 0:
                    break
        if not n_texts:
            raise self._make_empty_error(defects)

    def _select_training(self, group: str, raws: list[bytes | None], start: int) -> list[bytes | None]:
        """Return those of consecutive documents of a group, from its index `start`, that are not held out."""
        if self.heldout is None:
            return raws
        held = self._find_heldout(group, start, len(raws))
        return [raw for raw, is_held in zip(raws, held, strict=True) if not is_held]

    # --- encoding and writing -------------------------------------------------------------------------------

    def join(self, encoded: EncodedUnits) -> None:
        """Write all that is left of what parts have encoded, then the manifest."""
        self.encoded = encoded
        self.split_documents()
        self.run(None, 0)

    def run(self, pool: Executor | None, window: int) -> None:
        """Encode and write all that is left, then the manifest. A join needs no `pool`."""
        meter, start_time, start_tokens = ProgressMeter(self.tokens), time.monotonic(), self.tokens
        saved, limit = time.monotonic(), self.data.max_tokens or sys.maxsize
        stream = self._mix_groups(pool, window) if self.tokens < limit else iter(())
        for batch, encoded in stream:
            filled = self._write_batch(batch, encoded, limit)
            meter.show(self.tokens, self._expect_tokens())
            if filled or time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
            if self.tokens >= limit:
                break
            if signals.get_stop_signal():
                self.save()
                raise Stopped(
                    f"preparing {self.folder} stopped at {self.tokens} tokens; the same command resumes from "
                    f"there"
                )
        meter.close()
        self._finish()
        spent, tokens = time.monotonic() - start_time, self.tokens - start_tokens
        log.info("prepared %s: %d tokens, %.0f tokens/s", self.folder, self.tokens, tokens / spent)

    def _encode_group(
        self, group: str, size: int, pool: Executor | None, window: int
    ) -> Iterator[tuple[DocumentBatch, Encoded]]:
        """Return the encoded batches of a group, from where reading continues."""
        if pool is not None:
            batches = batch_documents(self.corpus, group, self.position[group], size)
            return encode_batches(batches, pool, window)
        assert self.encoded is not None, "a preparation without workers joins parts"
        units = batch_documents(self.encoded, group, self.position[group], size)
        return ((b, collect_batch(b, self.tokenizer.dtype, self.data.deduplicate)) for b in units)

    def _mix_groups(self, pool: Executor | None, window: int) -> Iterator[tuple[DocumentBatch, Encoded]]:
        """Yield encoded batches of all groups: one group after another, or, with weights, each from the group
        that is furthest behind its share of the tokens.

        With weights, reading ends with the first group that has no more documents: the shares would not
        hold."""
        weights = self.data.shares
        size = MIXED_BATCH_BYTES if weights else BATCH_BYTES
        streams = {group: self._encode_group(group, size, pool, window) for group in self.corpus.groups}
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

    def _write_batch(self, batch: DocumentBatch, encoded: Encoded, limit: int) -> bool:
        """Write one encoded batch into the two parts of the split, up to `limit` tokens in all, and return
        whether a shard was filled."""
        self._record_defects(batch, encoded.defects)
        encoded = self._drop_repeats(encoded)
        ends = np.minimum(encoded.lengths.cumsum(), limit - self.tokens)  # max_tokens may cut a document
        lengths = np.diff(ends, prepend=0)
        ids = encoded.ids[: ends[-1]]
        if self.heldout is None:
            into_val = np.zeros(len(ids), bool)
            into_val[: max(0, self.data.shard_tokens - self.splits["val"].tokens)] = True
            val_documents = int((lengths > 0)[ends <= into_val.sum()].sum())
        else:
            held = self._find_heldout(batch.group, self.read[batch.group], len(lengths))
            into_val, val_documents = np.repeat(held, lengths), int((held & (lengths > 0)).sum())
        filled = self.splits["val"].write(ids[into_val], val_documents)
        filled |= self.splits["train"].write(ids[~into_val], int((lengths > 0).sum()) - val_documents)
        self.taken[batch.group] += len(ids)
        self.read[batch.group] += len(lengths)
        self.position[batch.group] = batch.end
        return filled

    def _drop_repeats(self, encoded: Encoded) -> Encoded:
        """Return the batch without the tokens of documents whose text an earlier one had, if asked for."""
        if self.seen is None:
            return encoded
        repeats = self.seen.find_repeats(encoded.digests)
        self.duplicates += int(repeats.sum())
        ids = encoded.ids[np.repeat(~repeats, encoded.lengths)]
        return encoded._replace(ids=ids, lengths=np.where(repeats, 0, encoded.lengths))

    def _record_defects(self, batch: DocumentBatch, defects: list[tuple[int, str]]) -> None:
        """Count the unusable documents of a batch, and name the first ones of each kind."""
        names = self.corpus.groups[batch.group]
        for index, defect in defects:
            entry = self.bad.setdefault(defect, {"count": 0, "examples": []})
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES:
                file, line = batch.places[index]
                entry["examples"].append(f"{names[file]}:{line}")

    def _find_heldout(self, group: str, start: int, count: int) -> np.ndarray:
        """Return which of the `count` documents of a group from its index `start` are held out, (count,)
        bool. Raises UserError if it has fewer by now."""
        assert self.heldout is not None, "the first shard is held out"
        held = self.heldout.find(group, start, count)
        if held is None:
            raise self._make_changed_error()
        return held

    def _expect_tokens(self) -> int | None:
        """Return how many tokens there will be: max_tokens, or as many per document as so far. None if
        neither is known."""
        known = [self.data.max_tokens] if self.data.max_tokens else []
        if self.counts and sum(self.read.values()):
            known.append(int(self.tokens * sum(self.counts.values()) / sum(self.read.values())))
        return min(known) if known else None

    # --- the manifest ---------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Check that there is text, close the shards, write the manifest and remove the progress file."""
        if self.corpus.state() != self.inputs:
            raise self._make_changed_error()
        defects = {defect: entry["count"] for defect, entry in self.bad.items()}
        if not self.tokens:
            raise self._make_empty_error(defects)
        for name, split in self.splits.items():
            if not split.tokens:
                raise UserError(
                    f"{self.data.name}: all {self.tokens} tokens fall into the other part, none into "
                    f"'{name}'; prepare more text, or change data.validation or data.shard_tokens "
                    f"({self.data.shard_tokens})"
                )
            split.finish()
        write_json(self.folder / MANIFEST, self._make_manifest())
        remove_path(self.progress_file)
        if self.seen:
            self.seen.remove()
            log.info("%s: %d documents repeat an earlier one and are left out", self.folder, self.duplicates)
        if self.bad:
            left_out = _format_defects(defects)
            log.warning("%s: documents left out: %s; examples are in manifest.json", self.folder, left_out)

    def _make_manifest(self) -> dict:
        """Return the manifest of the finished shards."""
        tokenizer, data, groups = self.tokenizer, self.data, self.corpus.groups
        used = {g: names[: self.position[g][0] + 1] for g, names in groups.items() if self.read[g]}
        splits = {name: split.describe() for name, split in self.splits.items()}
        key = json.dumps([tokenizer.fingerprint, tokenizer.dtype, splits])
        manifest = {
            "name": data.name,
            "preparation": data.preparation(),
            "source_files": [self.corpus.describe(name) for names in used.values() for name in names],
            "all_files": sum(map(len, used.values())) == sum(map(len, groups.values())),
            "tokenizer": tokenizer.describe(),
            "dtype": tokenizer.dtype,
            "splits": splits,
            "bad_documents": self.bad,
            "fingerprint": xxhash.xxh3_128_hexdigest(key.encode()),
        }
        if data.takes_from("embedded"):
            manifest |= {"python": platform.python_version(), "licence": LICENCES["embedded"]}
        if self.seen:
            manifest["duplicates"] = self.duplicates
        files = hash_folder(self.tokenizer_dir)
        manifest["tokenizer_files"] = {f"tokenizer/{name}": facts for name, facts in files.items()}
        return manifest


def _format_defects(defects: dict[str, int]) -> str:
    return ", ".join(f"{count} {defect}" for defect, count in defects.items())
