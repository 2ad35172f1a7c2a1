"""Layer ranges: which blocks of a source a person means, and where they go."""

from inheritune.errors import UserError


def parse_range(layers: str) -> tuple[int | None, int | None]:
    """The ends of 'a:b'. Raises UserError if it is malformed; for a lone number too, because it could mean
    the first n as well as block n."""
    try:
        ends = [int(end) if end.strip() else None for end in layers.split(":")]
    except ValueError:
        ends = []
    if len(ends) == 1 and ends != [None]:
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
    """Block indices meant by `layers` in a model of `n_source` blocks: a half-open range 'a:b' (Python's
    rules for negative and missing ends), or a list. Raises UserError if it is empty, out of range or
    malformed."""
    if isinstance(layers, str):
        low, high = parse_range(layers)
        low = 0 if low is None else low + n_source if low < 0 else low
        high = n_source if high is None else high + n_source if high < 0 else high
        indices, wrong = (
            range(low, high),
            [*range(low, min(high, 0))[:1], *range(max(low, n_source), high)[:1]],
        )
    else:
        indices = [int(index) for index in layers]
        wrong = [index for index in indices if not 0 <= index < n_source]
    if not indices:
        raise UserError(f"layers {layers} selects no layer; a range is half-open: 0:16 are the first 16")
    if wrong:
        raise UserError(
            f"layers {layers} asks for layer {wrong[0]}; the source has {n_source} layers (0 to "
            f"{n_source - 1})"
        )
    return list(indices)


def place_layers(
    layers: str | list[int], n_source: int, depth: int | None = None, at: int = 0
) -> list[int | None]:
    """For each block of a model its block in a source of `n_source`, None for a random one: `layers` from
    index `at` on, in `depth` blocks (default: up to the last copied one). Raises UserError if they do not
    fit, and as parse_layers does."""
    indices = parse_layers(layers, n_source)
    depth = at + len(indices) if depth is None else depth
    if at < 0 or at + len(indices) > depth:
        raise UserError(
            f"{len(indices)} layers ({layers}) from index {at} on do not fit into depth {depth}; change one "
            f"of them"
        )
    return [None] * at + indices + [None] * (depth - at - len(indices))
