"""The DeepSpeed engine: parameter groups, learning rate, the JSON, building the model and giving it weights.

ds_configs/*.json hold what changes memory and speed. What changes the mathematics belongs to the experiment
and is put in here; a JSON that sets it too is refused (dslint.py), so that each number has one home.
"""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from inheritune.config.experiment import GPUS, Train, resolve_path
from inheritune.config.reading import read_text, refuse_twice
from inheritune.engines import dslint
from inheritune.errors import UserError, nearest
from inheritune.models.architectures import architecture, build, fuse_gelu, linear_weights
from inheritune.runtime.dist import all_sum, rank


def load_json(path: str | Path) -> dict:
    """A DeepSpeed JSON (comments allowed). Raises UserError if it is missing, malformed or sets what the
    experiment owns; dslint.lint says the rest."""
    import hjson

    file = resolve_path(str(path))
    if not file.is_file():
        known = sorted(p.name for p in file.parent.glob("*.json")) if file.parent.is_dir() else []
        raise UserError(f"DeepSpeed JSON {path} does not exist; {nearest(file.name, known)}")

    text = read_text(file)
    try:
        settings = hjson.loads(text, object_pairs_hook=partial(refuse_twice, path))
    except (
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:  # hjson's own, and those of numbers such as 1e400
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(settings).__name__}")
    dslint.report(path, dslint.form(settings))
    return settings


def deepspeed_config(settings: dict, train: Train, micro_batch: int, accumulation: int) -> dict:
    """The whole configuration for `deepspeed.initialize`: the JSON's settings plus what the experiment
    owns."""
    config = {key: value for key, value in settings.items() if key != "inheritune"}
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation
    config["gradient_clipping"] = train.clip
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = (
        False  # offload too takes torch's fused AdamW: nothing is compiled
    )
    config.setdefault(
        "timers", {"throughput": {"enabled": False}}
    )  # would wait for the GPU twice in each micro batch
    if train.precision == "bf16_autocast":  # no module's gradients are summed over ranks in bf16
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def zero_stage(settings: dict) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def resolve_precision(train: Train, device) -> Train:
    """`train` with precision `auto` decided: bf16_autocast on a GPU, fp32 on the CPU (where bf16 products are
    slower)."""
    chosen = "bf16_autocast" if device.type == "cuda" else "fp32"
    return train.model_copy(update={"precision": chosen}) if train.precision == "auto" else train


