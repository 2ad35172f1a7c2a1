"""Checkpoints on disk: lazy tensors from safetensors, .bin and DeepSpeed ZeRO files (writer.py is the way
back).

`open_source(path)` reads headers only; `Source.tensor(name)` then reads that tensor's bytes and nothing else.
All three kinds come down to one description: a tensor is a shape, a dtype and a few byte ranges (`Extent`) of
files, one range in safetensors and .bin, one per rank and sub-group in a ZeRO checkpoint. Nothing is mapped
into memory and nothing is unpickled freely.
"""

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum, IntEnum
from importlib import import_module
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from inheritune.data.tokenizer_files import FILES
from inheritune.errors import UserError
from inheritune.files import rundir
from inheritune.files.hub import gate
from inheritune.models.architectures import (
    Architecture,
    Shape,
    architecture,
    count_not_finite,
    load_config,
    model_shapes,
    strip_wrappers,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COMMON_FILES = ["config.json", "generation_config.json", "adapter_config.json", *FILES]
"""Patterns of the files that are wanted beside the weights."""
WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BLOCK_BYTES = (
    1 << 21
)  # of a tensor that is copied: half a megabyte to a few, a processor's cache, did equally well


@dataclass(frozen=True)
class Extent:
    """`count` elements of `dtype` at byte `offset` of `file`."""

    file: Path
    offset: int
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its extents, one after the other, are its elements in row-major order."""

    shape: Shape
    dtype: torch.dtype | None
    """None for what is no float: such a tensor is either a buffer, which nobody reads, or refused."""
    extents: tuple[Extent, ...]


def cut(extents: list[Extent], start: int, count: int) -> tuple[Extent, ...]:
    """Elements [start, start + count) of the concatenation of `extents`. Raises UserError if there are not so
    many."""
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


# --- safetensors --------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The header of one safetensors file (8 bytes of length, JSON, data), checked against the file's size.

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
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()
            }
            entries = dict(sorted(entries.items(), key=lambda entry: entry[1][2:]))
            numbers_ok = all(
                len(e) == 4 and type(e[0]) is str and all(type(n) is int and n >= 0 for n in (*e[1], *e[2:]))
                for e in entries.values()
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            numbers_ok = False
    if not numbers_ok:
        raise UserError(f"{path} has a damaged safetensors header; download it again")
    stored, position = {}, 0
    for name, (code, shape, begin, end) in entries.items():
        dtype, count = DTYPES.get(code), math.prod(shape)
        if begin != position or end < begin or (dtype and end != begin + count * dtype.itemsize):
            raise UserError(f"{path} has a damaged safetensors header (tensor {name}); download it again")
        stored[name] = Stored(
            shape, dtype, (Extent(path, 8 + length + begin, count, dtype),) if dtype else ()
        )
        position = end
    if size != 8 + length + position:
        raise UserError(
            f"{path} has {size} bytes, its header describes {8 + length + position}: cut off; download it "
            f"again"
        )
    return stored


# --- torch files --------------------------------------------------------------------------------------------


class _Plain:
    """Stands in for a class of DeepSpeed's that a checkpoint names and we do not need: keeps its attributes,
    runs nothing."""

    def __init__(self, *arguments):
        self.arguments = arguments


ZeroStage = IntEnum("ZeroStage", {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3})


def _read_member(kind: type, name: str) -> Enum:
    """Stands in for `getattr` in a pickle: Python 3.11.0 to 3.11.3 write a member of an enum as getattr(its
    class, its name).

    Raises UnpicklingError for anything else, which would be a way to run code of the file's choice."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"GLOBAL builtins.getattr of {kind!r}")
    return kind[name]


# DeepSpeed's optimizer shards name a few classes of its own. The unpickler gets stand-ins, so that no code of
# the file's choice runs.
_STANDINS = [
    (type("LossScaler", (_Plain,), {}), "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (type("DynamicLossScaler", (_Plain,), {}), "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (type("fragment_address", (_Plain,), {}), "deepspeed.utils.tensor_fragment.fragment_address"),
]
_MEMBERS = (_read_member, "builtins.getattr")


def deepspeed_classes() -> list:
    """Return DeepSpeed's own classes that its checkpoints name, for `torch.serialization.safe_globals`."""
    return [
        getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for _, name in _STANDINS
    ] + [_MEMBERS]


def load_skeleton(path: Path, check: bool = False):
    """The object in a torch file, its tensors without data (device meta) but knowing their place in the file;
    `check` reads it all, for the checksums that its parts have as those of a zip archive.

    Raises UserError if the file is damaged, in the format of torch < 1.6, or asks for a class outside the
    allowed ones."""
    try:
        with torch.serialization.safe_globals([*_STANDINS, _MEMBERS]):
            loaded = torch.load(path, map_location="meta", weights_only=True)
        with zipfile.ZipFile(path) if check and zipfile.is_zipfile(path) else nullcontext() as archive:
            # our own checkpoints have hashes in their marker, and zeros for checksums
            has_sums = archive and any(part.CRC for part in archive.infolist())
            if damaged := has_sums and archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        return loaded
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError ... for one and the same damage
        reason = " ".join(str(error).split())
        if unsafe := re.search(r"GLOBAL ([\w.]+)", reason):
            raise UserError(
                f"{path} asks to run {unsafe[1]} while it is read, which is refused; use safetensors"
            ) from None
        raise UserError(
            f"{path} cannot be read as a torch file ({reason[:150]}); cut off or damaged: copy it again"
        ) from None


def _extent(path: Path, tensor: torch.Tensor) -> Extent:
    """The byte range of a tensor that `load_skeleton(path)` gave."""
    place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if place is None or not tensor.is_contiguous():
        what = "the format of torch before 1.6" if place is None else "a transposed tensor"
        raise UserError(
            f"{path} holds {what}; open it with transformers and save it again with save_pretrained"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise UserError(f"{path} holds a tensor of {tensor.dtype}; only float weights can be sliced")
    return Extent(path, place + tensor.storage_offset() * tensor.element_size(), tensor.numel(), tensor.dtype)


def read_bin(path: Path) -> dict[str, Stored]:
    """The tensors of one pytorch_model*.bin; what is no float tensor (GPT-2's old masks) is left out."""
    loaded = load_skeleton(path, check=True)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a mapping of names to tensors")
    floats = {n: t for n, t in loaded.items() if isinstance(t, torch.Tensor) and t.dtype in DTYPE_NAMES}
    return {name: Stored(tuple(t.shape), t.dtype, (_extent(path, t),)) for name, t in floats.items()}


# --- one folder of Hugging Face weights ---------------------------------------------------------------------


def _read_folder(
    folder: Path, stem: str, suffix: str, read: Callable[[Path], dict[str, Stored]]
) -> dict[str, Stored] | None:
    """Tensors of `stem`.`suffix`, or of the shards listed in its index; None if the folder has neither."""
    single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    present = {p.name for p in folder.iterdir() if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\{suffix}", p.name)}
    if not present and not index.exists():
        return None
    if single.exists() and not index.exists():
        places, names = None, {single.name}
    elif index.exists():
        places = rundir.read_json(index)
        places = places.get("weight_map") if isinstance(places, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index} has no 'weight_map' of tensor names to file names; restore it")
        names = set(places.values())
        outside = sorted(name for name in names if Path(name).name != name or name in ("", ".", ".."))
        if outside:
            raise UserError(
                f"{index} names '{outside[0]}', which is not a file of its own folder; do not use this "
                f"checkpoint"
            )
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise UserError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing); download it "
                f"again"
            )
    else:
        raise UserError(f"{folder} has shards ({min(present)}) but no {index.name}; download the index too")
    if present - names:
        raise UserError(
            f"{folder / min(present - names)} is not listed in {index.name}: two checkpoints are mixed; "
            f"remove one"
        )
    shards = {name: read(folder / name) for name in sorted(names)}
    if places is None:
        return shards[single.name]
    lost = [name for name, file in places.items() if name not in shards[file] and suffix == ".safetensors"]
    if lost:
        raise UserError(
            f"tensor {lost[0]} is not in {places[lost[0]]}, where {index} looks for it; download both again"
        )
    return {name: shards[file][name] for name, file in places.items() if name in shards[file]}


# --- DeepSpeed ----------------------------------------------------------------------------------------------


def _tag_folder(folder: Path) -> Path | None:
    """The folder of DeepSpeed's files: `folder` or, one level down, the tag named by `latest` or the only
    one."""
    if any(folder.glob("[!.]*_model_states.pt")):
        return folder
    tags = [p for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("[!.]*_model_states.pt"))]
    if (folder / "COMPLETE").is_file():  # of our own making: what was put beside its files is not ours
        listed = {name.partition("/")[0] for name in rundir.marked_files(folder / "COMPLETE")}
        tags = [tag for tag in tags if tag.name in listed]
    if (folder / "latest").is_file():
        latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if latest not in [p.name for p in tags]:
            raise UserError(
                f"{folder / 'latest'} names '{latest}', which holds no DeepSpeed files; give the tag's own "
                f"folder"
            )
        return folder / latest
    if len(tags) > 1:
        raise UserError(
            f"{folder} holds {len(tags)} DeepSpeed checkpoints, {tags[0].name} to {tags[-1].name}; name one"
        )
    return tags[0] if tags else None


def _rank_files(folder: Path, kind: str) -> list[Path]:
    """zero_pp_rank_<r>_mp_rank_00_<kind>_states.pt in the order of ranks, none missing."""
    ranks = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        match = re.fullmatch(rf"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_{kind}_states\.pt", path.name)
        if match and int(match[2]):
            raise UserError(
                f"{path} belongs to a model split by tensor parallelism, which is not supported; export it "
                f"first"
            )
        if match:
            ranks[int(match[1])] = path
    if sorted(ranks) != list(range(len(ranks))):
        gap = next(r for r in range(len(ranks)) if r not in ranks)
        raise UserError(
            f"{folder} lacks the {kind} states of rank {gap}; the checkpoint is incomplete, use another one"
        )
    return [ranks[r] for r in range(len(ranks))]


def read_deepspeed(folder: Path, what: str = "master", check: bool = False) -> dict[str, Stored]:
    """The fp32 masters in a folder that `engine.save_checkpoint` wrote, ZeRO 0 to 3, any number of ranks; at
    ZeRO 1 to 3 also (`what`) "exp_avg", "exp_avg_sq" and "step" of AdamW, of the trained parameters only.

    Frozen parameters have no master: at ZeRO 0 to 2 they lie in the module's state (DeepSpeed's own
    zero_to_fp32 loses them at ZeRO 1), at ZeRO 3 in fragments. Raises UserError for missing ranks, tensor
    parallelism and lost masters."""
    model_files = _rank_files(folder, "model") or [folder / "mp_rank_00_model_states.pt"]
    if not model_files[0].is_file():
        raise UserError(
            f"{folder} lacks {model_files[0].name}; the checkpoint is incomplete, use another one"
        )
    models = [load_skeleton(path, check) for path in model_files]
    if not isinstance(models[0], dict) or not isinstance(models[0].get("module"), dict):
        raise UserError(
            f"{model_files[0]} holds no whole model (pipeline parallelism is not supported); export it first"
        )
    groups, n_ranks = models[0].get("param_shapes"), models[0].get("dp_world_size")
    whole = {n: t for n, t in models[0]["module"].items() if t.dtype in DTYPE_NAMES and t.numel()}
    stored = {
        n: Stored(tuple(t.shape), torch.float32, (_extent(model_files[0], t),)) for n, t in whole.items()
    }
    if groups is None:  # ZeRO 0: the module itself is the master
        rounded = [name for name, tensor in whole.items() if tensor.element_size() < 4]
        if rounded:
            raise UserError(
                f"{folder} holds {rounded[0]} in half precision without its fp32 master; inherit from final/"
            )
        return stored

    optim_files = _rank_files(folder, "optim")
    states = [load_skeleton(path, check)["optimizer_state_dict"] for path in optim_files]
    stage = int(states[0].get("zero_stage", 1)) if states else 0
    for kind, files in (("optimizer", optim_files), ("model", model_files if stage == 3 else optim_files)):
        if len(files) != n_ranks:
            raise UserError(
                f"{folder} has the {kind} states of {len(files)} ranks, but {n_ranks} saved it; use another "
                f"one"
            )
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    if key not in states[0]:
        raise UserError(f"{folder} holds no fp32 masters ({key}); inherit from final/")
    vectors = [state[key] for state in states]
    if what != "master":
        kept = [state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for state in states]
        # one dict per flat group, in the order of the groups; a list of them where "elastic_checkpoint" is
        # set
        moments = [
            rank if isinstance(rank, list) else [rank["state"][g] for g in sorted(rank["state"])]
            for rank in kept
        ]
        if not all(rank and all(what in group for group in rank) for rank in moments):
            raise UserError(
                f"{folder} holds no {what} of AdamW: it was saved before the first step, or by another "
                f"optimizer"
            )
        if what == "step":  # one number per flat group, the same in all
            return {"step": Stored((), torch.float32, (_extent(optim_files[0], moments[0][0]["step"]),))}
        vectors = [[group[what] for group in rank] for rank in moments]
    parts = [[_extent(path, t) for t in vector] for path, vector in zip(optim_files, vectors, strict=True)]
    if what != "master":
        joined = {n: shape for group in groups for n, shape in group.items()}
        paddings = states[0].get("param_alignment_paddings")
        return _stage_3(joined, parts, folder) if stage == 3 else _stages_1_and_2(groups, parts, paddings)
    if stage == 3:
        trained = _stage_3({n: shape for group in groups for n, shape in group.items()}, parts, folder)
        fragments = [m["frozen_param_fragments"] or {} for m in models]
        frozen = [
            [_extent(path, t) for t in f.values()] for path, f in zip(model_files, fragments, strict=True)
        ]
        stored = trained | _stage_3(models[0]["frozen_param_shapes"] or {}, frozen, folder)
    else:
        stored |= _stages_1_and_2(groups, parts, states[0].get("param_alignment_paddings"))
    return stored | {name: stored[owner] for name, owner in models[0]["shared_params"].items()}


def _stage_3(shapes: dict[str, Shape], parts: list[list[Extent]], folder: Path) -> dict[str, Stored]:
    """Each parameter is cut into equal parts, the last one padded; a rank's parts follow each other through
    `parts[rank]`."""
    stored, position = {}, 0
    for name, shape in shapes.items():
        part = math.ceil(math.prod(shape) / len(parts))
        extents = [extent for rank in parts for extent in cut(rank, position, part)]
        stored[name] = Stored(tuple(shape), torch.float32, cut(extents, 0, math.prod(shape)))
        position += part
    if any(sum(extent.count for extent in rank) != position for rank in parts):
        raise UserError(
            f"{folder} is damaged: a rank's parts do not add up to {position} elements; use another "
            f"checkpoint"
        )
    return stored


def _stages_1_and_2(
    groups: list[dict], parts: list[list[Extent]], paddings: list | None
) -> dict[str, Stored]:
    """Each parameter group is one vector, parameter after parameter; `parts[rank]` has one partition of each
    vector."""
    stored = {}
    for g, group in enumerate(groups):
        vector, position = [rank[g] for rank in parts], 0
        for i, (name, shape) in enumerate(group.items()):
            stored[name] = Stored(tuple(shape), torch.float32, cut(vector, position, math.prod(shape)))
            position += math.prod(shape) + (paddings[g][i] if paddings else 0)
    return stored


# --- any source ---------------------------------------------------------------------------------------------


class Source:
    """A checkpoint whose tensors are read one by one, under the names of published checkpoints of its family;
    where the model keeps several of them in one tensor (Mixtral's experts), or under another name, by the
    model's name too.

    origin: the folder's absolute path or the Hub id, with revision (the Hub's commit); kind: safetensors, bin
    or deepspeed; folder: where the weights lie; config: the transformers configuration."""

    def __init__(
        self,
        origin: str,
        revision: str | None,
        folder: Path,
        config_path: Path,
        kind: str,
        stored: dict[str, Stored],
    ):
        self.origin, self.revision, self.kind = origin, revision, kind
        self.folder, self.config_path = folder, config_path
        self.config = load_config(config_path)
        self.config_hash = rundir.hash_file(config_path)
        self.table = architecture(self.config.model_type)
        pieces = {
            name: (shape, self.table.in_checkpoint(name, shape))
            for name, shape in model_shapes(self.config, config_path).items()
        }
        shapes = {piece: shape for _, its in pieces.values() for piece, shape in its.items()}
        self._stored = _named(stored, self.table, self.config.tie_word_embeddings, folder)
        _split(self._stored, pieces)
        missing = [name for name in shapes if name not in self._stored]
        extra = [name for name in self._stored if name not in shapes]
        n = getattr(self.config, self.table.layers)
        if missing:
            raise UserError(
                f"{folder} lacks tensor {missing[0]} (and {len(missing) - 1} more); {config_path} describes "
                f"{n} layers"
            )
        if extra:
            raise UserError(
                f"{folder} holds {extra[0]} (and {len(extra) - 1} more), unknown to {config_path} of {n} "
                f"layers"
            )
        for name, shape in shapes.items():
            if self._stored[name].dtype is None:
                raise UserError(
                    f"tensor {name} in {folder} is not of floats ({', '.join(DTYPES)}); use unquantized "
                    f"weights"
                )
            if self._stored[name].shape != shape:
                where = f"tensor {name} in {folder / self.file_of(name)} has shape {self._stored[name].shape}"
                raise UserError(
                    f"{where}, but config.json implies {shape}; put the config of these weights beside them"
                )
        self._names = list(shapes)
        for name, (shape, its) in pieces.items():
            if name not in its:
                parts = [self._stored[piece] for piece in its]
                self._stored[name] = Stored(
                    shape, parts[0].dtype, tuple(e for part in parts for e in part.extents)
                )

    def names(self) -> list[str]:
        """All tensors, in the model's order; a tied head is not listed (it is the token embedding)."""
        return list(self._names)

    def _at(self, name: str) -> Stored:
        if name == self.table.head and self.config.tie_word_embeddings:
            name = self.table.embedding
        if name not in self._stored:
            raise UserError(f"{self.folder} has no tensor {name}")
        return self._stored[name]

    def shape(self, name: str) -> Shape:
        return self._at(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of `tensor(name)`: as stored, fp32 for a DeepSpeed checkpoint."""
        return self._at(name).dtype

    def file_of(self, name: str) -> str:
        """Name of the file with the tensor's bytes; of a tensor spread over ranks, the pattern of their
        names."""
        files = sorted({extent.file.name for extent in self._at(name).extents})
        return files[0] if len(files) == 1 else re.sub(r"pp_rank_\d+", "pp_rank_*", files[0])

    def files(self) -> dict[str, dict]:
        """{name: {bytes, mtime_ns}} of the weight files: what tells an unchanged source from one written
        anew."""
        paths = sorted({extent.file for stored in self._stored.values() for extent in stored.extents})
        stats = {path: path.stat() for path in paths}
        return {
            path.name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for path, stat in stats.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read from its own bytes only. Raises UserError if the file has shrunk meanwhile."""
        return read_tensor(self._at(name))

    def finite_tensor(self, name: str) -> torch.Tensor:
        """`tensor(name)`. Raises UserError if it holds nan or inf, with which nothing can be computed."""
        tensor = self.tensor(name)
        if bad := count_not_finite(as_bytes(tensor), tensor.dtype):
            raise UserError(
                f"{self.folder}: {describe_not_finite({name: bad})}; restore the checkpoint or use another "
                f"one"
            )
        return tensor

    def check_finite(self) -> None:
        """Raises UserError naming the first tensor that holds nan or inf. Reads all of them."""
        for name in self.names():
            self.finite_tensor(name)

    def blocks(self, name: str) -> Iterator[memoryview] | None:
        """`read_blocks` of the tensor; None if a part of it is stored in another dtype."""
        stored = self._at(name)
        return read_blocks(stored) if all(extent.dtype == stored.dtype for extent in stored.extents) else None


def read_tensor(stored: Stored) -> torch.Tensor:
    """A tensor's elements, read into one buffer of its size."""
    result = torch.empty(stored.shape, dtype=stored.dtype)
    flat, position = result.view(-1), 0
    for extent in stored.extents:
        target = flat[position : position + extent.count]
        piece = target if extent.dtype == stored.dtype else torch.empty(extent.count, dtype=extent.dtype)
        with open(extent.file, "rb") as file:
            file.seek(extent.offset)
            if file.readinto(memoryview(as_bytes(piece))) != extent.count * extent.dtype.itemsize:
                raise UserError(f"{extent.file} is cut off; copy it again")
        if piece is not target:
            target.copy_(piece)
        position += extent.count
    return result


def read_blocks(stored: Stored) -> Iterator[memoryview]:
    """A tensor's bytes as they are stored, block after block of whole elements in one small buffer: use each
    before asking for the next.

    A block that was just read is still in the processor's cache, where hashing and writing it cost little."""
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


def describe_not_finite(counts: dict[str, int]) -> str:
    """What {tensor: number of values that are nan or inf} says, in a clause."""
    (name, count), *others = counts.items()
    more = f", and {len(others)} more tensor(s) have some" if others else ""
    return f"tensor {name} has {count} value(s) that are nan or inf{more}"


def as_bytes(tensor: torch.Tensor):
    """The bytes of a contiguous CPU tensor as a numpy array that shares its memory."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _named(stored: dict[str, Stored], table: Architecture, tied: bool, folder: Path) -> dict[str, Stored]:
    """`stored` under full names: what wrappers of a model added taken off, the prefix added where it was left
    out, the head's own name for it, buffers and a tied head dropped. Raises UserError where two tensors of
    one name differ."""
    outside = {name for names in table.parts.values() for name in names}
    renamed = {ours: names[0] for ours, names in table.published.items() if names[0] in outside}
    plain, named = strip_wrappers(stored, folder), {}
    for name, place in zip(plain, stored.values(), strict=True):
        full = renamed.get(name, name)
        full = full if full in outside or full.startswith(table.base_prefix) else table.base_prefix + full
        within = re.match(re.escape(table.block).replace(r"\{i\}", r"\d+"), full)
        if not (within and full[within.end() :] in table.buffers):
            other = named.setdefault(full, place)
            if not _same(other, place):
                raise UserError(
                    f"{folder}: {full} is stored under two names, with and without '{table.base_prefix}', "
                    f"and the two differ; "
                    f"delete the wrong one"
                )
    place = named.pop(table.head, None) if tied else None
    if place is not None:
        other = named.setdefault(table.embedding, place)
        if not _same(other, place):
            raise UserError(
                f"{folder}: {table.head} and {table.embedding} differ; set tie_word_embeddings to false in "
                f"config.json"
            )
    return named


def _same(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are one, or hold the same bytes."""
    if one == other:
        return True
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
        torch.from_numpy(as_bytes(read_tensor(one))), torch.from_numpy(as_bytes(read_tensor(other)))
    )


def _split(stored: dict[str, Stored], pieces: dict[str, tuple[Shape, dict[str, Shape]]]) -> None:
    """Replace the model's tensors in `stored` (a training checkpoint has them) by those of a published
    checkpoint.

    `pieces` is {model's name: (shape, {name in checkpoints: shape})}."""
    for name, (shape, its) in pieces.items():
        if name in stored and name not in its and stored[name].shape == shape and stored[name].dtype:
            whole, position = stored.pop(name), 0
            for piece, piece_shape in its.items():
                count = math.prod(piece_shape)
                stored[piece] = Stored(piece_shape, whole.dtype, cut(list(whole.extents), position, count))
                position += count


def open_source(path_or_id: str | Path, revision: str | None = None, check: bool = True) -> Source:
    """Open a folder of Hugging Face or DeepSpeed weights, or a Hub id (downloaded or from the cache), reading
    headers only.

    A folder of our own making is compared with its hashes (unless `check` is False: one rank did so for all),
    torch files with their checksums. Raises UserError if there is no such folder or model, if files are
    missing, cut off, damaged, left over or unsafe, or if the tensors are not those that the config
    describes."""
    folder = Path(path_or_id).expanduser()
    if folder.is_file():
        raise UserError(f"source '{path_or_id}' is a file; give the folder that holds it and config.json")
    origin, commit = str(folder.absolute()), None
    if not folder.is_dir():
        folder = download_model(str(path_or_id), revision)
        origin, commit = str(path_or_id), folder.name  # a snapshot's folder is called by its commit
    elif revision:
        raise UserError(
            f"revision '{revision}' was given, but {folder} is a folder: only a Hub id has revisions; leave "
            f"it out"
        )
    if check:
        rundir.check_own(folder)
    stored = _read_folder(folder, "model", ".safetensors", read_safetensors)
    kind, config_folder = "safetensors", folder
    if stored is None:
        kind, stored = "bin", _read_folder(folder, "pytorch_model", ".bin", read_bin)
    if stored is None and (tag := _tag_folder(folder)):
        kind, config_folder = "deepspeed", tag if (tag / "config.json").is_file() else folder
        if (
            folder.parent.name == "checkpoints"
            and folder.name.startswith("step_")
            and not (folder / "COMPLETE").is_file()
        ):
            raise UserError(
                f"{folder} has no COMPLETE marker: its saving was interrupted; use an earlier checkpoint"
            )
        try:  # of our own the hashes have been checked
            folder, stored = tag, read_deepspeed(tag, check=not (folder / "COMPLETE").is_file())
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{tag} does not hold what DeepSpeed's engine saves ({what}); use another checkpoint"
            ) from None
    if stored is None and (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is an adapter without the model it adapts; merge it into its base model first"
        )
    if stored is None:
        hint = f"; did you mean {folder / 'final'}?" if (folder / "final").is_dir() else ""
        raise UserError(
            f"{folder} holds no weights (model.safetensors, pytorch_model.bin or a DeepSpeed "
            f"checkpoint){hint}"
        )
    place = folder.resolve()
    place = (
        place.parent.parent if place.parent.name == "snapshots" else place
    )  # the Hub's cache links to blobs/ beside them
    for path in {extent.file for its in stored.values() for extent in its.extents}:
        if not path.resolve().is_relative_to(place):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside its folder; put the file itself there"
            )
    return Source(origin, commit, folder, config_folder / "config.json", kind, stored)


def weight_patterns(stem: str, suffix: str) -> list[str]:
    """Names of the weights of one kind (of WEIGHTS) on the Hub: whole, or in shards with their index."""
    return [f"{stem}{suffix}", f"{stem}-*-of-*{suffix}", f"{stem}{suffix}.index.json"]


def download_model(repo: str, revision: str | None) -> Path:
    """The Hub's snapshot of `repo`: config, tokenizer and safetensors, or .bin where there are no
    safetensors.

    From the cache alone when HF_HUB_OFFLINE=1. Raises UserError if it can be had from neither."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith("."):
        raise UserError(f"source '{repo}' is no folder, and no Hub id (owner/name) either")
    try:
        for stem, suffix in WEIGHTS:
            patterns = [*COMMON_FILES, *weight_patterns(stem, suffix)]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
            if any(folder.glob(f"{stem}*{suffix}")):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise gate(error, f"'{repo}'", repo) or UserError(
            f"'{repo}' is no folder here and cannot be had from the Hub ({reason}); download it first"
        ) from None
    return folder
