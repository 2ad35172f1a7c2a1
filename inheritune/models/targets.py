"""What surgery writes: a checkpoint whose tensors each have an `Origin`, and the manifest that lists them.

The manifest, inherited.json, lists each tensor as copied (from which file, with which hash) or fresh (how),
and is written last. A target appears under its name whole or not at all.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.data.tokenizer_files import copy_tokenizer
from inheritune.errors import UserError
from inheritune.files import json_files, markers, storage, writing
from inheritune.files.markers import INHERITED
from inheritune.files.outputs import check_new_folder, resolve_output
from inheritune.models.architectures import Shape
from inheritune.models.config_files import copy_settings
from inheritune.models.dtypes import Dtype
from inheritune.models.extents import describe_not_finite
from inheritune.models.networks import list_checkpoint_shapes, takes_token_types
from inheritune.models.sources import Source, open_source
from inheritune.models.writer import write_checkpoint
from inheritune.runtime.log import logger

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

SPARE_BYTES = 16 << 20  # for headers, configs and tokenizer files


@dataclass(frozen=True)
class Origin:
    """Where one tensor of a target comes from: `name` in `source`, or a fresh value (source None)."""

    dtype: Dtype
    """How the target stores it."""
    source: Source | None = None
    name: str = ""
    fused: int = 0
    """0: the whole tensor. Else its first entries in every dimension, as many as the target has, where the
    last dimension is `fused` matrices side by side (queries, keys, values), each cut alike."""

    def read_value(self, shape: Shape) -> "torch.Tensor | Iterator[memoryview]":
        """Read the value from the source, cut to `shape` if it is to be cut.

        The value is blocks of bytes where these are only copied."""
        source = self.source
        assert source is not None, "a fresh tensor has no source to read"
        if not self.fused and source.dtype(self.name) == self.dtype:
            blocks = source.blocks(self.name)
            if blocks is not None:
                return blocks
        tensor = source.tensor(self.name)
        if self.fused:
            corner = (*shape[:-1], self.fused, shape[-1] // self.fused)
            tensor = tensor.unflatten(-1, (self.fused, -1))[tuple(map(slice, corner))].flatten(-2)
        return tensor.to(self.dtype.torch)


def write_target(
    out: str | Path,
    config: "PreTrainedConfig",
    origins: Mapping[str, Origin],
    about: dict,
    seed: int = 0,
    beside: Path | None = None,
) -> dict:
    """Write the checkpoint that `origins` describes, with its manifest; returns the manifest.

    `about` is what the manifest says besides its tensors and files. An `out` with the same `about` is left as
    it is. Tokenizer files and generation settings are copied from the folder `beside`."""
    about = json.loads(json.dumps(about))  # as it will be read again: tuples are lists
    out = resolve_output(out)
    if finished := _find_finished(out, about):
        print(f"{out} is already complete")
        _warn_of_not_finite(out, finished)
        return finished
    check_new_folder(out)
    shapes = list_checkpoint_shapes(config)
    _check_shapes(origins, shapes)
    specs = {name: (shape, origins[name].dtype) for name, shape in shapes.items()}
    need = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    storage.check_free_space(out, need + SPARE_BYTES, str(out))

    def make_tensor(name: str) -> "torch.Tensor | Iterator[memoryview]":
        origin = origins[name]
        if origin.source:
            return origin.read_value(shapes[name])
        from inheritune.models.initialization import make_fresh_tensor

        return make_fresh_tensor(name, shapes[name], config, seed).to(origin.dtype.torch)

    with writing.replace_atomically(out, new=True) as folder:
        folder.mkdir(parents=True)
        written = write_checkpoint(folder, config, specs, make_tensor)
        if beside:
            copied = copy_tokenizer(beside, folder, token_types=takes_token_types(config))
            copied += copy_settings(beside, folder)
            written["files"] |= markers.hash_folder(folder, only=copied)
        tensors = {
            name: _describe_tensor(origin, written["tensors"][name]["xxh3"], seed, shapes[name])
            for name, origin in origins.items()
        }
        bad = {name: row["not_finite"] for name, row in written["tensors"].items() if row["not_finite"]}
        manifest = {**about, "not_finite": bad, "tensors": tensors, "files": written["files"]}
        json_files.write_json(folder / INHERITED, manifest)
    _warn_of_not_finite(out, manifest)
    return manifest


def _describe_tensor(origin: Origin, xxh3: str, seed: int, shape: Shape) -> dict:
    """Return the manifest's row of one tensor.

    `xxh3` is the hash of the target's bytes, which are the source's unless the tensor was cast or cut."""
    if origin.source is None:
        return {"fresh": f"fresh_tensor with seed {seed}, as in the random model of this depth", "xxh3": xxh3}
    row = {
        "file": str(origin.source.folder / origin.source.file_of(origin.name)),
        "tensor": origin.name,
        "xxh3": xxh3,
    }
    stored, whole = origin.source.dtype(origin.name), origin.source.shape(origin.name)
    if whole != shape:
        parts = f", in each of {origin.fused} parts" if origin.fused > 1 else ""
        row["cut"] = f"the first {list(shape)} of {list(whole)}{parts}"
    return {"copied": row if stored == origin.dtype else {**row, "cast": f"{stored} to {origin.dtype}"}}


# --- checks -------------------------------------------------------------------------------------------------


def _find_finished(out: Path, about: dict) -> dict | None:
    """Return the manifest in `out` if it is the same surgery, whole, or None if `out` is free.

    Raises UserError if `out` holds something else."""
    if not out.is_dir() or not any(out.iterdir()):
        return None
    manifest = json_files.read_json(out / INHERITED) if (out / INHERITED).is_file() else {}
    differing = sorted(key for key, value in about.items() if manifest.get(key) != value)
    if differing:
        what = f"another surgery (its {differing[0]} differs)" if manifest else "something else"
        raise UserError(f"{out} already holds {what}; choose another folder, or delete it")
    markers.check_files(out, manifest["files"])
    return manifest


def _check_shapes(origins: Mapping[str, Origin], shapes: Mapping[str, Shape]) -> None:
    """Raise UserError if a tensor that is copied whole has another shape in its source."""
    for name, origin in origins.items():
        if origin.source and not origin.fused and origin.source.shape(origin.name) != shapes[name]:
            raise UserError(
                f"{name} needs shape {shapes[name]}, but the source's {origin.name} has "
                f"{origin.source.shape(origin.name)}"
            )


def _warn_of_not_finite(out: Path, manifest: dict) -> None:
    """Log a warning if tensors of `out`, which `manifest` describes, hold nan or inf."""
    counts = manifest.get("not_finite", {})
    if not counts:
        return
    rows = [manifest["tensors"].get(name, {}).get("copied", {}) for name in counts]
    cast = next((row["cast"] for row in rows if "cast" in row), None)
    how = f"cast {cast}, whose range may be too small for them" if cast else "copied as they are"
    logger.warning("%s: %s; %s, but no run can start from them", out, describe_not_finite(counts), how)


def check_start(folder: Path) -> None:
    """Raise UserError if a checkpoint that surgery wrote to `folder` has changed, or holds nan or inf.

    Nothing can be trained from such values."""
    markers.check_marked_folder(folder)
    counts = json_files.read_json(folder / INHERITED).get("not_finite")
    if counts is None:  # written by a version that did not count them
        open_source(folder, check=False).check_finite()
    if counts:
        raise UserError(
            f"{folder}: {describe_not_finite(counts)}; repair the source they come from, delete this folder "
            f"and start again"
        )
