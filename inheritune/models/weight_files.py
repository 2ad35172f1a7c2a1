"""The weight files of a Hugging Face folder: safetensors headers, and shards listed in an index.

Only headers are read here; extents.py reads the data.
"""

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

from inheritune.errors import UserError
from inheritune.files import json_files
from inheritune.models.architectures import Shape
from inheritune.models.dtypes import DTYPES
from inheritune.models.extents import Extent, Stored

WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""(stem, suffix) of the names of weight files, in order of preference."""
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


def list_weight_patterns(stem: str, suffix: str) -> list[str]:
    """Return the names of the weights of one kind (of WEIGHTS) on the Hub: whole, or shards with an index."""
    return [f"{stem}{suffix}", f"{stem}-*-of-*{suffix}", f"{stem}{suffix}.index.json"]


# --- safetensors --------------------------------------------------------------------------------------------

Entry = tuple[str, Shape, int, int]
"""(code of the dtype, shape, first byte, byte after the last) of one tensor in a header."""


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Read where the tensors of one safetensors file (8 bytes of length, JSON header, data) are stored.

    Raises UserError if the file is cut off or its header cannot be true."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):  # before anything of that length is allocated
            raise UserError(
                f"{path} is cut off or no safetensors file: {size} bytes, header of {length}; download it "
                f"again"
            )
        entries = _parse_header(file.read(length))
    if entries is None:
        raise UserError(f"{path} has a damaged safetensors header; download it again")
    stored, position = {}, 0
    for name, (code, shape, begin, end) in entries.items():
        dtype, count = DTYPES.get(code), math.prod(shape)
        if begin != position or end < begin or (dtype and end != begin + count * dtype.itemsize):
            raise UserError(f"{path} has a damaged safetensors header (tensor {name}); download it again")
        extents = (Extent(path, 8 + length + begin, count, dtype),) if dtype else ()
        stored[name] = Stored(shape, dtype, extents)
        position = end
    if size != 8 + length + position:
        raise UserError(
            f"{path} has {size} bytes, its header describes {8 + length + position}: cut off; download it "
            f"again"
        )
    return stored


def _parse_header(text: bytes) -> dict[str, Entry] | None:
    """Return {name: entry} of a safetensors header in the order of the data, or None if it is damaged."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        entries = dict(sorted(entries.items(), key=lambda entry: entry[1][2:]))
        is_valid = all(
            len(e) == 4 and type(e[0]) is str and all(type(n) is int and n >= 0 for n in (*e[1], *e[2:]))
            for e in entries.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entries if is_valid else None


# --- files of one folder ------------------------------------------------------------------------------------


def read_weight_files(
    folder: Path, stem: str, suffix: str, read: Callable[[Path], dict[str, Stored]]
) -> dict[str, Stored] | None:
    """Read where the tensors of `stem`.`suffix` are, or those of the shards listed in its index.

    `read` reads one file. Returns None if the folder has neither. Raises UserError for shards that are
    missing, not listed, or outside the folder."""
    single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    present = {p.name for p in folder.iterdir() if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\{suffix}", p.name)}
    is_indexed = index.exists()
    if not present and not is_indexed:
        return None
    if not is_indexed and not single.exists():
        raise UserError(f"{folder} has shards ({min(present)}) but no {index.name}; download the index too")
    places = _read_index(index) if is_indexed else {}
    names = set(places.values()) if is_indexed else {single.name}
    if present - names:
        raise UserError(
            f"{folder / min(present - names)} is not listed in {index.name}: two checkpoints are mixed; "
            f"remove one"
        )
    if not is_indexed:
        return read(single)
    shards = {name: read(folder / name) for name in sorted(names)}
    lost = [name for name, file in places.items() if name not in shards[file] and suffix == ".safetensors"]
    if lost:
        raise UserError(
            f"tensor {lost[0]} is not in {places[lost[0]]}, where {index} looks for it; download both again"
        )
    return {name: shards[file][name] for name, file in places.items() if name in shards[file]}


def _read_index(index: Path) -> dict[str, str]:
    """Return {tensor: file} of a weight index.

    Raises UserError if it is damaged or names files that are not in its folder."""
    raw = json_files.read_json(index)
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no 'weight_map' of tensor names to file names; restore it")
    folder, names = index.parent, set(places.values())
    outside = sorted(name for name in names if Path(name).name != name or name in ("", ".", ".."))
    if outside:
        raise UserError(
            f"{index} names '{outside[0]}', which is not a file of its own folder; do not use this checkpoint"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing); download it again"
        )
    return places
