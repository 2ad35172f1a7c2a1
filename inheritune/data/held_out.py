"""Which documents are held out for validation: a random fraction of all."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from inheritune.config.sections import Data
from inheritune.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of all groups, in the order of the source."""

    mask: np.ndarray
    """(documents,) bool."""
    first: dict[str, int]
    """The index of each group's first document."""
    counts: dict[str, int]
    """The number of each group's documents."""

    def find(self, group: str, start: int, count: int) -> np.ndarray | None:
        """Return which of `count` documents of a group from its index `start` are held out, (count,) bool;
        None if the group has fewer documents."""
        if start + count > self.counts[group]:
            return None
        return self.mask[self.first[group] + start :][:count]


def hold_out(data: Data, counts: dict[str, int] | None) -> HeldOut | None:
    """Return the documents that a random split holds out of `counts` documents of each group; None without a
    random split.

    They are those that datasets' train_test_split(fraction, seed) puts into its test part, as in nanoGPT. All
    documents count, unusable ones too. Raises UserError if none is left to train on."""
    fraction = data.validation.fraction
    if counts is None or fraction is None:
        return None
    ends = list(itertools.accumulate(counts.values()))
    count = ends[-1]
    n_heldout = math.ceil(fraction * count)
    if count and n_heldout == count:
        raise UserError(
            f"{data.name}: of {count} document(s), validation.fraction {fraction} holds out {n_heldout}, so "
            f"none is left to train on; give more files, write one document per line (.jsonl), or hold out "
            f"the first N tokens: 'validation: {{first_shard: true}}' with 'shard_tokens: N'"
        )
    mask = np.zeros(count, bool)
    order = np.random.default_rng(data.validation.seed).permutation(count)
    mask[order[:n_heldout]] = True
    return HeldOut(mask, dict(zip(counts, [0, *ends], strict=False)), counts)
