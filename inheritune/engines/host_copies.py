"""Copies of a rank's states in host memory, for a save that is written while training continues."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from functools import cached_property
from typing import Any

import torch

from inheritune.config.units import format_memory
from inheritune.files.processes import get_node_name
from inheritune.runtime.devices import get_device
from inheritune.runtime.host_memory import find_available_memory
from inheritune.runtime.log import logger
from inheritune.runtime.ranks import get_world_size
from inheritune.runtime.rendezvous import get_store

MEMORY_SHARE = 0.5
"""Share of the available host memory that the copies may take. The files need page cache meanwhile, and torch
rounds blocks of pinned memory up, at most to twice their size."""


class HostCopies:
    """Makes the copies. Their memory is used again by the next save. On a GPU it is pinned, which makes the
    copy several times faster, and is slow to allocate."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)  # blocks by size
        self._used: list[torch.Tensor] = []

    def make(self, content: Any) -> Any | None:
        """Return a copy of `content`, in which tensors that share a storage share one too: torch.save writes
        the same bytes. None, with a warning, if this node has too little memory left."""
        tensors = _list_tensors(content)
        storages = {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}
        sizes = [storage.nbytes() for storage in storages.values()]
        room = int(find_available_memory() * MEMORY_SHARE / self._ranks_here)
        if self._count_new_bytes(sizes) > room:
            _report_lack(sizes, room)
            return None
        try:
            copies = {key: self._copy_storage(storage) for key, storage in storages.items()}
        except (RuntimeError, MemoryError):  # torch could not allocate what the system called available
            _report_lack(sizes, room)
            return None
        if get_device().type == "cuda":
            torch.cuda.current_stream().synchronize()
        made: dict[int, Any] = {}
        for tensor in tensors:
            target = copies[tensor.untyped_storage()._cdata].untyped_storage()
            view = (tensor.storage_offset(), tensor.size(), tensor.stride())
            copied = (
                torch.empty(0, dtype=tensor.dtype).set_(target, *view).requires_grad_(tensor.requires_grad)
            )
            if isinstance(tensor, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, tensor.requires_grad)
            vars(copied).update(copy.deepcopy(vars(tensor), made))  # torch.save stores these too
            made[id(tensor)] = copied
        return copy.deepcopy(content, made)

    def reuse(self) -> None:
        """Let the next save use the memory of the copies that were made, which have been written."""
        for block in self._used:
            self._free[block.nbytes].append(block)
        self._used.clear()

    def _count_new_bytes(self, sizes: list[int]) -> int:
        """Count the bytes of those of the blocks of these `sizes` that must be allocated."""
        return sum(n * max(0, sizes.count(n) - len(self._free[n])) for n in set(sizes))

    @cached_property
    def _ranks_here(self) -> int:
        """Number of ranks of this node."""
        if get_world_size() == 1:
            return 1
        nodes = [get_store().get(f"here {rank}").decode() for rank in range(get_world_size())]
        return nodes.count(get_node_name())

    def _copy_storage(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return a block of host memory to which the bytes of `storage` are being copied."""
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        blocks = self._free[source.nbytes]
        pin = get_device().type == "cuda"
        block = blocks.pop() if blocks else torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=pin)
        self._used.append(block)
        return block.copy_(source, non_blocking=True)


def _report_lack(sizes: list[int], room: int) -> None:
    logger.warning(
        "training waits while %s of a checkpoint are written: %s has %s of free memory for a copy",
        format_memory(sum(sizes)),
        get_node_name(),
        format_memory(room),
    )


def _list_tensors(content: Any) -> list[torch.Tensor]:
    """Return the tensors that pickling `content` meets, as torch.save does."""
    found: list[torch.Tensor] = []

    class Collector(pickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            if not isinstance(obj, torch.Tensor):
                return None
            found.append(obj)
            return "a tensor"

    Collector(io.BytesIO(), protocol=2).dump(content)
    return found
