"""What the numbers in a results.json must be: a file that was edited by hand ends in a sentence."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from inheritune.config.problems import parse_section
from inheritune.errors import UserError


class Interval(BaseModel):
    """A mean over windows with its 95% interval; infinite ends for one window."""

    model_config = ConfigDict(strict=True)
    mean: FiniteFloat
    low: float
    high: float
    n: PositiveInt

    @model_validator(mode="after")
    def _in_order(self) -> "Interval":
        if not self.low <= self.mean <= self.high:
            raise ValueError(f"low {self.low}, mean {self.mean}, high {self.high} are not in this order")
        return self


class Loss(Interval):
    """A cross-entropy, which is not below zero."""

    mean: FiniteFloat = Field(ge=0)


class Results(BaseModel):
    """The keys that tables, figures and growth read, where they are there."""

    model_config = ConfigDict(strict=True, extra="allow")
    run: str | None = None
    stage: PositiveInt | None = None
    seed: NonNegativeInt | None = None
    layers: PositiveInt | None = None
    parameters: PositiveInt | None = None
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    train_flops: FiniteFloat = Field(default=0.0, ge=0)
    validation: Loss | None = None
    difference: Interval | None = None
    curve_loss: FiniteFloat | None = None
    window_losses: list[FiniteFloat] = []
    tasks: dict[str, dict] = {}
    record: dict[str, dict] = {}


class RunResults(Results):
    """Those of a finished run, which training wrote whole."""

    run: str
    seed: NonNegativeInt
    layers: PositiveInt
    parameters: PositiveInt
    steps: PositiveInt
    tokens: PositiveInt
    train_flops: FiniteFloat = Field(ge=0)
    validation: Loss


def check_results(results: Any, file: Path, is_run: bool) -> None:
    """Raise UserError that names `file` and each key of `results` that is missing or no such number.

    `is_run`: they are those of a finished run."""
    if not isinstance(results, dict):
        raise UserError(f"{file} holds a JSON {type(results).__name__} instead of results; restore it")
    parse_section(RunResults if is_run else Results, results, f"{file} is not as it was written; restore it")
