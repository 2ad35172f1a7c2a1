"""What all sections of an experiment share: their base class, their number types and the check of names."""

from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict

from inheritune.config import names, values

Layers = Annotated[int, values.LAYERS]
Layer = Annotated[int, values.LAYER]
Steps = Annotated[int, values.STEPS]
Tokens = Annotated[int, values.TOKENS]
Windows = Annotated[int, values.WINDOWS]
Length = Annotated[int, values.LENGTH]
Width = Annotated[int, values.WIDTH]
AboveZero = Annotated[float, values.ABOVE_ZERO]
NotNegative = Annotated[float, values.NOT_NEGATIVE]
BelowOne = Annotated[float, values.BELOW_ONE]


class Strict(BaseModel):
    """A section whose unknown keys are errors and whose values are fixed after loading.

    The key `from:` of YAML is the attribute `from_` in Python."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )


def check_name(find_problem: Callable[[str], str], name: str) -> str:
    """Return `name`. Raises ValueError if `find_problem` (of names.py) finds a problem in it."""
    if problem := find_problem(name):
        raise ValueError(f"'{names.format_name(name)}' {problem}")
    return name
