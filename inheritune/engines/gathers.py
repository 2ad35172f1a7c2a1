"""ZeRO 3's gathers of weights in bf16, where autocast rounds them anyway.

A rank holds fp32 parts of the weights, and each forward and backward gathers whole ones, 4 bytes a number.
The first thing that autocast does with the weight of a linear layer is to round it to bf16. Rounded before
the gather it is the same number in half the bytes. DeepSpeed has such gathers (`lower_precision_safe_modules`
of `torch_autocast`), but it then sums the gradients over ranks in bf16 too, and the losses differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch


def find_rounded_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the trained weights of `model` that autocast rounds before anything else is done with them:
    those of linear layers that no other module has too.

    Not the biases: the linear function that DeepSpeed puts in torch's place at ZeRO 3 adds them in fp32. Not
    those of classes derived from Linear, which may do something else."""
    from transformers.pytorch_utils import Conv1D

    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    linear: list[Any] = [m for m in model.modules() if type(m) in (torch.nn.Linear, Conv1D)]
    return [m.weight for m in linear if owners[id(m.weight)] == 1 and m.weight.requires_grad]


def gather_in_bf16(engine: Any) -> None:
    """Let `engine`, at ZeRO 3 under autocast to bf16, gather the weights of linear layers in bf16, and sum
    their gradients over ranks in fp32 as before. What is saved stays exact: DeepSpeed reads single weights
    (`GatheredParameters`) in the type in which they are held."""
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    for weight in find_rounded_weights(engine.module):
        setattr(weight, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)
    # DeepSpeed would ask the parameter, and sum in bf16
    engine.optimizer.get_param_comm_dtype = lambda parameter: torch.float32
