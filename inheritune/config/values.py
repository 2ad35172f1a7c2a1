"""Numbers that you write: one table of what each may be, read in YAML, on the command line and in the
environment.

A `Kind` says whether a number is whole and where it must lie. Fields of the experiment carry one in their
annotation (`steps: Annotated[int, STEPS]`), ARGUMENTS gives those of the command line, environment.VARIABLES
those of the environment. Upper ends lie far beyond any model of today: what is above them is a slip of the
keyboard, and would end in a MemoryError hours later.
"""

import math
import re
from dataclasses import dataclass

from pydantic_core import CoreSchema, PydanticCustomError, core_schema

WHOLE = re.compile(r"[+-]?[0-9]+")  # not \d, which takes digits of other scripts
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
LONGEST = 100  # characters of a number; int() refuses more than 4300 digits with an error of its own


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

    def __get_pydantic_core_schema__(self, source, handler) -> CoreSchema:
        """How pydantic checks a field with this annotation. A whole number is none of True, 6.0 and '6'; a
        real one may be text, since YAML 1.1 reads 1e-3 as text."""
        ends = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        limits = {key: end for key, end in ends.items() if end is not None}
        if self.whole:
            return core_schema.int_schema(strict=True, **limits)
        number = core_schema.float_schema(allow_inf_nan=False, **limits)
        return core_schema.no_info_before_validator_function(_refuse_truth, number)

    def read(self, text: str) -> int | float:
        """The number that `text` says. Raises ValueError with the end of a sentence: 'takes a whole number',
        'must be ...'."""
        text = text.strip()
        if len(text) > LONGEST or not (WHOLE if self.whole else REAL).fullmatch(text):
            raise ValueError("takes a whole number" if self.whole else "takes a number")
        number = int(text) if self.whole else float(text)
        if problem := self.problem(number):
            raise ValueError(self.says or f"must be {problem}")
        return number

    def problem(self, number: float) -> str:
        """What `number` must be and is not, such as 'at least 1'; empty if it lies in the range."""
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


def _refuse_truth(value):
    if isinstance(value, bool):  # which Python takes for 1.0
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
"""An interval needs a deviation, and so two windows at least."""
SEQUENCES = Kind("sequences", ge=1, le=10**6)
CHECKPOINTS = Kind("checkpoints", ge=1, le=10**6)
SHOTS = Kind("examples", ge=0, le=10**4)
QUESTIONS = Kind("questions", ge=1, le=10**9)
SEED = Kind("seeds", ge=0, le=2**63 - 1)
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
    "mfu": SHARE,
    "procs": PROCESSES,
    "seed": SEED,
    "sequences": SEQUENCES,
    "stage": STAGE,
    "workers": PROCESSES,
}
"""Arguments of the command line that are numbers."""
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""What a switch may be given, as in --rehearse=no; alone it is True."""


def read_numbers(kind: Kind, words: str, between: str = ",") -> list[int | float]:
    """[1, 2, 4] of "1,2,4". Raises ValueError as Kind.read does."""
    return [kind.read(word) for word in words.split(between)]
