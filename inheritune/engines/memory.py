"""What a rank holds in memory, measured, and the speed of its GPU."""

from __future__ import annotations

import resource
from typing import Any

import torch

from inheritune.config.catalog import GPU_SPECS
from inheritune.runtime.devices import read_gpu_name


def find_peak_flops(device: torch.device) -> float | None:
    """Return the GPU's dense 16-bit matrix rate in FLOP/s, or None if the GPU is not in the table GPUS."""
    if (name := read_gpu_name(device)) is None:
        return None
    return next((facts["tflops"] * 1e12 for part, facts in GPU_SPECS.items() if part in name), None)


def count_held_bytes(engine: Any) -> dict[str, int]:
    """Return the bytes of this rank's {weights, masters, moments, gradients} that the engine holds now, on
    any device.

    Gradients exist between the last backward and step(); a master that is the weight itself (ZeRO 0) counts
    as weight."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    inner = zero if stage == 0 else zero.optimizer
    held = (
        (p.data, getattr(p, "ds_tensor", None), getattr(p, "ds_secondary_tensor", None))
        for p in engine.module.parameters()
    )
    weights = [tensor for tensors in held for tensor in tensors if tensor is not None]
    masters = []
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if stage == 3:
        masters, gradients = zero.fp32_partitioned_groups_flat, [zero.grad_partitions_flat_buffer]
    elif stage:
        masters = zero.single_partition_of_fp32_groups
        gradients += [t for group in zero.averaged_gradients.values() for t in group or []]
        gradients += [master.grad for master in masters if master.grad is not None]  # offloaded
    moments = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    return {
        "weights": _count_storage_bytes(weights),
        "masters": _count_storage_bytes(masters),
        "moments": _count_storage_bytes(moments),
        "gradients": _count_storage_bytes(gradients),
    }


def _count_storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the storages of `tensors`, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_peak_memory(device: torch.device) -> dict[str, float]:
    """Return the largest memory of this rank so far, in bytes: the process's resident memory, and on a GPU
    the allocated and reserved memory."""
    # Linux counts in KiB
    peaks: dict[str, float] = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks |= {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return peaks
