"""AdamW's parameter groups, its learning rate, and the norm of the gradient that it steps with."""

import math
from typing import TYPE_CHECKING, Any

import torch

from inheritune.config.sections import Train
from inheritune.models.networks import find_linear_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compute_learning_rate(step: int, train: Train) -> float:
    """Return the learning rate of step `step` (the first is 1): linear warm-up to lr, then cosine (or linear)
    decay to min_lr at the last step."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant" or train.steps == train.warmup_steps:
        return train.lr
    progress = min(1.0, (step - train.warmup_steps) / (train.steps - train.warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_lr + falling * (train.lr - train.min_lr)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def make_parameter_groups(model: "PreTrainedModel", weight_decay: float) -> list[dict]:
    """Return AdamW's two groups: the weights of linear layers are decayed; embeddings, a tied head, norms and
    biases are not."""
    decayed = {id(p) for p in find_linear_weights(model).values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def compute_gradient_norm(engine: Any) -> float | None:
    """Return the norm of the step's mean gradient before clipping if DeepSpeed does not keep it (fp32 at ZeRO
    0), else None. Call it between the last backward, which has averaged the gradients over ranks, and step().

    If the norm is not finite, step() will count a skipped step and leave weights and moments unchanged, as
    DeepSpeed does by itself at ZeRO 1 to 3. At ZeRO 0 its clipping would spread one nan over all weights."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm, optimizer = float(torch.nn.utils.get_total_norm(gradients)), engine.optimizer
    optimizer.overflow = not math.isfinite(norm)  # DeepSpeed's engine reads it after the step
    # torch's fused AdamW reads it in the step
    optimizer.found_inf = torch.ones((), device=engine.device) if optimizer.overflow else None
    return norm


def link_masters(zero: Any) -> None:
    """Let DeepSpeed find each parameter's master and moments where ZeRO 1 and 2 store them under
    `round_robin_gradients`.

    That key reorders the parameters of the flat vectors, but DeepSpeed 0.19.8 links them in their old order
    unless a vector has padding: what is read or set by name (a resize, final/ of pure bf16) would be the
    numbers of other parameters."""
    padding = zero.round_robin_bit16_padding
    zero.round_robin_bit16_padding = [[1] for _ in padding]  # makes DeepSpeed link by the true offsets
    zero._link_all_hp_params()
    zero.round_robin_bit16_padding = padding
    zero._param_slice_mappings = zero._create_param_mapping()
