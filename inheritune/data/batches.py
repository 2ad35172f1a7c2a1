"""The order of data: which windows of tokens make up step s, and which of them this rank reads.

The sample at global position p of step s is a pure function of (data fingerprint, seed, s, p). It does not
depend on the number of ranks, on the micro batch or on what was read before, so a resized job sees the same
batches and two runs of one experiment are paired. Legend: B = sequences of the global batch, T = sequence
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
from inheritune.files.rundir import check_files, damages, data_dir, marked_files, read_json
from inheritune.runtime.dist import NodeError, gather, on_rank0, rank


class Tokens:
    """One split of a prepared data set, read from memory-mapped shards as one long stream."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            raise UserError(
                f"{self.folder} holds no prepared data (no manifest.json); run 'python -m inheritune prepare "
                f"EXPERIMENT'"
            )
        self.manifest = read_json(manifest)
        try:
            self.fingerprint, self.vocab_size = (
                str(self.manifest["fingerprint"]),
                int(self.manifest["tokenizer"]["vocab_size"]),
            )
            dtype = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}[self.manifest["dtype"]]
            shards = self.manifest["splits"][split]["shards"]
            sizes = {self.folder / shard["file"]: int(shard["tokens"]) * dtype.itemsize for shard in shards}
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{manifest} is damaged; delete it and run 'prepare' again") from None
        self._shards, self._paths = [], list(sizes)
        for path, expected in sizes.items():
            size = path.stat().st_size if path.is_file() else -1
            if not expected or size != expected:
                raise UserError(
                    f"token shard {path} has {size} bytes, its manifest says {expected}; delete {manifest} "
                    f"and run "
                    f"'prepare' again"
                )
            self._shards.append(
                np.asarray(np.memmap(path, dtype=dtype, mode="r"))
            )  # slices of a memmap itself are slow
        self._ends = np.cumsum([len(s) for s in self._shards]) if self._shards else np.zeros(0, np.int64)
        self.n_tokens = int(self._ends[-1]) if self._shards else 0

    @classmethod
    def of(cls, experiment: Experiment, split: str) -> "Tokens":
        """The experiment's data. Raises UserError if manifest, tokenizer or validation are not as `prepare`
        left them."""
        tokens, asked = cls(data_dir(experiment), split), experiment.data.preparation()
        if tokens.manifest.get("preparation", asked) != asked:
            raise UserError(
                f"{tokens.folder / 'manifest.json'} describes other data than {experiment.name} asks for: "
                f"replaced"
            )
        small = (
            {shard["file"]: shard for shard in tokens.manifest["splits"]["val"]["shards"]}
            if split == "val"
            else {}
        )
        check_files(tokens.folder, small | tokens.manifest.get("tokenizer_files", {}))
        return tokens

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens [start, start + count) of the stream, across shard borders, into `out` if given.  ->
        (count,) int64"""
        out = np.empty(count, np.int64) if out is None else out
        filled, shard = 0, int(self._ends.searchsorted(start, side="right"))
        while filled < count:
            offset = start + filled - (int(self._ends[shard - 1]) if shard else 0)
            piece = self._shards[shard][offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1
        if count and int(out.max()) >= self.vocab_size:
            raise self._beyond_vocabulary(start + int(out.argmax()), int(out.max()))
        return out

    def _beyond_vocabulary(self, position: int, token: int) -> NodeError:
        """Return the error for a token id that the tokenizer does not have, at `position` of the stream; of
        any rank, because only the one that reads it sees it."""
        shard = int(self._ends.searchsorted(position, side="right"))
        offset = position - (int(self._ends[shard - 1]) if shard else 0)
        manifest = self.folder / "manifest.json"
        return NodeError(
            f"{self._paths[shard]} holds token {token} at position {offset}, the vocabulary has "
            f"{self.vocab_size}: damaged or "
            f"replaced; delete {manifest} and run 'prepare' again"
        )

    def n_windows(self, length: int) -> int:
        """Windows of `length` tokens and their targets at stride `length` (each reads length + 1 tokens)."""
        return max(0, (self.n_tokens - 1) // length)


def check_some_shards(folder: Path) -> None:
    """Hash a training shard on each rank, others at every start, and all of validation on rank 0: reading all
    18 GB of OpenWebText at each start would cost minutes. (Opening a split has compared the sizes of all its
    shards.)

    Raises UserError on every rank, naming a shard that is not what `prepare` wrote."""
    files = marked_files(folder / "manifest.json")
    train, first = [name for name in files if name.startswith("train_")], on_rank0(time.time_ns)
    mine = {train[(first + rank()) % len(train)]} | (set(files) - set(train) if rank() == 0 else set())
    found = gather(next(damages(folder, {name: files[name] for name in sorted(mine)}), None))
    if any(found):
        manifest = folder / "manifest.json"
        raise UserError(
            f"{next(filter(None, found))}; delete {manifest} and run 'prepare' again, or 'verify' to see all"
        )


@lru_cache(maxsize=2)
def _epoch_order(key: tuple, n_windows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=_philox_key(key))).permutation(n_windows)


def _philox_key(key: tuple) -> int:
    return xxhash.xxh3_128_intdigest(repr(key).encode())


class Order:
    """Start of every sample, by sampling rule:

    random_windows: drawn with replacement from all starts, by a counter-based generator (the paper's
    OpenWebText); one_pass: window s * B + p of the non-overlapping windows, no window twice (FineWeb);
    epochs:k: the same windows in a new random order each epoch, at most k times (the 1B-token study)."""

    def __init__(self, tokens: Tokens, sampling: str, sequence_length: int, batch_sequences: int, seed: int):
        self.tokens, self.length, self.batch = tokens, sequence_length, batch_sequences
        self.kind, _, epochs = sampling.partition(":")
        self.epochs = int(epochs) if epochs else 1
        self.key = (tokens.fingerprint, seed)
        self.n_windows = tokens.n_windows(sequence_length)
        if self.n_windows < 1:
            raise UserError(
                f"the training text of {tokens.folder} has {tokens.n_tokens} tokens, fewer than one window "
                f"of "
                f"{sequence_length} + 1; shorten data.sequence_length or prepare more text"
            )

    def check_steps(self, steps: int) -> None:
        """Raises UserError if `steps` steps need more windows than the sampling rule may read."""
        available = self.n_windows * self.epochs
        if self.kind != "random_windows" and steps * self.batch > available:
            raise UserError(
                f"{steps} steps of {self.batch} sequences need {steps * self.batch} windows, but the data "
                f"has "
                f"{self.n_windows} ({self.epochs} epoch(s)): at most {available // self.batch} steps; "
                f"prepare "
                f"more tokens (data.max_tokens) or allow more epochs (data.sampling)"
            )

    def starts(self, step: int) -> np.ndarray:
        """First token of each sample of step `step` (from 0).  -> (B,) int64"""
        if self.kind == "random_windows":
            generator = np.random.Generator(
                np.random.Philox(key=_philox_key(self.key), counter=[0, 0, 0, step])
            )
            return generator.integers(0, self.tokens.n_tokens - self.length, size=self.batch)
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        if self.kind == "epochs":
            epoch = index // self.n_windows
            for number in np.unique(epoch):
                of_epoch = epoch == number
                order = _epoch_order((*self.key, int(number)), self.n_windows)
                index[of_epoch] = order[index[of_epoch] % self.n_windows]
        return index * self.length


@dataclass(frozen=True)
class Share:
    """How one global batch is cut over ranks and micro steps. All ranks run the same number of micro steps; a
    rank with less than its place fills up with sequences of weight zero."""

    first: int
    """Global position of this rank's first sequence."""
    count: int
    """Sequences of this rank."""
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, batch: int, rank: int, world: int, micro_ceiling: int) -> "Share":
        """Shares differ by at most one sequence; the micro batch is at most `micro_ceiling`, and even over
        the steps.

        Raises UserError if there are more ranks than sequences."""
        if world > batch:
            raise UserError(
                f"{world} ranks for a batch of {batch} sequences: at least one would have nothing to do; "
                f"use at most {batch} ranks"
            )
        small, larger = divmod(batch, world)
        largest = small + (larger > 0)
        accumulation = -(-largest // micro_ceiling)
        return cls(
            first=rank * small + min(rank, larger),
            count=small + (rank < larger),
            micro_batch=-(-largest // accumulation),
            accumulation=accumulation,
        )

    def describe(self, batch: int, world: int, micro_ceiling: int, length: int) -> str:
        """The arithmetic in one line, e.g. '20 sequences x 64 tokens = 1280 tokens: 3 ranks x 4 micro batch x
        2 steps ...'"""
        padded = world * self.micro_batch * self.accumulation - batch
        line = (
            f"{batch} sequences x {length} tokens = {batch * length} tokens a step: {world} rank(s) x "
            f"{self.micro_batch} "
            f"micro batch x {self.accumulation} accumulation"
        )
        line += f", {padded} of them padding of weight zero" if padded else ""
        return line + (
            f" (micro batch capped below {micro_ceiling} by the share)"
            if self.micro_batch < micro_ceiling
            else ""
        )


def read_share(order: Order, step: int, share: Share) -> tuple[np.ndarray, np.ndarray]:
    """This rank's part of step `step`: tokens (A, M, T + 1) int64 and weights (A, M) float32, for A
    accumulation steps of M sequences; padding repeats the rank's first window with weight zero."""
    shape = (share.accumulation, share.micro_batch)
    windows, weights = np.empty((*shape, order.length + 1), np.int64), np.zeros(shape, np.float32)
    rows = windows.reshape(-1, order.length + 1)
    for row, start in zip(rows, order.starts(step)[share.first :][: share.count].tolist(), strict=False):
        order.tokens.read(start, order.length + 1, out=row)
    rows[share.count :] = rows[0]
    weights.reshape(-1)[: share.count] = 1.0
    return windows, weights
