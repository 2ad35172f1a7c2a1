"""The files seeds/seedN.json of the evidence, which may come from another machine or have been edited."""

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt

from inheritune.config.problems import parse_section
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.result_values import Loss


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Attention(_Part):
    """What `analyze` measured at one step, per layer."""

    max_rank: list[FiniteFloat] = Field(min_length=1)
    avg_mass: list[FiniteFloat] = Field(min_length=1)
    cost: list[FiniteFloat] = []
    without_lazy: FiniteFloat | None = None
    heads_near_1: NonNegativeInt
    suggested: NonNegativeInt


class SeedModel(_Part):
    """One finished run, or one stage of a grown one."""

    run: str
    stage: PositiveInt | None
    label: str
    key: str
    weights: str
    layers: PositiveInt
    parameters: PositiveInt
    steps: PositiveInt
    batch_tokens: PositiveInt
    loss: Loss
    train_flops: FiniteFloat = Field(ge=0)
    flops_with_sources: FiniteFloat = Field(ge=0)
    curve: list[list[FiniteFloat]] = Field(min_length=2)
    attention: dict[str, Attention] = {}


class Growth(_Part):
    """The decision of a growth."""

    stage: PositiveInt


class SeedRecord(_Part):
    """A whole file."""

    seed: NonNegativeInt
    key: str
    text: str
    rehearsal: bool
    made_by: list[dict]
    models: list[SeedModel] = Field(min_length=1)
    growth: dict[str, Growth]


def list_seed_files(folder: Path) -> list[Path]:
    """Return the files of seeds in the order of their numbers, without files of other names, such as
    seed1 (copy).json."""
    found = {}
    for file in (folder / "seeds").glob("seed*.json"):
        if match := re.fullmatch(r"seed(0|[1-9][0-9]{0,9})\.json", file.name):
            found[file] = int(match[1])
    return sorted(found, key=lambda file: found[file])


def read_seeds(folder: Path, rehearsal: bool = False, now: dict[Path, dict] | None = None) -> list[dict]:
    """Return the records of the seeds in `folder`, in the order of their numbers. Those in `now` stand for
    their files, which are not written yet.

    Raises UserError if a file has no such numbers, those of a rehearsal where `rehearsal` is false, those of
    a seed that is counted already (a copy would shrink every interval), or measured at other points than the
    others."""
    records = {file: _read_seed(file, rehearsal) for file in list_seed_files(folder)} | (now or {})
    weights: dict[str, Path] = {}
    points: dict[tuple, tuple[Path, dict]] = {}
    for file, record in records.items():
        for model in record["models"]:
            if weights.setdefault(model["weights"], file) != file:
                raise UserError(
                    f"{file} has the weights of {weights[model['weights']]} ('{model['label']}'): they are "
                    f"one seed, which counts once; move the wrong file away"
                )
            for what, found in _list_points(model).items():
                key = (model["run"], model["stage"], model["key"], what)
                first, expected = points.setdefault(key, (file, found))
                if found != expected:
                    raise UserError(
                        f"'{model['label']}' in {file} has other {what} ({found}) than in {first} "
                        f"({expected}), so the two cannot be averaged; move one of them away"
                    )
    return sorted(records.values(), key=lambda record: record["seed"])


def _read_seed(file: Path, rehearsal: bool) -> dict:
    """Return the record of one file. Raises UserError as `read_seeds` does."""
    record = read_json(file)
    restore = f"{file} is not as it was written; restore it or move it away"
    if not isinstance(record, dict):
        raise UserError(restore)
    parse_section(SeedRecord, record, restore)
    if file.stem != f"seed{record['seed']}":
        raise UserError(
            f"{file} has the numbers of seed {record['seed']}; a seed counts once, so name the file "
            f"seed{record['seed']}.json or move it away"
        )
    if record["rehearsal"] and not rehearsal:
        raise UserError(f"{file} is a rehearsal's, which is no result; move it away")
    for run, growth in record["growth"].items():
        stages = [model["stage"] for model in record["models"] if model["run"] == run]
        if growth["stage"] not in stages:
            raise UserError(
                f"{restore}: growth.{run}.stage is {growth['stage']}, and its stages are {stages}"
            )
    return record


def _list_points(model: dict) -> dict[str, list | int]:
    """Return where a model was measured: what all seeds must share. A model without attention has not been
    analyzed yet, and its seed does not count until it is."""
    points = {
        "steps of its curve": [int(point[0]) for point in model["curve"]],
        "validation windows": model["loss"]["n"],
        "layers": model["layers"],
    }
    attention = model.get("attention")
    return points | ({"steps of its attention": sorted(map(int, attention))} if attention else {})
