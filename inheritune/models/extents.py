"""Tensors as byte ranges of files, and reading their elements.

Every checkpoint format comes down to this description: a tensor is a shape, a dtype and a few byte ranges
(`Extent`) of files. There is one range in safetensors and .bin files, and one per rank and sub-group in a
ZeRO checkpoint. Nothing is mapped into memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inheritune.errors import UserError
from inheritune.models.architectures import Shape
from inheritune.models.dtypes import Dtype

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 1 << 21
"""Bytes of a tensor that are copied at a time; half a megabyte to a few, a processor's cache, did equally
well."""


@dataclass(frozen=True)
class Extent:
    """`count` elements of `dtype` at byte `offset` of `file`."""

    file: Path
    offset: int
    count: int
    dtype: Dtype


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: its extents, concatenated, are its elements in row-major order."""

    shape: Shape
    dtype: Dtype | None
    """None for a tensor that is not of floats. It is either a buffer, which nothing reads, or refused."""
    extents: tuple[Extent, ...]


def cut_extents(extents: Sequence[Extent], start: int, count: int) -> tuple[Extent, ...]:
    """Return elements [start, start + count) of the concatenation of `extents`.

    Raises UserError if there are fewer."""
    pieces, wanted = [], count
    for extent in extents:
        if wanted and start < extent.count:
            n = min(extent.count - start, wanted)
            pieces.append(Extent(extent.file, extent.offset + start * extent.dtype.itemsize, n, extent.dtype))
            wanted -= n
        start = max(0, start - extent.count)
    if wanted:
        where = extents[0].file.parent if extents else "the checkpoint"
        raise UserError(
            f"{where}: {wanted} elements of a parameter are missing; the checkpoint is incomplete, use "
            f"another one"
        )
    return tuple(pieces)


def read_tensor(stored: Stored) -> "torch.Tensor":
    """Read a tensor's elements into one buffer of its size. Raises UserError if a file is too short."""
    import torch

    assert stored.dtype is not None, "a tensor that is not of floats is never read"
    result = torch.empty(stored.shape, dtype=stored.dtype.torch)
    flat, position = result.view(-1), 0
    for extent in stored.extents:
        target = flat[position : position + extent.count]
        piece = (
            target if extent.dtype == stored.dtype else torch.empty(extent.count, dtype=extent.dtype.torch)
        )
        with open(extent.file, "rb") as file:
            file.seek(extent.offset)
            if file.readinto(view_bytes(piece).data) != extent.count * extent.dtype.itemsize:
                raise UserError(f"{extent.file} is cut off; copy it again")
        if piece is not target:
            target.copy_(piece)
        position += extent.count
    return result


def read_blocks(stored: Stored) -> Iterator[memoryview]:
    """Yield a tensor's bytes as they are stored, in blocks of whole elements, all in one small buffer.

    Use each block before asking for the next. A block that was just read is still in the processor's cache,
    where hashing and writing it cost little. Raises UserError if a file is too short."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for extent in stored.extents:
        left = extent.count * extent.dtype.itemsize
        with open(extent.file, "rb", buffering=0) as file:
            file.seek(extent.offset)
            while left:
                size = min(left, BLOCK_BYTES)
                count = file.readinto(buffer[:size])
                while 0 < count < size and (more := file.readinto(buffer[count:size])):  # whole elements
                    count += more
                if count < size:
                    raise UserError(f"{extent.file} is cut off; copy it again")
                yield buffer[:size]
                left -= size


def view_bytes(tensor: "torch.Tensor") -> np.ndarray:
    """Return the bytes of a contiguous CPU tensor as a numpy array that shares its memory."""
    import torch

    data: np.ndarray = tensor.view(-1).view(torch.uint8).numpy()
    return data


def is_same_tensor(one: Stored, other: Stored) -> bool:
    """Return whether two stored tensors are one, or hold the same bytes."""
    if one == other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if all([extent.dtype for extent in stored.extents] == [stored.dtype] for stored in (one, other)):
        pairs = zip(read_blocks(one), read_blocks(other), strict=True)
        return all(np.array_equal(np.frombuffer(a, "u1"), np.frombuffer(b, "u1")) for a, b in pairs)
    return bool(np.array_equal(view_bytes(read_tensor(one)), view_bytes(read_tensor(other))))


# --- values that are no numbers -----------------------------------------------------------------------------


def count_not_finite(data: memoryview | bytes | np.ndarray, dtype: Dtype) -> int:
    """Return how many of the floats of `dtype` in the buffer `data` are nan or inf.

    Their bits are at or above those of inf, of either sign: two maxima of integers find none at the speed of
    reading."""
    size, infinity = dtype.itemsize, dtype.infinity
    bits, sign = np.frombuffer(data, f"u{size}"), 1 << (8 * size - 1)
    if not bits.size or (bits.view(f"i{size}").max() < infinity and bits.max() < sign + infinity):
        return 0
    return int(np.count_nonzero((bits & infinity) == infinity))


def describe_not_finite(counts: dict[str, int]) -> str:
    """Describe {tensor: number of values that are nan or inf} in a clause."""
    (name, count), *others = counts.items()
    more = f", and {len(others)} more tensor(s) have some" if others else ""
    return f"tensor {name} has {count} value(s) that are nan or inf{more}"
