"""What the installed DeepSpeed reads and refuses in its JSON: the keys of each block, found by watching it
read one, and the errors of its own reader."""

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

from inheritune.errors import is_machine_limit

MICRO = "train_micro_batch_size_per_gpu"
_PROBE = "no such key"


def saves_in_background(settings: dict, on_gpus: bool) -> bool:
    """Return whether training continues while a checkpoint is written: as the DeepSpeed JSON has it, by
    default on GPUs. On CPUs the thread takes the cores that train and the copy their memory, to save
    fractions of a second, and a kill may cost two intervals of checkpoints instead of one."""
    return bool(settings.get("inheritune", {}).get("background_saves", on_gpus))


class _WatchedDict(dict):
    """A block that records which of its keys are looked up."""

    def __init__(self, *pairs: Any) -> None:
        super().__init__(*pairs)
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # so that `key in block.keys()` is seen too


@cache
def valid_keys(path: tuple = ()) -> dict[str, tuple[str, str]]:
    """Return {spelling: (canonical name, what replaces it if it is deprecated)} of the keys that the
    installed DeepSpeed reads in the block at `path`; () is the whole JSON.

    DeepSpeed reads a watched block to find them. Returns {} if nothing is read there by name."""
    from pydantic import ValidationError

    watched = _WatchedDict({_PROBE: 0})
    nested: dict = watched
    for key in reversed(path):
        nested = {key: nested}
    nested.setdefault(MICRO, 1)
    error = read_with_deepspeed(nested)  # its parser fails in many ways on a block where it wants a value
    if isinstance(error, ValidationError):  # a pydantic block refuses the probe, and so names its class
        return _list_fields(error)
    return {key: (key, "") for key in watched.asked - {_PROBE}}


def _list_fields(error: Any) -> dict[str, tuple[str, str]]:
    """Return `valid_keys` of the pydantic block that refused the probe."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    from inheritune.config.problems import find_model_class

    def list_subclasses(model: Any) -> list[Any]:
        return [model, *(found for child in model.__subclasses__() for found in list_subclasses(child))]

    problem = next((p for p in error.errors() if p["loc"] and p["loc"][-1] == _PROBE), None)
    models = list_subclasses(DeepSpeedConfigModel)
    owner = next((model for model in models if model.__name__ == error.title), None)
    block = find_model_class(owner, problem["loc"][:-1]) if owner and problem else None
    found: dict[str, tuple[str, str]] = {}
    for name, field in block.model_fields.items() if block else ():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        deprecated = str(extra.get("new_param") or "nothing") if extra.get("deprecated") else ""
        found |= dict.fromkeys({name, field.alias or name}, (field.alias or name, deprecated))
    return found


def read_with_deepspeed(settings: dict) -> Exception | None:
    """Let DeepSpeed read `settings`; return what it raises."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(settings)
    except Exception as error:  # DeepSpeed raises whatever a wrong value leads to
        if is_machine_limit(error):
            raise
        return error
    return None


def find_refusals(settings: dict) -> list[tuple[str, str]]:
    """Return (key, sentence) for all that DeepSpeed's own reader refuses, block by block, or else in the
    whole JSON."""
    plain = {key: value for key, value in settings.items() if key != "inheritune"}
    errors = {name: read_with_deepspeed({MICRO: 1, name: value}) for name, value in plain.items()}
    refused = {name: error for name, error in errors.items() if error}
    if not refused and (error := read_with_deepspeed({**plain})):
        refused["these keys together"] = error
    return [
        (key, f"DeepSpeed refuses {key}{got}: {why}; correct it or leave it out")
        for name, error in refused.items()
        for key, got, why in _explain_refusal(name, error, settings)
    ]


def _explain_refusal(name: str, error: Exception, settings: dict) -> Iterator[tuple[str, str, object]]:
    """Yield (key, " = value" or "", reason) of what DeepSpeed raised for the block `name`."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        for problem in error.errors():
            key = ".".join(map(str, (name, *problem["loc"])))
            got = f" = {problem['input']!r}" if problem["loc"] else ""
            yield key, got, problem["msg"].removeprefix("Value error, ")
    else:
        yield name, f" = {settings[name]!r}" if name in settings else "", error
