"""The numbers of a drafted experiment, fitted to text, model and machine: pure functions."""

import math
from dataclasses import dataclass
from typing import Any

from inheritune.errors import UserError
from inheritune.planning.machine import Machine

FEWEST_WINDOWS = 8
"""Validation windows below which an interval says nothing."""
ENOUGH_WINDOWS = 100
FEW_DOCUMENTS = 20
"""Fewer documents than this are not split by chance: a part of the text is held out instead."""
EPOCHS = 4
"""Times that the text is read at most."""


@dataclass(frozen=True)
class Text:
    """What the documents hold, as far as it was looked at."""

    documents: int
    tokens: int
    """Estimated from the first SAMPLE bytes."""
    is_whole: bool = True
    """False if there is more than was looked at."""

    def describe_tokens(self) -> str:
        """Return the number of tokens in words."""
        return f"{'about' if self.is_whole else 'more than'} {self.tokens:,} tokens"


@dataclass(frozen=True)
class Sizes:
    """The numbers that are fitted to text, model and machine."""

    length: int
    sequences: int
    """Sequences of a step."""
    steps: int
    held_out: float
    """Share of the text that is validation text."""
    split: dict[str, Any]
    """`validation` of the data section, with `shard_tokens` where the first tokens are held out."""
    windows: int
    """Validation windows, about."""


def choose_sizes(text: Text, positions: int, machine: Machine, steps: int | None = None) -> Sizes:
    """Return the numbers for `text`, a model of so many `positions`, and a machine (pure).

    Raises UserError if the text is too short for FEWEST_WINDOWS windows beside something to train on."""
    length = 1 << int(math.log2(min(positions, 1024 if machine.gpus else 256)))
    while length > 8 and 0.1 * text.tokens < FEWEST_WINDOWS * (length + 1):
        length //= 2
    if 0.2 * text.tokens < FEWEST_WINDOWS * (length + 1):
        raise UserError(
            f"the text has about {text.tokens} tokens, too few to train on and to hold out "
            f"{FEWEST_WINDOWS} windows of {length}; give more text"
        )
    shares = (0.01, 0.02, 0.05, 0.1)
    share = next((s for s in shares if s * text.tokens >= ENOUGH_WINDOWS * (length + 1)), 0.1)
    if share * text.tokens < FEWEST_WINDOWS * (length + 1):
        share = 0.2
    trained = round((1 - share) * text.tokens)
    sequences = max(1, min(64 if machine.gpus else 8, trained // (4 * length)))
    most = 2000 if machine.gpus else 200
    fitting = max(10, min(most, EPOCHS * trained // (sequences * length)))
    held = int(share * text.tokens)
    split: dict[str, Any] = {"validation": {"fraction": share}}
    if text.documents < FEW_DOCUMENTS:
        split = {"validation": {"first_shard": True}, "shard_tokens": held}
    return Sizes(length, sequences, steps or fitting, share, split, held // length)


def choose_depths(layers: int) -> tuple[int, int, int]:
    """Return (first n layers, layers that growth adds, its most layers) of a model of `layers` (pure).

    n is half, rounded up: the paper's choice where no layer is lazy."""
    n, by = (layers + 1) // 2, max(1, round(layers / 8))
    n = min(n, layers - 1)
    return n, by, max(n, min(layers - 1, n + 2 * by))
