"""The order of data: which windows of tokens make up step s, and which of them this rank reads.

The sample at global position p of step s is a pure function of (data fingerprint, seed, s, p). It does not
depend on the number of ranks, on the micro batch or on what was read before. So a resized job sees the same
batches, and two runs of one experiment are paired. Legend: B = sequences of the global batch, T = sequence
length, W = ranks.
"""

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from inheritune.config.experiment import Experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import MANIFEST, check_files, find_damage, read_marked_files
from inheritune.files.rundir import get_data_dir
from inheritune.runtime.dist import NodeError, gather_objects, get_rank, run_on_rank0

DTYPES: dict[str, np.dtype] = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}
"""Types of token ids in the shards, by their name in the manifest."""


class Tokens:
    """One split of a prepared data set, read from memory-mapped shards as one long stream."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            raise UserError(
                f"{self.folder} holds no prepared data (no manifest.json); run 'python -m inheritune prepare "
                f"EXPERIMENT'"
            )
        self.manifest = read_json(manifest)
        try:
            self.fingerprint = str(self.manifest["fingerprint"])
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            dtype = DTYPES[self.manifest["dtype"]]
            shards = self.manifest["splits"][split]["shards"]
            sizes = {self.folder / shard["file"]: int(shard["tokens"]) * dtype.itemsize for shard in shards}
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{manifest} is damaged; delete it and run 'prepare' again") from None
        self.first_token: int | None = None
        """Token id in place of each window's first one (data.window_start); None: the text's own."""
        self._paths = list(sizes)
        self._shards: list[np.ndarray] = []
        for path, expected in sizes.items():
            size = path.stat().st_size if path.is_file() else -1
            if not expected or size != expected:
                raise UserError(
                    f"token shard {path} has {size} bytes, its manifest says {expected}; delete {manifest} "
                    f"and run 'prepare' again"
                )
            # as a plain array: slices of a memmap itself are slow
            self._shards.append(np.asarray(np.memmap(path, dtype=dtype, mode="r")))
        self._ends = np.cumsum([len(s) for s in self._shards]) if self._shards else np.zeros(0, np.int64)
        self.n_tokens = int(self._ends[-1]) if self._shards else 0

    @classmethod
    def of(cls, experiment: Experiment, split: str) -> "Tokens":
        """Open the experiment's data. Raises UserError if manifest, tokenizer or validation are not as
        `prepare` left them."""
        tokens, asked = cls(get_data_dir(experiment), split), experiment.data.preparation()
        if tokens.manifest.get("preparation", asked) != asked:
            raise UserError(
                f"{tokens.folder / 'manifest.json'} describes other data than {experiment.name} asks for: "
                f"it was replaced"
            )
        small = {}
        if split == "val":
            small = {shard["file"]: shard for shard in tokens.manifest["splits"]["val"]["shards"]}
        check_files(tokens.folder, small | tokens.manifest.get("tokenizer_files", {}))
        return tokens.begin_windows(experiment)

    def begin_windows(self, experiment: Experiment) -> "Tokens":
        """Begin each window as the experiment's data.window_start says. Returns itself."""
        if experiment.data.window_start:
            self.first_token = int(self.manifest["tokenizer"]["end_of_text"])
        return self

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return tokens [start, start + count) of the stream, across shard borders, in `out` if given.
        -> (count,) int64

        Raises NodeError if a token is beyond the vocabulary."""
        out = np.empty(count, np.int64) if out is None else out
        filled, shard = 0, int(self._ends.searchsorted(start, side="right"))
        while filled < count:
            offset = start + filled - (int(self._ends[shard - 1]) if shard else 0)
            piece = self._shards[shard][offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1
        if count and int(out.max()) >= self.vocab_size:
            raise self._make_vocabulary_error(start + int(out.argmax()), int(out.max()))
        return out

    def read_window(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return `read(start, count, out)`, with the first token as data.window_start says."""
        window = self.read(start, count, out)
        if self.first_token is not None:
            window[0] = self.first_token
        return window

    def _make_vocabulary_error(self, position: int, token: int) -> NodeError:
        """Return the error for a token id, at `position` of the stream, that the tokenizer does not have.

        It is a NodeError because only the rank that reads the token sees it."""
        shard = int(self._ends.searchsorted(position, side="right"))
        offset = position - (int(self._ends[shard - 1]) if shard else 0)
        manifest = self.folder / MANIFEST
        return NodeError(
            f"{self._paths[shard]} holds token {token} at position {offset}, the vocabulary has "
            f"{self.vocab_size}: damaged or replaced; delete {manifest} and run 'prepare' again"
        )

    def n_windows(self, length: int) -> int:
        """Return the number of windows of `length` tokens and their targets at stride `length`. Each reads
        length + 1 tokens."""
        return max(0, (self.n_tokens - 1) // length)


def check_some_shards(folder: Path) -> None:
    """Hash a training shard on each rank, others at every start, and all of validation on rank 0.

    Reading all 18 GB of OpenWebText at each start would cost minutes. Opening a split has compared the sizes
    of all its shards.

    Raises UserError on every rank, naming a shard that is not what `prepare` wrote."""
    files = read_marked_files(folder / MANIFEST)
    train, first = [name for name in files if name.startswith("train_")], run_on_rank0(time.time_ns)
    own = {train[(first + get_rank()) % len(train)]}
    if get_rank() == 0:
        own |= set(files) - set(train)
    found = gather_objects(next(find_damage(folder, {name: files[name] for name in sorted(own)}), None))
    if any(found):
        manifest = folder / MANIFEST
        raise UserError(
            f"{next(filter(None, found))}; delete {manifest} and run 'prepare' again, or 'verify' to see all"
        )


@lru_cache(maxsize=2)
def _permute_windows(key: tuple, n_windows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=_make_philox_key(key))).permutation(n_windows)


