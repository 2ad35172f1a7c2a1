"""Layer ranges: which blocks of a source are copied, and where they go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inheritune.errors import UserError, suggest_name

AUTO, DROP = "auto:", "drop:"
"""What begins a choice by measurement, auto:8 or auto:8:influence, and a list of what is left out,
drop:3,7-9."""
RULES = ("cost", "influence", "window")
"""How blocks are chosen: those without which the loss rises most; those that change their input most; all
but the adjacent ones that move the residual stream least."""


@dataclass(frozen=True)
class AutoLayers:
    """A choice of `count` blocks by one of RULES."""

    count: int
    rule: str


def parse_auto(layers: str | Sequence[int]) -> AutoLayers | None:
    """Return the choice of 'auto:N' (by cost) or 'auto:N:RULE'; None for other layers.

    Raises UserError if it is malformed."""
    if not isinstance(layers, str) or not layers.startswith(AUTO):
        return None
    number, _, rule = layers.removeprefix(AUTO).partition(":")
    if not (number.isascii() and number.isdigit() and int(number)):
        raise UserError(f"layers '{layers}': auto needs how many blocks to keep, as in auto:8")
    if (rule or RULES[0]) not in RULES:
        raise UserError(f"layers '{layers}': unknown rule '{rule}'; {suggest_name(rule, RULES)}")
    return AutoLayers(int(number), rule or RULES[0])


def count_layers(layers: str | list[int], n_source: int) -> int:
    """Return how many blocks `layers` selects in a model of `n_source` blocks.

    A choice by measurement is known to be so many before it is measured. Raises UserError as parse_layers
    does."""
    auto = parse_auto(layers)
    if auto is None:
        return len(parse_layers(layers, n_source))
    if auto.count > n_source:
        raise UserError(f"layers {layers} asks for {auto.count} blocks; the source has {n_source}")
    return auto.count


def parse_drop(layers: str) -> list[int]:
    """Return the blocks that 'drop:3,7-9' leaves out: 3, 7, 8 and 9.

    Both ends of 7-9 are meant. Raises UserError if it is malformed."""
    dropped: list[int] = []
    for word in layers.removeprefix(DROP).split(","):
        ends = [end.strip() for end in word.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() and len(end) < 7 for end in ends):
            raise UserError(
                f"drop takes blocks, counted from 0, and ranges of them, as in 3,7-9 (got '{word}')"
            )
        low, high = int(ends[0]), int(ends[-1])
        if high < low:
            raise UserError(f"drop: {word} ends before it begins; write {high}-{low}")
        if high - low > 100_000:
            raise UserError(f"drop: no model has as many blocks as {word} names")
        dropped += range(low, high + 1)
    return dropped


def check_layers_text(layers: str) -> None:
    """Raise UserError unless `layers` is well formed: a range, auto:N or drop:LIST."""
    if layers.startswith(DROP):
        parse_drop(layers)
    elif not parse_auto(layers):
        parse_range(layers)


def parse_range(layers: str) -> tuple[int | None, int | None]:
    """Return the ends of 'a:b'.

    Raises UserError if it is malformed. A lone number is refused too: it could mean the first n blocks or
    block n."""
    try:
        ends = [int(end) if end.strip() else None for end in layers.split(":")]
    except ValueError:
        ends = []
    if len(ends) == 1 and ends[0] is not None:
        raise UserError(
            f"layers '{layers}' could mean the first {layers} (write 0:{layers}) or block {layers} alone "
            f"(write {layers}:{ends[0] + 1})"
        )
    if len(ends) != 2:
        raise UserError(
            f"layers '{layers}' is neither a half-open range such as 0:16 nor a list such as 0,2,4"
        )
    return ends[0], ends[1]


def parse_layers(layers: str | list[int], n_source: int) -> list[int]:
    """Return the block indices that `layers` selects in a model of `n_source` blocks.

    `layers` is a half-open range 'a:b' (Python's rules for negative and missing ends), a list, or
    'drop:3,7-9' for all others. Raises UserError if it is empty, out of range or malformed, and for 'auto:N',
    whose blocks are measured (`count_layers` says how many they are)."""
    indices: Sequence[int]
    if parse_auto(layers):
        raise UserError(
            f"layers '{layers}' are chosen by an analysis of the source; give them by number here"
        )
    if isinstance(layers, str) and layers.startswith(DROP):
        dropped = parse_drop(layers)
        indices = [index for index in range(n_source) if index not in dropped] + [
            index
            for index in dropped
            if index >= n_source  # refused below
        ]
    elif isinstance(layers, str):
        indices = range(*_resolve_range(layers, n_source))
    else:
        indices = [int(index) for index in layers]
    if not indices:
        raise UserError(f"layers {layers} selects no layer; a range is half-open: 0:16 are the first 16")
    wrong = next((index for index in indices if not 0 <= index < n_source), None)
    if wrong is not None:
        raise UserError(
            f"layers {layers} asks for layer {wrong}; the source has {n_source} layers (0 to {n_source - 1})"
        )
    return list(indices)


def _resolve_range(layers: str, n_source: int) -> tuple[int, int]:
    """Return the ends of 'a:b', with missing and negative ones counted in `n_source` blocks."""
    low, high = parse_range(layers)
    if low is None:
        low = 0
    elif low < 0:
        low += n_source
    if high is None:
        high = n_source
    elif high < 0:
        high += n_source
    return low, high


def repeat_middle(n_layers: int, added: int) -> list[int]:
    """Return the blocks of a model of `n_layers` blocks in an order that repeats `added` middle ones.

    In groups of `added` from the first block on, of which the last may be shorter, group ceil(k / 2) of k is
    followed by a copy of itself (MIDAS, arXiv 2409.19044): 8 blocks and 2 give 0 1 2 3 2 3 4 5 6 7."""
    assert 0 < added <= n_layers, f"{added} of {n_layers} blocks cannot be repeated"
    groups = math.ceil(n_layers / added)
    end = math.ceil(groups / 2) * added
    return [*range(end), *range(end - added, n_layers)]


def place_layers(
    layers: str | list[int], n_source: int, depth: int | None = None, at: int = 0
) -> list[int | None]:
    """Return for each block of a model its block in a source of `n_source` blocks, None for a random one.

    The blocks that `layers` selects start at index `at` of `depth` blocks (default: up to the last copied
    one). Raises UserError if they do not fit, and as parse_layers does."""
    indices = parse_layers(layers, n_source)
    depth = at + len(indices) if depth is None else depth
    if at < 0 or at + len(indices) > depth:
        raise UserError(
            f"{len(indices)} layers ({layers}) from index {at} on do not fit into depth {depth}; change one "
            f"of them"
        )
    return [None] * at + indices + [None] * (depth - at - len(indices))
