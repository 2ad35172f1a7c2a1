"""Numbers that you write in YAML, on the command line and in the environment: one table of their ranges.

A `Kind` states whether a number is whole, and its range. Fields of the experiment carry one in their
annotation (`steps: Annotated[int, STEPS]`). ARGUMENTS lists those of the command line, environment.VARIABLES
those of the environment. Upper ends are far beyond any model of today: a larger number is a typing error, and
would cause a MemoryError hours later.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

WHOLE = re.compile(r"[+-]?[0-9]+")  # not \d, which takes digits of other scripts
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MAX_CHARACTERS = 100  # of a number; int() refuses more than 4300 digits with an error of its own


@dataclass(frozen=True)
class Kind:
    """A number: whole or real, finite, from `ge` (or above `gt`) to `le` (or below `lt`)."""

    what: str
    """The noun after "number of" where it is a count or has a unit, e.g. "steps"."""
    whole: bool = True
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    says: str = ""
    """The end of the sentence that refuses a number out of range, in place of 'must be at least ...'."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema by which pydantic checks a field with this annotation.

        A whole number may not be True, 6.0 or '6'. A real one may be text, since YAML 1.1 reads 1e-3 as
        text."""
        ends = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        limits: dict[str, Any] = {key: end for key, end in ends.items() if end is not None}
        if self.whole:
            return core_schema.int_schema(strict=True, **limits)
        number = core_schema.float_schema(allow_inf_nan=False, **limits)
        return core_schema.no_info_before_validator_function(_refuse_bool, number)

    def read(self, text: str) -> int | float:
        """Return the number that `text` holds.

        Raises ValueError with the end of a sentence: 'takes a whole number', 'must be ...'."""
        text = text.strip()
        if len(text) > MAX_CHARACTERS or not (WHOLE if self.whole else REAL).fullmatch(text):
            raise ValueError("takes a whole number" if self.whole else "takes a number")
        number = int(text) if self.whole else float(text)
        if problem := self.problem(number):
            raise ValueError(self.says or f"must be {problem}")
        return number

    def problem(self, number: float) -> str:
        """Return what `number` must be and is not, such as 'at least 1'; empty if it is in the range."""
        if not math.isfinite(number):
            return "finite"
        if self.ge is not None and number < self.ge:
            return f"at least {self.ge}"
        if self.gt is not None and number <= self.gt:
            return f"greater than {self.gt}"
        if self.le is not None and number > self.le:
            return f"at most {self.le:,}"
        if self.lt is not None and number >= self.lt:
            return f"less than {self.lt}"
        return ""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python would treat it as 1.0 or 0.0
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


STEPS = Kind("steps", ge=1, le=10**9)
STEPS_OR_NONE = Kind("steps", ge=0, le=10**9)
TOKENS = Kind("tokens", ge=1, le=10**15)
BATCH = Kind("tokens of a step", ge=1, le=10**10)
LENGTH = Kind("tokens of a sequence", ge=1, le=10**8)
VOCABULARY = Kind("token ids", ge=1, le=10**8)
WIDTH = Kind("elements", ge=1, le=10**7)
LAYERS = Kind("layers", ge=1, le=10**4)
LAYER = Kind("layers", ge=0, le=10**4)
STAGE = Kind("stages", ge=1, le=10**4)
WINDOWS = Kind("windows", ge=1, le=10**8)
FINAL_WINDOWS = Kind("windows", ge=2, le=10**8)
"""An interval needs a standard deviation, so at least two windows."""
SEQUENCES = Kind("sequences", ge=1, le=10**6)
CHECKPOINTS = Kind("checkpoints", ge=1, le=10**6)
SHOTS = Kind("examples", ge=0, le=10**4)
QUESTIONS = Kind("questions", ge=1, le=10**9)
SEED = Kind("seeds", ge=0, le=2**63 - 1)
RESTARTS = Kind("restarts", ge=0, le=10**9)
PROCESSES = Kind("processes", ge=1, le=10**5)
GPUS = Kind("GPUs", ge=1, le=10**6)
GIGABYTES = Kind("GB", ge=1, le=10**6)
SECONDS = Kind("seconds", whole=False, ge=0)
MINUTES = Kind("minutes", ge=1, le=10**6)
MEBIBYTES = Kind("MiB", ge=0, le=10**12)

ABOVE_ZERO = Kind("", whole=False, gt=0)
NOT_NEGATIVE = Kind("", whole=False, ge=0)
BELOW_ONE = Kind("", whole=False, ge=0, lt=1)
INSIDE_ONE = Kind("", whole=False, gt=0, lt=1)
SHARE = Kind(
    "", whole=False, ge=0.0001, le=1, says="is the share of the GPU's peak rate that is used, between 0 and 1"
)
WEIGHT = Kind("", whole=False, gt=0, le=1e9)
FINITE = Kind("", whole=False)

ARGUMENTS = {
    "at": LAYER,
    "depth": LAYERS,
    "gpu_memory": GIGABYTES,
    "gpus": GPUS,
    "length": LENGTH,
    "parts": PROCESSES,
    "mfu": SHARE,
    "procs": PROCESSES,
    "seed": SEED,
    "sequences": SEQUENCES,
    "stage": STAGE,
    "steps": STEPS,
    "workers": PROCESSES,
}
"""Arguments of the command line that are numbers."""
SWITCH_VALUES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""Values of a switch, as in --rehearse=no; without a value it is True."""


def read_numbers(kind: Kind, words: str, between: str = ",") -> list[int | float]:
    """Return the numbers in a list: [1, 2, 4] for "1,2,4". Raises ValueError as Kind.read does."""
    return [kind.read(word) for word in words.split(between)]
