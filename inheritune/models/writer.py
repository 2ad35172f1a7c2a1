"""Hugging Face checkpoints, written tensor by tensor: at most one tensor of a shard is in memory.

sources.py reads checkpoints.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import xxhash

from inheritune.files import json_files, markers, writing
from inheritune.models.architectures import Shape
from inheritune.models.config_files import write_config
from inheritune.models.dtypes import Dtype
from inheritune.models.extents import BLOCK_BYTES, count_not_finite, view_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    Value = torch.Tensor | Iterable[memoryview]

Specs = dict[str, tuple[Shape, Dtype]]
"""{name: (shape, dtype)} of the tensors of a checkpoint, in their order."""
SHARD_BYTES = 2 << 30
WRITING_THREADS = 4


class CheckpointWriter:
    """Writes a Hugging Face checkpoint tensor by tensor; the place of every byte is known before the first.

    `add` is called in the order of `specs`, or for each shard by a thread of its own. With folder=None
    nothing is written, so that ranks other than 0 can take part in gathering the tensors with the same
    code."""

    def __init__(
        self,
        folder: Path | None,
        config: "PreTrainedConfig",
        specs: Specs,
        max_shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.config, self.specs = folder, config, specs
        self.tensors: dict[str, dict] = {}
        self.files: dict[str, dict] = {}
        self._open: dict[str, tuple[BinaryIO, xxhash.xxh3_128]] = {}
        shards = _fill_shards(specs, max_shard_bytes)
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self.shards = dict(zip(files, shards, strict=True))
        self._file_of = {name: file for file, shard in self.shards.items() for name in shard}
        self._waiting = {file: shard[::-1] for file, shard in self.shards.items()}

    def _begin(self, folder: Path, file: str) -> None:
        """Open a shard in `folder` and write its header."""
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self.shards[file]:
            shape, dtype = self.specs[name]
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": dtype.code,
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as safetensors' own writer has it
        self._open[file] = open(folder / file, "wb"), xxhash.xxh3_128()  # noqa: SIM115 (closed by _end)
        self._put(file, struct.pack("<Q", len(text)) + text)

    def _put(self, file: str, data: bytes | memoryview) -> None:
        """Append `data` to a shard."""
        opened, digest = self._open[file]
        opened.write(data)
        digest.update(data)

    def _end(self, folder: Path, file: str) -> None:
        """Finish a shard and add it to the record."""
        opened, digest = self._open.pop(file)
        size = opened.tell()
        opened.close()
        writing.sync_path(folder / file)  # here, while other threads write, not all at the end
        self.files[file] = {"bytes": size, "xxh3": digest.hexdigest()}

    def add(self, name: str, tensor: "Value") -> None:
        """Append the next tensor of its shard (on CPU or GPU, of the announced dtype and shape).

        Instead of a tensor, blocks of its bytes may be given."""
        file = self._file_of[name]
        waiting = self._waiting[file]
        assert waiting and waiting[-1] == name, f"expected {waiting[-1:]}, got {name}"
        waiting.pop()
        if self.folder is None:
            return
        shape, dtype = self.specs[name]
        blocks = cast("Iterable[memoryview]", tensor)
        if hasattr(tensor, "untyped_storage"):  # a tensor of torch, which need not be imported
            blocks = _cut_blocks(name, cast("torch.Tensor", tensor), shape, dtype)
        if file not in self._open:
            self._begin(self.folder, file)
        digest, written, bad = xxhash.xxh3_128(), 0, 0
        for block in blocks:
            self._put(file, block)
            digest.update(block)
            bad += count_not_finite(block, dtype)  # while it is in the processor's cache
            written += len(block)
        assert written == math.prod(shape) * dtype.itemsize, (
            f"{name}: {written} bytes, not {shape} of {dtype}"
        )
        self.tensors[name] = {"file": file, "xxh3": digest.hexdigest(), "not_finite": bad}
        if not waiting:
            self._end(self.folder, file)

    def close(self) -> dict:
        """Write index and config; return the record of what was written, {} without a folder.

        The record is {"tensors": {name: {file, xxh3, not_finite}}, "files": {name: {bytes, xxh3}}};
        `not_finite` counts the values that are nan or inf."""
        missing = [name for waiting in self._waiting.values() for name in waiting]
        assert not missing, f"{missing[-1]} was announced and never added"
        if self.folder is None:
            return {}
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
        json_files.write_json(self.folder / "model.safetensors.index.json", index, seal=False)
        write_config(self.folder / "config.json", self.config, next(iter(self.specs.values()))[1])
        files = {file: self.files[file] for file in self.shards}  # sorted, whichever thread finished first
        files |= markers.hash_folder(self.folder, only=("model.safetensors.index.json", "config.json"))
        return {"tensors": {name: self.tensors[name] for name in self.specs}, "files": files}


def _fill_shards(specs: Specs, max_shard_bytes: int) -> list[list[str]]:
    """Return the names of the tensors of each shard, in order; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _cut_blocks(name: str, tensor: "torch.Tensor", shape: Shape, dtype: Dtype) -> Iterable[memoryview]:
    """Return the bytes of a tensor of `shape` and `dtype` in blocks of BLOCK_BYTES."""
    assert (tuple(tensor.shape), str(tensor.dtype)) == (shape, str(dtype)), (
        f"{name}: {tensor.shape} {tensor.dtype}, not {shape} {dtype}"
    )
    data = view_bytes(tensor.detach().cpu().contiguous()).data
    return (data[first : first + BLOCK_BYTES] for first in range(0, len(data), BLOCK_BYTES))


def write_checkpoint(
    folder: Path,
    config: "PreTrainedConfig",
    specs: Specs,
    make_tensor: Callable[[str], "Value"],
    max_shard_bytes: int = SHARD_BYTES,
) -> dict:
    """Write the tensors of `specs`, each requested from `make_tensor` when its turn comes.

    Returns the record of CheckpointWriter.close. A few shards are written at a time, because copying into the
    page cache takes a core each."""
    writer, stopped = CheckpointWriter(folder, config, specs, max_shard_bytes), threading.Event()

    def write_shard(names: list[str]) -> None:
        for name in names:
            if stopped.is_set():
                return
            writer.add(name, make_tensor(name))

    with ThreadPoolExecutor(min(WRITING_THREADS, len(os.sched_getaffinity(0)))) as pool:
        try:
            for written in as_completed([pool.submit(write_shard, s) for s in writer.shards.values()]):
                written.result()
        finally:  # when one fails, or the user stops this, the others need not finish theirs
            stopped.set()
    return writer.close()
