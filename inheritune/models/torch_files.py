"""Files of torch.save, read without their data and without running code: .bin weights, DeepSpeed's states.

Nothing is unpickled freely. Classes of DeepSpeed that its checkpoints name are replaced by stand-ins, and
every other class outside torch's own list is refused.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from enum import Enum, IntEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from inheritune.errors import NoAccess, UserError, is_machine_limit
from inheritune.models.dtypes import find_dtype
from inheritune.models.extents import Extent, Stored


class _Plain:
    """Stands in for a class of DeepSpeed that a checkpoint names: keeps its attributes, runs nothing."""

    def __init__(self, *arguments: object):
        self.arguments = arguments


ZeroStage = IntEnum("ZeroStage", {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3})


def _read_member(kind: type, name: str) -> Enum:
    """Stand in for `getattr` in a pickle and return the member `name` of the enum `kind`.

    Python 3.11.0 to 3.11.3 write a member of an enum as getattr(its class, its name). Raises UnpicklingError
    for anything else, which would be a way to run code of the file's choice."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"GLOBAL builtins.getattr of {kind!r}")
    return kind[name]


_STANDINS: list[tuple[type, str]] = [
    (type("LossScaler", (_Plain,), {}), "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (type("DynamicLossScaler", (_Plain,), {}), "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (type("fragment_address", (_Plain,), {}), "deepspeed.utils.tensor_fragment.fragment_address"),
]
"""(stand-in, full name) of the classes of its own that DeepSpeed's optimizer shards name."""
_MEMBERS = (_read_member, "builtins.getattr")


def list_deepspeed_classes() -> list[Callable | tuple[Callable, str]]:
    """Return DeepSpeed's own classes that its checkpoints name, for `torch.serialization.safe_globals`."""
    names = [full.rpartition(".") for _, full in _STANDINS]
    return [*(getattr(import_module(module), name) for module, _, name in names), _MEMBERS]


def load_skeleton(path: Path, check: bool = False) -> Any:
    """Load the object in a torch file; its tensors have no data (device meta) but know their place in it.

    `check` reads the whole file and verifies the checksums that its parts have as those of a zip archive.
    Raises UserError if the file is damaged, in the format of torch < 1.6, or names a class outside the
    allowed ones."""
    try:
        with torch.serialization.safe_globals([*_STANDINS, _MEMBERS]):
            loaded = torch.load(path, map_location="meta", weights_only=True)
        if check and zipfile.is_zipfile(path):
            _check_sums(path)
        return loaded
    except PermissionError as error:  # the file may be sound
        raise NoAccess(path, error.strerror) from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError ... for the same damage
        if is_machine_limit(error):
            raise
        reason = " ".join(str(error).split())
        if unsafe := re.search(r"GLOBAL ([\w.]+)", reason):
            raise UserError(
                f"{path} asks to run {unsafe[1]} while it is read, which is refused; use safetensors"
            ) from None
        raise UserError(
            f"{path} cannot be read as a torch file ({reason[:150]}); cut off or damaged: copy it again"
        ) from None


def _check_sums(path: Path) -> None:
    """Raise ValueError if a part of the zip archive has another checksum than is stored."""
    with zipfile.ZipFile(path) as archive:
        # our own checkpoints have hashes in their marker, and zeros for checksums
        has_sums = any(part.CRC for part in archive.infolist())
        if has_sums and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")


def locate_tensor(path: Path, tensor: torch.Tensor) -> Extent:
    """Return the byte range of a tensor that `load_skeleton(path)` returned. Raises UserError without one."""
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if place is None or not tensor.is_contiguous():
        what = "the format of torch before 1.6" if place is None else "a transposed tensor"
        raise UserError(
            f"{path} holds {what}; open it with transformers and save it again with save_pretrained"
        )
    dtype = find_dtype(tensor.dtype)
    if dtype is None:
        raise UserError(f"{path} holds a tensor of {tensor.dtype}; only float weights can be sliced")
    return Extent(path, place + tensor.storage_offset() * tensor.element_size(), tensor.numel(), dtype)


def read_bin(path: Path) -> dict[str, Stored]:
    """Read where the tensors of one pytorch_model*.bin are stored.

    Those not of floats (GPT-2's old masks) are left out. Raises UserError as `load_skeleton` does."""
    loaded = load_skeleton(path, check=True)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a mapping of names to tensors")
    floats = {n: t for n, t in loaded.items() if isinstance(t, torch.Tensor) and find_dtype(t.dtype)}
    return {
        name: Stored(tuple(t.shape), find_dtype(t.dtype), (locate_tensor(path, t),))
        for name, t in floats.items()
    }
