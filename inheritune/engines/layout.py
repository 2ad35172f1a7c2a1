"""Whether a run may resume under another DeepSpeed JSON, and how.

A checkpoint of DeepSpeed stores weights and moments as flat vectors, and DeepSpeed loads them without
comparing their order. Under a JSON that arranges parameters differently, each parameter would receive the
numbers of another one. So each difference between the JSON that wrote a checkpoint and the one that reads it
is looked up in dslint.yaml (`resume`):

    layout   the key changes how vectors are stored: the states are read parameter by parameter, as after a
             resize
    kept     a test (tests/integration/test_json_change.py) has shown that the vectors stay as they are: the
    states are
             loaded as stored
    else     the start is refused, and the key is named

`describe_layout` returns what a marker (COMPLETE) records for this. `find_layout_changes` compares it with
the JSON of a start.
"""

from typing import Any

from inheritune.engines import dslint
from inheritune.engines.deepspeed_json import get_zero_stage
from inheritune.errors import UserError

VERSION = "the version of DeepSpeed"
STAGE = "zero_optimization.stage"
ELASTIC = "zero_optimization.elastic_checkpoint"


def describe_layout(settings: dict) -> dict:
    """Return what the marker of a checkpoint written under the DeepSpeed JSON `settings` records:
    {layout: {key: value}, deepspeed: the JSON, deepspeed_version}.

    `layout` also holds the keys that were left at DeepSpeed's default, which may differ in another
    version."""
    import deepspeed

    values, stage = fill_defaults(settings), get_zero_stage(settings)
    keys = [key for key, stages in dslint.VERDICTS["resume"]["layout"].items() if stage in stages]
    layout = {key: values[key] for key in keys}
    return {"layout": layout, "deepspeed": settings, "deepspeed_version": deepspeed.__version__}


def fill_defaults(settings: dict) -> dict:
    """Return {path: value} of all keys of a DeepSpeed JSON, with DeepSpeed's defaults in
    `zero_optimization`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(**settings.get("zero_optimization", {})).model_dump(mode="json", by_alias=True)
    flat = dslint.flatten({**settings, "zero_optimization": zero})
    return {key: value for key, value in flat.items() if not isinstance(value, dict)}


def _fill_if_known(settings: dict) -> dict:
    """Return `fill_defaults` of a JSON for another version of DeepSpeed. If this version refuses it, the
    JSON's values replace the defaults."""
    from pydantic import ValidationError

    try:
        return fill_defaults(settings)
    except ValidationError:
        return fill_defaults({}) | {
            k: v for k, v in dslint.flatten(settings).items() if not isinstance(v, dict)
        }


def find_layout_changes(marker: dict, settings: dict, where: str) -> list[str]:
    """Return the keys whose values differ between `settings` and the JSON in `marker` (of the checkpoint
    `where`) and that change how vectors are stored. The checkpoint can be loaded as stored if there is none.

    Raises UserError naming a changed key whose effect is not known."""
    import deepspeed

    before, now = _fill_if_known(marker["deepspeed"]) | marker["layout"], fill_defaults(settings)
    stages, rules = {before.get(STAGE), now[STAGE]}, dslint.VERDICTS["resume"]
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if key == ELASTIC and old:  # DeepSpeed 0.19.8 writes such a checkpoint, and raises as it reads it
            changed.append(key)
        if old == new or key == STAGE or not any(_is_read(key, stage) for stage in stages):
            continue
        if key in rules["layout"]:
            if key not in changed:
                changed.append(key)
        elif not _is_harmless(key, old, new):
            raise UserError(
                f"{where} was written with {key} = {old}, the DeepSpeed JSON of this start has {new}; "
                f"whether its stored states fit is not known: set {key} back, or finish the run under the "
                f"JSON it began with"
            )
    if marker["deepspeed_version"] != deepspeed.__version__:
        changed.append(VERSION)
    return changed


def _is_read(key: str, stage: int | None) -> bool:
    """Return whether DeepSpeed reads `key` at this ZeRO stage."""
    return all(stage in stages for name, stages in dslint.VERDICTS["stages"].items() if _is_below(key, name))


def _is_harmless(key: str, old: Any, new: Any) -> bool:
    """Return whether changing `key` from `old` to `new` was shown to leave stored vectors as they are."""
    for name, values in dslint.VERDICTS["resume"]["kept"].items():
        if _is_below(key, name) and (values is None or {old, new} <= {*values, None}):
            return True
    return False


def _is_below(key: str, name: str) -> bool:
    """Return whether `key` is `name` or a key of the block `name`."""
    return key == name or key.startswith(f"{name}.")
