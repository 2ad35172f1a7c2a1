"""Which layers `inherit` copies: --layers as a range, a list or a choice by measurement, or --drop."""

from inheritune.config import values
from inheritune.config.layers import DROP, parse_auto
from inheritune.errors import UserError


def read_layers(source: str, layers: str | None, drop: str | None, revision: str | None) -> str | list[int]:
    """Return the layers that the flags of `inherit` mean, as surgery takes them.

    Raises UserError unless exactly one of --layers and --drop is given, for a malformed one, and for a choice
    without an analysis of `source`."""
    if (layers is None) == (drop is None):
        raise UserError(
            "inherit needs either --layers A:B (which to copy) or --drop 3,7-9 (which to leave out)"
        )
    if layers is None:
        return f"{DROP}{drop}"
    if choice := parse_auto(layers):
        from inheritune.models.choice import choose_layers, format_analyze

        return choose_layers(choice, source, revision, format_analyze(source, revision=revision))
    if "," not in layers or layers.startswith(DROP):
        return layers
    try:
        return [int(number) for number in values.read_numbers(values.LAYER, layers)]
    except ValueError as problem:
        raise UserError(
            f"inherit: --layers as a list {problem} for each layer, as in 0,2,4 (got '{layers}')"
        ) from None