def _make_philox_key(key: tuple) -> int:
    return xxhash.xxh3_128_intdigest(repr(key).encode())


class Order:
    """The start of every sample, by one of three sampling rules.

    - random_windows: drawn with replacement from all starts, by a counter-based generator (the paper's
      OpenWebText);
    - one_pass: window s * B + p of the non-overlapping windows, no window twice (FineWeb);
    - epochs:k: the same windows in a new random order each epoch, at most k times (the 1B-token study)."""

    def __init__(self, tokens: Tokens, sampling: str, sequence_length: int, batch_sequences: int, seed: int):
        self.tokens, self.length, self.batch = tokens, sequence_length, batch_sequences
        self.kind, _, epochs = sampling.partition(":")
        self.epochs = int(epochs) if epochs else 1
        self.key = (tokens.fingerprint, seed)
        self.n_windows = tokens.n_windows(sequence_length)
        if self.n_windows < 1:
            raise UserError(
                f"the training text of {tokens.folder} has {tokens.n_tokens} tokens, fewer than one window "
                f"of {sequence_length} + 1; shorten data.sequence_length or prepare more text"
            )

    def check_steps(self, steps: int) -> None:
        """Raise UserError if `steps` steps need more windows than the sampling rule may read."""
        available = self.n_windows * self.epochs
        if self.kind != "random_windows" and steps * self.batch > available:
            raise UserError(
                f"{steps} steps of {self.batch} sequences need {steps * self.batch} windows, but the data "
                f"has {self.n_windows} ({self.epochs} epoch(s)): at most {available // self.batch} steps; "
                f"prepare more tokens (data.max_tokens) or allow more epochs (data.sampling)"
            )

    def starts(self, step: int) -> np.ndarray:
        """Return the first token of each sample of step `step` (from 0).  -> (B,) int64"""
        if self.kind == "random_windows":
            bits = np.random.Philox(key=_make_philox_key(self.key), counter=[0, 0, 0, step])
            generator = np.random.Generator(bits)
            return generator.integers(0, self.tokens.n_tokens - self.length, size=self.batch)
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        if self.kind == "epochs":
            epoch = index // self.n_windows
            for number in np.unique(epoch):
                of_epoch = epoch == number
                order = _permute_windows((*self.key, int(number)), self.n_windows)
                index[of_epoch] = order[index[of_epoch] % self.n_windows]
        return index * self.length


@dataclass(frozen=True)
class Share:
    """One rank's share of a global batch, over micro steps.

    All ranks run the same number of micro steps. A rank with fewer sequences is padded with sequences of
    weight zero."""

    first: int
    """Global position of this rank's first sequence."""
    count: int
    """Sequences of this rank."""
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, batch: int, rank: int, world: int, micro_ceiling: int) -> "Share":
        """Return the share of `rank` in a batch of `batch` sequences.

        Shares differ by at most one sequence. The micro batch is at most `micro_ceiling`, and even over the
        steps. Raises UserError if there are more ranks than sequences."""
        if world > batch:
            raise UserError(
                f"{world} ranks for a batch of {batch} sequences: at least one would have nothing to do; "
                f"use at most {batch} ranks"
            )
        small, larger = divmod(batch, world)
        largest = small + 1 if larger else small
        accumulation = -(-largest // micro_ceiling)
        return cls(
            first=rank * small + min(rank, larger),
            count=small + 1 if rank < larger else small,
            micro_batch=-(-largest // accumulation),
            accumulation=accumulation,
        )

    def describe(self, batch: int, world: int, micro_ceiling: int, length: int) -> str:
        """Return the arithmetic in one line, e.g. '20 sequences x 64 tokens = 1280 tokens a step: 3 rank(s)
        x 4 micro batch x 2 accumulation ...'"""
        padded = world * self.micro_batch * self.accumulation - batch
        line = (
            f"{batch} sequences x {length} tokens = {batch * length} tokens a step: {world} rank(s) x "
            f"{self.micro_batch} micro batch x {self.accumulation} accumulation"
        )
        if padded:
            line += f", {padded} of them padding of weight zero"
        if self.micro_batch < micro_ceiling:
            line += f" (micro batch capped below {micro_ceiling} by the share)"
        return line


def read_share(order: Order, step: int, share: Share) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's part of step `step`: tokens (A, M, T + 1) int64 and weights (A, M) float32, for A
    accumulation steps of M sequences. Padding repeats the rank's first window with weight zero."""
    shape = (share.accumulation, share.micro_batch)
    windows, weights = np.empty((*shape, order.length + 1), np.int64), np.zeros(shape, np.float32)
    rows = windows.reshape(-1, order.length + 1)
    for row, start in zip(rows, order.starts(step)[share.first :][: share.count].tolist(), strict=False):
        order.tokens.read_window(start, order.length + 1, out=row)
    rows[share.count :] = rows[0]
    weights.reshape(-1)[: share.count] = 1.0
    return windows, weights
