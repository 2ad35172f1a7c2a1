"""Layer ranges: which blocks of a source are copied, and where they go."""

from collections.abc import Sequence

from inheritune.errors import UserError


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

    `layers` is a half-open range 'a:b' (Python's rules for negative and missing ends) or a list. Raises
    UserError if it is empty, out of range or malformed."""
    indices: Sequence[int]
    if isinstance(layers, str):
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
