"""Initial values of tensors: each from a generator of its own, so that no value depends on another's."""

import math
from typing import TYPE_CHECKING

import torch
import xxhash

from inheritune.models.architectures import Shape, find_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def make_generator(*parts: object) -> torch.Generator:
    """Return a CPU generator keyed by `parts`: the same on every rank, whatever was drawn before."""
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(repr(parts).encode()) & (2**63 - 1))


def make_fresh_tensor(name: str, shape: Shape, config: "PreTrainedConfig", seed: int) -> torch.Tensor:
    """Return the initial fp32 value of one tensor, drawn from a generator keyed by (seed, name, shape).

    Norms are one, biases zero, the rest N(0, 0.02); projections onto the residual stream are
    N(0, 0.02 / sqrt(2 layers)) (as nanoGPT)."""
    table = find_architecture(config)
    inside = (table.split_name(name) or (0, name))[1]
    if inside in table.constants:
        return torch.full(shape, table.constants[inside])
    is_drawn = inside in table.drawn
    if name.endswith("bias") and not is_drawn:  # also those of GPT-OSS's experts and of DeepSeek's router
        return torch.zeros(shape)
    is_norm = "norm." in name  # Cohere's norms of queries and keys are matrices
    if is_norm or (len(shape) == 1 and not is_drawn):
        return torch.full(shape, float(table.norm_weight))
    key = "initializer_range" if getattr(config, "initializer_range", None) else "init_std"  # OPT's key
    std: float = getattr(config, key, 0.02)
    if any(name.endswith(suffix) for suffix in table.residual):
        std /= math.sqrt(2 * getattr(config, table.layers))
    return torch.randn(shape, generator=make_generator(seed, name, tuple(shape))).mul_(std)
