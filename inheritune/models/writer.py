"""Hugging Face checkpoints, written tensor by tensor: in memory is one tensor of a shard at most (sources.py
reads them)."""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash

from inheritune.files import rundir
from inheritune.models.architectures import Shape, count_not_finite, write_config
from inheritune.models.sources import BLOCK_BYTES, DTYPE_NAMES, as_bytes

Specs = dict[str, tuple[Shape, torch.dtype]]


class CheckpointWriter:
    """Writes a Hugging Face checkpoint tensor by tensor: every byte's place is known before the first one is
    written.

    `specs` is {name: (shape, dtype)}; `add` is called in this order, or for each shard by a thread of its
    own. With folder=None nothing is written, so that ranks other than 0 can take part in gathering the
    tensors with the same code."""

    def __init__(self, folder: Path | None, config, specs: Specs, max_shard_bytes: int = 2 << 30):
        self.folder, self.config, self.specs = folder, config, specs
        self.tensors: dict[str, dict] = {}
        self.files: dict[str, dict] = {}
        self._open: dict[str, tuple[BinaryIO, xxhash.xxh3_128]] = {}
        shards, used = [[]], 0
        for name, (shape, dtype) in specs.items():
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and used + size > max_shard_bytes:
                shards, used = [*shards, []], 0
            shards[-1].append(name)
            used += size
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self.shards = dict(zip(files, shards, strict=True))
        self._file_of = {name: file for file, shard in self.shards.items() for name in shard}
        self._waiting = {file: shard[::-1] for file, shard in self.shards.items()}

    def _begin(self, file: str) -> None:
        """Begin a shard with its header."""
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name in self.shards[file]:
            shape, dtype = self.specs[name]
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as safetensors' own writer has it
        self._open[file] = open(self.folder / file, "wb"), xxhash.xxh3_128()  # noqa: SIM115 (closed by _end)
        self._put(file, struct.pack("<Q", len(text)) + text)

    def _put(self, file: str, data) -> None:
        opened, digest = self._open[file]
        opened.write(data)
        digest.update(data)

    def _end(self, file: str) -> None:
        """Finish a shard, and note it in the record."""
        opened, digest = self._open.pop(file)
        size = opened.tell()
        opened.close()
        rundir.flush(self.folder / file)  # here, while other threads write, not all at the end
        self.files[file] = {"bytes": size, "xxh3": digest.hexdigest()}

    def add(self, name: str, tensor: torch.Tensor | Iterable[memoryview]) -> None:
        """Append its shard's next tensor (CPU or GPU; its dtype and shape must be those announced), or blocks
        of its bytes."""
        file = self._file_of[name]
        waiting = self._waiting[file]
        assert waiting and waiting[-1] == name, f"expected {waiting[-1:]}, got {name}"
        waiting.pop()
        if self.folder is None:
            return
        shape, dtype = self.specs[name]
        if torch.is_tensor(tensor):
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), (
                f"{name}: {tensor.shape} {tensor.dtype}, not {shape} {dtype}"
            )
            data = memoryview(as_bytes(tensor.detach().cpu().contiguous()))
            tensor = (data[first : first + BLOCK_BYTES] for first in range(0, len(data), BLOCK_BYTES))
        if file not in self._open:
            self._begin(file)
        digest, written, bad = xxhash.xxh3_128(), 0, 0
        for block in tensor:
            self._put(file, block)
            digest.update(block)
            bad += count_not_finite(block, dtype)  # while it is in the processor's cache
            written += len(block)
        assert written == math.prod(shape) * dtype.itemsize, (
            f"{name}: {written} bytes, not {shape} of {dtype}"
        )
        self.tensors[name] = {"file": file, "xxh3": digest.hexdigest(), "not_finite": bad}
        if not waiting:
            self._end(file)

    def close(self) -> dict:
        """Write index and config; {"tensors": {name: {file, xxh3, not_finite}}, "files": {name: {bytes,
        xxh3}}} of what was written; `not_finite` counts the values that are nan or inf."""
        missing = [name for waiting in self._waiting.values() for name in waiting]
        assert not missing, f"{missing[-1]} was announced and never added"
        if self.folder is None:
            return {}
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
        rundir.write_json(self.folder / "model.safetensors.index.json", index, seal=False)
        write_config(self.folder / "config.json", self.config, next(iter(self.specs.values()))[1])
        files = {
            file: self.files[file] for file in self.shards
        }  # in this order, whichever thread ended first
        files |= rundir.hash_folder(self.folder, only=("model.safetensors.index.json", "config.json"))
        return {"tensors": {name: self.tensors[name] for name in self.specs}, "files": files}


def write_checkpoint(folder: Path, config, specs: Specs, tensor_of: Callable, **options) -> dict:
    """Write the tensors of `specs`, each asked of `tensor_of` (as `add` takes it) when its turn comes; the
    record of CheckpointWriter.close. A few shards are written at a time: copying into the page cache takes a
    core each."""
    writer, over = CheckpointWriter(folder, config, specs, **options), threading.Event()

    def write(shard: list[str]) -> None:
        for name in shard:
            if over.is_set():
                return
            writer.add(name, tensor_of(name))

    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        try:
            for written in as_completed([pool.submit(write, shard) for shard in writer.shards.values()]):
                written.result()
        finally:  # when one fails, or the user stops this, the others have no need to end theirs
            over.set()
    return writer.close()
