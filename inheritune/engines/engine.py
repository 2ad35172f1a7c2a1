"""The DeepSpeed engine: building the model, giving it weights, wrapping it, and reading its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from inheritune.config.sections import Train
from inheritune.engines import adamw
from inheritune.engines.deepspeed_json import get_zero_stage, make_deepspeed_config
from inheritune.engines.gathers import gather_in_bf16
from inheritune.models.architectures import find_architecture
from inheritune.models.networks import (
    CAUSAL_ATTENTION,
    build_model,
    find_training_attention,
    fuse_gelu,
    list_saved_tensors,
)
from inheritune.runtime.dist import get_device, sum_over_ranks
from inheritune.runtime.ranks import get_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from inheritune.models.sources import Source


def start_engine(
    hf_config: Any, weights: Source | None, settings: dict, train: Train, micro_batch: int, accumulation: int
) -> Any:
    """Build the model of `hf_config`, fill it from `weights` (None leaves it empty, for a checkpoint to
    fill) and wrap it in a DeepSpeed engine. At ZeRO 3 no rank ever holds the whole model."""
    import deepspeed

    config = make_deepspeed_config(settings, train, micro_batch, accumulation)
    stage = get_zero_stage(settings)
    with ExitStack() as contexts:
        if stage == 3 and train.precision == "bf16":  # else the positions' frequencies would be rounded too
            from transformers.integrations.deepspeed import prevent_arange_dtype_change

            contexts.enter_context(prevent_arange_dtype_change())
        if stage == 3:
            contexts.enter_context(deepspeed.zero.Init(config_dict_or_path=config))
        model: Any = build_model(hf_config, find_training_attention(hf_config))
    fuse_gelu(model)
    if weights is not None:
        fill_parameters(model, weights, stage)
    own = settings.get("inheritune", {})
    if own.get("activation_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if own.get("compile"):
        compile_blocks(model)
    groups = adamw.make_parameter_groups(model, train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if own.get("gather_in_bf16") and stage == 3 and train.precision == "bf16_autocast":
        gather_in_bf16(engine)
    if getattr(engine.optimizer, "round_robin_gradients", False):
        adamw.link_masters(engine.optimizer)
    return engine


WEIGHT_KEYS = (
    "offload_param",
    "overlap_comm",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
)
"""Keys of zero_optimization that say where weights are and when they are gathered. The others are about
training, or would change the weights (`zero_quantized_weights`)."""


def start_frozen_engine(hf_config: Any, weights: Source, zero: dict) -> Any:
    """Build the model of `hf_config` in fp32 and in shards, filled from `weights`, without an optimizer.

    `zero` is the zero_optimization of a JSON at ZeRO 3. A forward of the engine's `module` computes the bits
    of a whole copy's. No rank ever holds the whole model."""
    import deepspeed

    # DeepSpeed's own linear function, which saves memory in backward, adds the bias in a step of its own
    own = {"stage": 3, "memory_efficient_linear": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {key: zero[key] for key in WEIGHT_KEYS if key in zero} | own,
        "timers": {"throughput": {"enabled": False}},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model: Any = build_model(hf_config)
    fill_parameters(model, weights, stage=3)
    model.requires_grad_(False)  # autocast would keep a rounded copy of each trained weight
    engine, *_ = deepspeed.initialize(model=model.eval(), config=config)
    return engine


@contextmanager
def validating(model: Any) -> Iterator[None]:
    """Let `model`, an engine or a module, be in evaluation mode for a while.

    ZeRO 3 records which module uses which weights in its first pass, and from that what may be released when.
    If that pass is a validation, no weight seems to be needed once its forward is over. DeepSpeed 0.19.8
    records anew at the first backward, but caches (`lru_cache`) what it concluded: all later steps would
    gather each weight twice, however many may stay gathered. So what such a validation left is dropped."""
    training = model.training
    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    is_first = training and offload is not None and not offload.param_coordinator.is_complete_trace()
    model.eval()
    try:
        yield
    finally:
        model.train(training)
    if is_first:
        _drop_trace(offload)


def _drop_trace(offload: Any) -> None:
    """Let ZeRO 3 record anew which module uses which weights, with an empty cache: its keys hold the object
    that records, of which this is a copy."""
    coordinator = copy.copy(offload.param_coordinator)
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload.param_coordinator = coordinator
    offload.partition_all_parameters()


def drop_secondary_copies(engine: Any) -> None:
    """Delete the copies of the weights that ZeRO 3 keeps inside a node (`zero_hpz_partition_size`). After
    loading a checkpoint they still hold the earlier weights, and DeepSpeed 0.19.8 would train on them. The
    next forward makes new ones."""
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def release_groups() -> None:
    """End the process group of `zero_hpz_partition_size`, which DeepSpeed makes once per engine and refuses
    to make twice."""
    from deepspeed import comm
    from deepspeed.utils import groups

    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        comm.destroy_process_group(group)


def compile_blocks(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Compile each block in place: torch.compile(block) would rename its parameters.

    Blocks share their code. torch compiles it anew for each number that differs between them, checks at each
    call which result fits, and after 8 runs the rest uncompiled without a word. So such a number becomes a
    tensor (`share_attention_scale`)."""
    share_attention_scale(model)
    # where another number differs, per block: training and validation, each with two batch shapes
    torch._dynamo.config.recompile_limit = max(8, 4 * len(get_blocks(model)))
    for block in get_blocks(model):
        block.compile(backend=backend)


def share_attention_scale(model: PreTrainedModel) -> None:
    """Give all blocks the first one's attention scale, and multiply each block's queries by a tensor that
    makes up for it: the paper's GPT-2 divides the scale of block i (from 0) by i + 1.

    Queries are rounded once more, in the type of the products. Nothing is done where the scales are equal, or
    the attention is not `find_training_attention`'s."""
    if model.config._attn_implementation != CAUSAL_ATTENTION:
        return
    modules: list[Any] = list(get_blocks(model).modules())
    attentions = [m for m in modules if isinstance(getattr(m, "scaling", None), float)]
    scales = [module.scaling for module in attentions]
    if len(set(scales)) < 2:
        return
    device = get_device()
    for module in attentions:
        module.query_factor = torch.tensor(module.scaling / scales[0], device=device)
        module.scaling = scales[0]


def get_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the model's list of transformer blocks."""
    return find_architecture(model.config).get_blocks(model)


def fill_parameters(model: torch.nn.Module, weights: Source, stage: int) -> None:
    """Copy every parameter and saved buffer from `weights`, one at a time; at ZeRO 3 rank 0 reads the
    parameters and the other ranks receive their partitions."""
    import deepspeed

    for name, tensor in list_saved_tensors(model).items():
        is_partitioned = stage == 3 and isinstance(tensor, torch.nn.Parameter)
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=is_partitioned):
            if not is_partitioned or get_rank() == 0:
                with torch.no_grad():
                    tensor.copy_(weights.tensor(name))


def gather_parameters(engine: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (name, fp32 CPU tensor) of every parameter, a tied one once, from the fp32 masters, and of every
    saved buffer. Every rank must iterate; all but rank 0 get None for the tensor. Only one parameter is
    gathered at a time."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = engine.zero_optimization_stage() == 3
    if (
        partitioned
    ):  # what the last forward fetched ahead is still in flight; such a parameter cannot be gathered
        engine.empty_partition_cache()
    for name, tensor in list_saved_tensors(engine.module).items():
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        has_master = tensor.dtype != torch.float32 and tensor.requires_grad
        master = safe_get_full_fp32_param(tensor) if has_master else None
        with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned and is_parameter):
            value = tensor if master is None else master
            yield name, value.detach().float().cpu().clone() if get_rank() == 0 else None


def has_finite_weights(engine: Any) -> bool:
    """Return whether no rank holds a weight that is nan or infinite; the same on every rank. One pass over
    this rank's weights."""
    held = []
    for parameter in engine.module.parameters():
        if (part := getattr(parameter, "ds_tensor", None)) is None:
            held.append(parameter.detach())
        else:  # the last rank's partition ends in uninitialized padding
            held.append(part.detach().flatten()[: max(0, parameter.ds_numel - get_rank() * part.numel())])
    return math.isfinite(sum_over_ranks(torch.nn.utils.get_total_norm(held).to(engine.device)))
