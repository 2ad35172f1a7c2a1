"""Checkpoints to read from: a folder or a Hub id, opened by its headers, read tensor by tensor.

`open_source(path)` reads headers only; `Source.tensor(name)` then reads that tensor's bytes and nothing else.
The formats have modules of their own: weight_files.py (safetensors), torch_files.py (.bin) and
deepspeed_files.py (ZeRO). writer.py writes checkpoints.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune.config.source_shape import refuse_adapter, refuse_revision
from inheritune.errors import UserError
from inheritune.files import markers
from inheritune.files.json_files import read_json
from inheritune.files.markers import COMPLETE
from inheritune.models.architectures import Shape, find_architecture
from inheritune.models.checkpoint_names import (
    join_model_tensors,
    normalize_names,
    split_model_tensors,
    take_text_tensors,
)
from inheritune.models.config_files import load_config
from inheritune.models.downloads import download_model
from inheritune.models.dtypes import DTYPES, Dtype
from inheritune.models.extents import (
    Stored,
    count_not_finite,
    describe_not_finite,
    read_blocks,
    read_tensor,
    view_bytes,
)
from inheritune.models.gguf_files import convert_gguf, find_gguf
from inheritune.models.networks import list_model_shapes
from inheritune.models.weight_files import WEIGHTS, read_safetensors, read_weight_files

if TYPE_CHECKING:
    import torch

MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")
"""Of the files of a published model that are read or copied."""


class Source:
    """A checkpoint whose tensors are read one by one, under the names of published checkpoints of its family.

    Where the model keeps several of them in one tensor (Mixtral's experts), or under another name, the
    model's name works too.

    origin: the folder's absolute path or the Hub id; revision: the Hub's commit, or None; kind: safetensors,
    bin or deepspeed; folder: where the weights are; config: the transformers configuration."""

    def __init__(
        self,
        origin: str,
        revision: str | None,
        folder: Path,
        config_path: Path,
        kind: str,
        stored: dict[str, Stored],
        plain: bool = False,
    ):
        self.origin, self.revision, self.kind = origin, revision, kind
        self.folder, self.config_path = folder, config_path
        self.config = load_config(config_path, plain)
        self.config_hash = markers.hash_file(config_path)
        self.table = find_architecture(self.config)
        pieces = {
            name: (shape, self.table.in_checkpoint(name, shape))
            for name, shape in list_model_shapes(self.config, config_path).items()
        }
        shapes = {part: shape for _, parts in pieces.values() for part, shape in parts.items()}
        if "text_config" in read_json(config_path):
            stored = take_text_tensors(stored, self.table)
        self._stored = normalize_names(stored, self.table, self.config.tie_word_embeddings, folder)
        split_model_tensors(self._stored, pieces)
        self._check_tensors(shapes)
        self._names = list(shapes)
        join_model_tensors(self._stored, pieces)

    def _check_tensors(self, shapes: dict[str, Shape]) -> None:
        """Raise UserError unless the tensors are those of `shapes`, and of floats."""
        missing = [name for name in shapes if name not in self._stored]
        extra = [name for name in self._stored if name not in shapes]
        n = getattr(self.config, self.table.layers)
        if missing:
            raise UserError(
                f"{self.folder} lacks tensor {missing[0]} (and {len(missing) - 1} more); {self.config_path} "
                f"describes {n} layers"
            )
        if extra:
            raise UserError(
                f"{self.folder} holds {extra[0]} (and {len(extra) - 1} more), unknown to {self.config_path} "
                f"of {n} layers"
            )
        for name, shape in shapes.items():
            if self._stored[name].dtype is None:
                raise UserError(
                    f"tensor {name} in {self.folder} is not of floats ({', '.join(DTYPES)}); use unquantized "
                    f"weights"
                )
            if self._stored[name].shape != shape:
                where = f"tensor {name} in {self.folder / self.file_of(name)}"
                raise UserError(
                    f"{where} has shape {self._stored[name].shape}, but config.json implies {shape}; put the "
                    f"config of these weights beside them"
                )

    def names(self) -> list[str]:
        """Return all tensors, in the model's order. A tied head is not listed: it is the token embedding."""
        return list(self._names)

    def _at(self, name: str) -> Stored:
        """Return where the tensor is stored. Raises UserError if there is no such tensor."""
        if name == self.table.head and self.config.tie_word_embeddings:
            name = self.table.embedding
        if name not in self._stored:
            raise UserError(f"{self.folder} has no tensor {name}")
        return self._stored[name]

    def shape(self, name: str) -> Shape:
        """Return the shape of `tensor(name)`."""
        return self._at(name).shape

    def dtype(self, name: str) -> Dtype:
        """Return the dtype of `tensor(name)`: as stored, fp32 for a DeepSpeed checkpoint."""
        dtype = self._at(name).dtype
        assert dtype is not None, f"{name} was not checked on opening"
        return dtype

    def file_of(self, name: str) -> str:
        """Return the name of the file with the tensor's bytes, or of several ranks' files their pattern."""
        files = sorted({extent.file.name for extent in self._at(name).extents})
        return files[0] if len(files) == 1 else re.sub(r"pp_rank_\d+", "pp_rank_*", files[0])

    def files(self) -> dict[str, dict]:
        """Return {name: {bytes, mtime_ns}} of the weight files: a source that is written anew has others."""
        paths = sorted({extent.file for stored in self._stored.values() for extent in stored.extents})
        stats = {path: path.stat() for path in paths}
        return {
            path.name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for path, stat in stats.items()
        }

    def tensor(self, name: str) -> "torch.Tensor":
        """Read the tensor from its own bytes only. Raises UserError if the file has shrunk meanwhile."""
        return read_tensor(self._at(name))

    def finite_tensor(self, name: str) -> "torch.Tensor":
        """Read `tensor(name)`. Raises UserError if it holds nan or inf: nothing can be computed with it."""
        tensor, dtype = self.tensor(name), self.dtype(name)
        if bad := count_not_finite(view_bytes(tensor), dtype):
            raise UserError(
                f"{self.folder}: {describe_not_finite({name: bad})}; restore the checkpoint or use another "
                f"one"
            )
        return tensor

    def check_finite(self) -> None:
        """Read all tensors; raise UserError naming the first one that holds nan or inf."""
        for name in self.names():
            self.finite_tensor(name)

    def blocks(self, name: str) -> Iterator[memoryview] | None:
        """Return `read_blocks` of the tensor, or None if a part of it is stored in another dtype."""
        stored = self._at(name)
        return read_blocks(stored) if all(extent.dtype == stored.dtype for extent in stored.extents) else None


# --- opening ------------------------------------------------------------------------------------------------


def open_source(
    path_or_id: str | Path, revision: str | None = None, check: bool = True, plain: bool = False
) -> Source:
    """Open a folder of Hugging Face or DeepSpeed weights, a GGUF file, or a Hub id (downloaded or cached).

    Only headers are read. A folder that this program wrote is compared with its hashes, unless `check` is
    False because one rank did so for all; torch files are compared with their checksums. `plain` says that
    whole tensors will be copied, for which the table can stand in for transformers (`load_config`). Raises
    UserError if there is no such folder or model, if files are missing, cut off, damaged, left over or
    unsafe, or if the tensors are not those that the config describes."""
    folder = Path(path_or_id).expanduser()
    origin, commit = str(folder.absolute()), None
    if gguf := find_gguf(folder):
        folder = convert_gguf(gguf)
    if folder.is_file():
        raise UserError(f"source '{path_or_id}' is a file; give the folder that holds it and config.json")
    if not folder.is_dir():
        folder = download_model(str(path_or_id), revision)
        origin, commit = str(path_or_id), folder.name  # the folder of a snapshot has the commit as its name
    else:
        refuse_revision(revision, folder)
    if check:
        markers.check_marked_folder(folder)
    _refuse_broken_links(folder)
    kind, weights, config_path, stored = _read_any_kind(folder)
    _check_links(weights, stored)
    return Source(origin, commit, weights, config_path, kind, stored, plain)


def _find_reader(suffix: str) -> Callable[[Path], dict[str, Stored]]:
    """Return what reads where the tensors of a file of weights are."""
    if suffix == ".safetensors":
        return read_safetensors

    def read(path: Path) -> dict[str, Stored]:
        from inheritune.models.torch_files import read_bin

        return read_bin(path)

    return read


def _read_any_kind(folder: Path) -> tuple[str, Path, Path, dict[str, Stored]]:
    """Return (kind, folder of the weights, config.json, tensors) of a folder.

    Raises UserError if it holds no weights."""
    for stem, suffix in WEIGHTS:
        stored = read_weight_files(folder, stem, suffix, _find_reader(suffix))
        if stored is not None:
            return suffix.removeprefix("."), folder, folder / "config.json", stored
    from inheritune.models.deepspeed_files import find_tag_folder

    if tag := find_tag_folder(folder):
        config_folder = tag if (tag / "config.json").is_file() else folder
        return "deepspeed", tag, config_folder / "config.json", _read_tag(folder, tag)
    refuse_adapter(folder)
    hint = f"; did you mean {folder / 'final'}?" if (folder / "final").is_dir() else ""
    raise UserError(
        f"{folder} holds no weights (model.safetensors, pytorch_model.bin or a DeepSpeed checkpoint){hint}"
    )


def _read_tag(folder: Path, tag: Path) -> dict[str, Stored]:
    """Read the DeepSpeed checkpoint in `tag`, a folder in `folder` or `folder` itself."""
    is_marked = (folder / COMPLETE).is_file()
    if folder.parent.name == "checkpoints" and folder.name.startswith("step_") and not is_marked:
        raise UserError(
            f"{folder} has no COMPLETE marker: its saving was interrupted; use an earlier checkpoint"
        )
    from inheritune.models.deepspeed_files import read_deepspeed

    try:
        return read_deepspeed(tag, check=not is_marked)  # the hashes of a marked folder have been checked
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{tag} does not hold what DeepSpeed's engine saves ({what}); use another checkpoint"
        ) from None


def _refuse_broken_links(folder: Path) -> None:
    """Raise UserError for a link to a file that is gone, as where the Hub's cache was cleaned in part."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and path.suffix in MODEL_SUFFIXES:
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; restore it or download the "
                f"model again"
            )


def _check_links(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise UserError if a weight file is a link to a place outside `folder`."""
    place = folder.resolve()
    if place.parent.name == "snapshots":  # the Hub's cache links to blobs/ beside snapshots/
        place = place.parent.parent
    for path in {extent.file for where in stored.values() for extent in where.extents}:
        if not path.resolve().is_relative_to(place):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside its folder; put the file itself there"
            )
