"""Names of tensors in checkpoints, brought to those of the architecture table.

Checkpoints of one model differ in their names: a prefix is left out, a wrapper of the trained model added its
own, a tied head or an old buffer is stored too, experts are stored one by one or all in one tensor.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from inheritune.errors import UserError
from inheritune.models.architectures import Architecture, Shape
from inheritune.models.extents import Stored, cut_extents, is_same_tensor

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of the modules that torch.compile, FSDP and activation checkpointing put around another one."""

Pieces = dict[str, tuple[Shape, dict[str, Shape]]]
"""{the model's name of a tensor: (its shape, {name in checkpoints: shape})}."""


def strip_wrappers(names: Iterable[str], where: str | Path) -> list[str]:
    """Return the `names` of a checkpoint's tensors without what wrappers of the trained model added.

    The `module.` of DistributedDataParallel is removed where all names begin with it. Raises UserError
    (naming `where`) if two tensors then have one name."""
    plain = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    twice = next((name for name, count in Counter(plain).items() if count > 1), None)
    if twice:
        raise UserError(
            f"{where} holds {twice} both of a compiled or wrapped model and of a plain one; keep one of them"
        )
    return plain


def normalize_names(
    stored: dict[str, Stored], table: Architecture, tied: bool, folder: Path
) -> dict[str, Stored]:
    """Return `stored` under full names, without buffers and without a tied head.

    What wrappers of a model added is removed, the prefix is added where it was left out, and a tensor outside
    the blocks (the head) gets its published name. Raises UserError where two tensors of one name differ."""
    outside = {name for names in table.parts.values() for name in names}
    published = {name: names[0] for name, names in table.published.items() if names[0] in outside}
    block = re.compile(re.escape(table.block).replace(r"\{i\}", r"\d+"))
    named: dict[str, Stored] = {}
    for name, place in zip(strip_wrappers(stored, folder), stored.values(), strict=True):
        full = published.get(name, name)
        if full not in outside and not full.startswith(table.base_prefix):
            full = table.base_prefix + full
        within = block.match(full)
        if within and full[within.end() :] in table.buffers:
            continue
        if not is_same_tensor(named.setdefault(full, place), place):
            raise UserError(
                f"{folder}: {full} is stored under two names, with and without '{table.base_prefix}', and "
                f"the two differ; delete the wrong one"
            )
    if tied and table.head in named:
        place = named.pop(table.head)
        if not is_same_tensor(named.setdefault(table.embedding, place), place):
            raise UserError(
                f"{folder}: {table.head} and {table.embedding} differ; set tie_word_embeddings to false in "
                f"config.json"
            )
    return named


def take_text_tensors(stored: dict[str, Stored], table: Architecture) -> dict[str, Stored]:
    """Return the tensors in `stored` that are the language model's in a wrapper with encoders of images or
    sound, under the names that they have without the wrapper."""
    outside = tuple(name for names in table.parts.values() for name in names)
    blocks = table.block.partition("{i}")[0]
    plain = {name: name.replace("language_model.", "", 1) for name in stored}
    kept = {name for name in plain.values() if name in outside or name.startswith(blocks)}
    if own := {short for name, short in plain.items() if short != name}:
        kept &= own | set(outside)  # an encoder can have blocks of the same name
    return {plain[name]: place for name, place in stored.items() if plain[name] in kept}


def split_model_tensors(stored: dict[str, Stored], pieces: Pieces) -> None:
    """Replace the model's tensors in `stored` by those of a published checkpoint.

    A training checkpoint holds the model's tensors, such as one of all experts."""
    for name, (shape, parts) in pieces.items():
        if name in stored and name not in parts and stored[name].shape == shape and stored[name].dtype:
            whole, position = stored.pop(name), 0
            for part, part_shape in parts.items():
                count = math.prod(part_shape)
                stored[part] = Stored(part_shape, whole.dtype, cut_extents(whole.extents, position, count))
                position += count


def join_model_tensors(stored: dict[str, Stored], pieces: Pieces) -> None:
    """Add to `stored` the model's tensors that a published checkpoint holds in parts or by another name."""
    for name, (shape, parts) in pieces.items():
        if name not in parts:
            places = [stored[part] for part in parts]
            extents = tuple(extent for place in places for extent in place.extents)
            stored[name] = Stored(shape, places[0].dtype, extents)