def learning_rate(step: int, train: Train) -> float:
    """Learning rate of step `step` (the first is 1): linear warm-up to lr, then cosine (or linear) to min_lr
    at the end."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant" or train.steps == train.warmup_steps:
        return train.lr
    progress = min(1.0, (step - train.warmup_steps) / (train.steps - train.warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_lr + falling * (train.lr - train.min_lr)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: weights of linear layers are decayed, embeddings, a tied head, norms and biases are
    not."""
    decayed = {id(p) for p in linear_weights(model).values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def start_engine(hf_config, weights, settings: dict, train: Train, micro_batch: int, accumulation: int):
    """Build the model of `hf_config`, fill it from `weights` (sources.Source; None leaves it empty, for a
    checkpoint to fill) and wrap it in a DeepSpeed engine. At ZeRO 3 no rank ever holds the whole model."""
    import deepspeed

    config = deepspeed_config(settings, train, micro_batch, accumulation)
    stage = zero_stage(settings)
    with ExitStack() as contexts:
        if stage == 3 and train.precision == "bf16":  # else the positions' frequencies would be rounded too
            from transformers.integrations.deepspeed import prevent_arange_dtype_change

            contexts.enter_context(prevent_arange_dtype_change())
        if stage == 3:
            contexts.enter_context(deepspeed.zero.Init(config_dict_or_path=config))
        model = build(hf_config)
    fuse_gelu(model)
    if weights is not None:
        fill(model, weights, stage)
    ours = settings.get("inheritune", {})
    if ours.get("activation_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if ours.get("compile"):
        compile_blocks(model)
    groups = parameter_groups(model, train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if getattr(engine.optimizer, "round_robin_gradients", False):
        link_masters(engine.optimizer)
    return engine


def link_masters(zero) -> None:
    """Let DeepSpeed find each parameter's master and moments where ZeRO 1 and 2 keep them under
    `round_robin_gradients`.

    That key reorders the parameters of the flat vectors, but DeepSpeed 0.19.8 links them in their old order
    unless a vector has padding: what is read or set by name (a resize, final/ of pure bf16) would be the
    numbers of other parameters."""
    padding = zero.round_robin_bit16_padding
    zero.round_robin_bit16_padding = [[1] for _ in padding]  # so that it links by the true offsets
    zero._link_all_hp_params()
    zero.round_robin_bit16_padding = padding
    zero._param_slice_mappings = zero._create_param_mapping()


def drop_secondary_copies(engine) -> None:
    """Forget the copies of the weights that ZeRO 3 keeps inside a node (`zero_hpz_partition_size`): after
    loading a checkpoint they are still those from before, and DeepSpeed 0.19.8 would train on them. The next
    forward makes them anew."""
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


def compile_blocks(model: torch.nn.Module, backend="inductor") -> None:
    """torch.compile of each block, in place: torch.compile(block) would rename its parameters.

    Blocks share their code, and torch compiles one code at most 8 times, then leaves it as it is without a
    word: too few where each scales its attention by its depth, as the paper's GPT-2 does."""
    torch._dynamo.config.recompile_limit = max(
        8, 4 * len(blocks(model))
    )  # training, validation, two shapes of batch
    for block in blocks(model):
        block.compile(backend=backend)


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's list of transformer blocks."""
    return model.get_submodule(architecture(model.config.model_type).block.removesuffix(".{i}."))


def fill(model: torch.nn.Module, weights, stage: int) -> None:
    """Copy every parameter from `weights`, one at a time; at ZeRO 3 rank 0 reads and the others take their
    partitions."""
    import deepspeed

    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3):
            if stage < 3 or rank() == 0:
                with torch.no_grad():
                    parameter.copy_(weights.tensor(name))


def full_parameters(engine):
    """Yield (name, fp32 CPU tensor) of every parameter, a tied one once, from the fp32 masters. Every rank
    must iterate; all but rank 0 get None for the tensor. One parameter is whole at a time."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.named_parameters():
        master = (
            safe_get_full_fp32_param(parameter)
            if parameter.dtype != torch.float32 and parameter.requires_grad
            else None
        )
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            value = parameter if master is None else master
            yield name, value.detach().float().cpu().clone() if rank() == 0 else None


def set_learning_rate(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(engine) -> float | None:
    """Norm of the step's mean gradient before clipping, where DeepSpeed does not keep it (fp32 at ZeRO 0);
    call between the last backward, which has averaged the gradients over ranks, and step().

    If it is not finite, step() will count a skipped step and leave weights and moments alone, as DeepSpeed
    sees to by itself at ZeRO 1 to 3 (at ZeRO 0 its clipping would spread one nan over all weights)."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm, optimizer = float(torch.nn.utils.get_total_norm(gradients)), engine.optimizer
    optimizer.overflow = not math.isfinite(norm)  # read by DeepSpeed's engine after the step
    optimizer.found_inf = (
        torch.ones((), device=engine.device) if optimizer.overflow else None
    )  # by torch's fused AdamW in it
    return norm


def weights_are_finite(engine) -> bool:
    """Whether no rank holds a weight that is nan or infinite; the same on every rank. One pass over this
    rank's weights."""
    held = []
    for parameter in engine.module.parameters():
        if (part := getattr(parameter, "ds_tensor", None)) is None:
            held.append(parameter.detach())
        else:  # the last rank's part ends in padding that nobody has written
            held.append(part.detach().flatten()[: max(0, parameter.ds_numel - rank() * part.numel())])
    return math.isfinite(all_sum(torch.nn.utils.get_total_norm(held).to(engine.device)))


def peak_flops(device) -> float | None:
    """The GPU's dense 16-bit matrix rate in FLOP/s, or None if it is not a known GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((facts["tflops"] * 1e12 for part, facts in GPUS.items() if part in name), None)


def held_bytes(engine) -> dict[str, int]:
    """Bytes of this rank's {weights, masters, moments, gradients} as the engine holds them now, on whatever
    device.

    Gradients are those between the last backward and step(); a master that is the weight itself (ZeRO 0)
    counts as weight."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    inner = zero if stage == 0 else zero.optimizer
    held = (
        (p.data, getattr(p, "ds_tensor", None), getattr(p, "ds_secondary_tensor", None))
        for p in engine.module.parameters()
    )
    weights = [tensor for tensors in held for tensor in tensors if tensor is not None]
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if stage == 3:
        masters, gradients = zero.fp32_partitioned_groups_flat, [zero.grad_partitions_flat_buffer]
    elif stage:
        masters = zero.single_partition_of_fp32_groups
        gradients += [t for group in zero.averaged_gradients.values() for t in group or []]
        gradients += [master.grad for master in masters if master.grad is not None]  # offloaded
    moments = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    parts = {
        "weights": weights,
        "masters": masters if stage else [],
        "moments": moments,
        "gradients": gradients,
    }
    return {
        what: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in its}.values())
        for what, its in parts.items()
    }


def peak_memory(device) -> dict[str, float]:
    """Largest memory of this rank so far, in bytes: allocated and reserved on a GPU, and the process's
    resident memory."""
    import resource

    peaks = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts it in KiB
    if device.type == "cuda":
        peaks |= {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return peaks
