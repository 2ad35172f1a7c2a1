"""Weights rounded to bf16 once per optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def keep_casts(engine: Any) -> Iterator[None]:
    """Let the micro steps within this block share the bf16 weights that torch.autocast makes.

    Autocast rounds each weight at its first use and forgets it where the outermost autocast ends, which is
    every forward. The outer one here makes that the end of the block; all but the forward runs in the inner
    one, without autocast. The values are the same, so the losses are, bit by bit. With N micro steps it saves
    N - 1 readings of all fp32 weights. At ZeRO 3 nothing is kept: the weights are gathered anew each time.
    Compiled blocks round within their kernels, and keep nothing either."""
    is_shared = engine.gradient_accumulation_steps() > 1 and engine.zero_optimization_stage() < 3
    if not (engine.torch_autocast_enabled() and is_shared):
        yield
        return
    device = engine.device.type
    with torch.autocast(device, engine.torch_autocast_dtype()), torch.autocast(device, enabled=False):
        yield
