"""Memory of one GPU and one host, and the size of a checkpoint, for one model under one DeepSpeed JSON.

States and checkpoints are exact, activations count what autograd saves per token and block. FRAMEWORK,
FRAGMENTATION and PROCESS are estimates for a process with CUDA. All sizes are bytes, unless a name says
otherwise.
"""

from inheritune.config.sections import Model, Train
from inheritune.engines.deepspeed_keys import saves_in_background
from inheritune.engines.sizes import count_checkpoint_bytes, count_rank0_bytes
from inheritune.models.sizes import EVAL_BATCH, LOSS_CHUNK, Parameter, list_parameters
from inheritune.planning.activations import count_activations, get_element_sizes
from inheritune.planning.states import (
    ZERO_DEFAULTS,
    HostStates,
    Setup,
    States,
    count_sharded_weights,
    count_states,
    offload_states,
    read_offloads,
)

FRAMEWORK = 1.5e9
"""CUDA context, workspaces of cuBLAS and buffers of NCCL on one GPU: typical, not measured here."""
FRAGMENTATION = 0.05
"""Share of the peak that PyTorch's allocator reserves beyond what is in use: typical, not measured here."""
PROCESS = 3.0e9
"""Host memory of one Python process with torch and CUDA loaded: typical, not measured here."""
GPUS_PER_HOST = 8


def estimate_memory(
    model: Model, layers: int, settings: dict, train: Train, ranks: int, length: int, teacher: int = 0
) -> dict:
    """Return the bytes of one GPU by `component` and by `phases`, of one `host`, and of a `checkpoint`
    and rank 0's part of it.

    The largest phase makes the `peak`. A teacher of `teacher` elements is whole and in fp32 on each GPU."""
    from inheritune.data.batches import Share

    zero = {**ZERO_DEFAULTS, **settings.get("zero_optimization", {})}
    optimizer_away, weights_away = read_offloads(settings)
    share = Share.of(train.batch_tokens // length, 0, ranks, settings["train_micro_batch_size_per_gpu"])
    precision = "bf16_autocast" if train.precision == "auto" else train.precision
    element, product_element = get_element_sizes(precision)
    setup = Setup(
        tensors=list_parameters(model, layers),
        zero=zero,
        ranks=ranks,
        accumulates=share.accumulation > 1,
        element=element,
        optimizer_away=optimizer_away,
        weights_away=weights_away,
    )
    checkpointing = settings.get("inheritune", {}).get("activation_checkpointing", False)
    tokens = share.micro_batch * length
    made = count_activations(model, layers, precision, tokens, length, checkpointing, setup.stage)
    states, host = offload_states(setup, count_states(setup))
    static = states.static
    if teacher:  # the divergence keeps two log-softmaxes in fp32, and makes a gradient of that size
        static += 4 * teacher + made["logits"]
        made["loss"] += 12 * made["logits"] / product_element
    logits = _count_validation_logits(model.vocab_size, length, product_element)
    phases = _count_phases(setup, states, made, static, logits)
    worst = max(phases, key=lambda phase: phases[phase])
    checkpoint = count_checkpoint_bytes(setup.trained, element * setup.whole, setup.stage)
    rank0 = count_rank0_bytes(checkpoint, setup.trained, ranks, setup.stage)
    return {
        "component": _name_components(states, made, teacher),
        "phases": phases,
        "peak_phase": worst,
        "peak": (phases[worst] + FRAMEWORK) * (1 + FRAGMENTATION),
        **_count_host_bytes(setup, host, rank0 if saves_in_background(settings, on_gpus=True) else 0),
        "checkpoint": checkpoint,
        "rank0": rank0,
        "weights_file": 4 * setup.whole,
    }


def estimate_evaluation(
    tensors: list[Parameter],
    head: int,
    vocab_size: int,
    zero: dict | None,
    precision: str,
    ranks: int,
    length: int,
) -> tuple[float, float]:
    """Return the bytes that one rank holds on (its device, its host) at the peak of an evaluation of fp32
    weights.

    Without `zero` each rank has a whole copy, built on the host before the device gets it, of which autocast
    rounds the matrices and, if it is tied, the `head` (its elements, else 0). With it, a JSON's
    zero_optimization at ZeRO 3, each has a part, which `offload_param` keeps on the host."""
    product_element = get_element_sizes(precision)[1]
    logits = _count_validation_logits(vocab_size, length, product_element)
    kept_by = ((zero or {}).get("offload_param") or {}).get("device", "none")
    setup = Setup(
        tensors=tensors,
        zero={**ZERO_DEFAULTS, **(zero or {})},
        ranks=ranks,
        accumulates=False,
        element=4,
        optimizer_away=False,
        weights_away=kept_by != "none",
    )
    if zero:
        rounded = product_element * setup.largest if product_element < 4 else 0  # one matrix at a time
        return sum(count_sharded_weights(setup)) + rounded + logits, 4.0 * setup.part * (kept_by == "cpu")
    matrices = sum(t.numel for t in tensors if t.decayed) + head
    rounded = product_element * matrices if product_element < 4 else 0
    return 4 * setup.whole + rounded + logits, 4.0 * setup.whole


def _count_validation_logits(vocab_size: int, length: int, product_element: int) -> float:
    """Return the bytes of a validation batch's logits and of the chunk that the loss converts to fp32."""
    logits = EVAL_BATCH * length * vocab_size
    return logits * product_element + 8 * min(logits, LOSS_CHUNK)


def _count_phases(
    setup: Setup, states: States, made: dict[str, float], static: float, validation_logits: float
) -> dict[str, float]:
    """Return {phase of a step, or validation: bytes at its peak}."""
    sharded = setup.stage == 3
    before = static + states.live + (states.earlier_gradients if setup.accumulates or sharded else 0)
    forward = before + made["activations"] + made["autocast weights"] + made["logits"]
    kept = made["autocast weights"] if setup.accumulates and not sharded else 0  # engines/casts.py
    validation = static + states.live + validation_logits + made["autocast weights"]
    return {
        "loss": forward + made["loss"],
        "backward": forward + 4 * setup.largest + (states.reduction if setup.stage > 0 else 0),
        "reduction": static
        + states.live
        + states.gradients
        + states.late_gradients
        + states.reduction
        + kept,
        "optimizer step": static + states.gradients + states.step,
        "validation": validation + (states.gradients if sharded else 0),
    }


def _name_components(states: States, made: dict[str, float], teacher: int) -> dict[str, float]:
    return {
        "weights": states.weights,
        "masters": states.masters,
        "moments": states.moments,
        "gradients": states.gradients,
        "buckets": states.buckets,
        "teacher": 4 * teacher,
        "live weights": states.live,
        **made,
        "reduction": states.reduction,
        "optimizer step": states.step,
    }


def _count_host_bytes(setup: Setup, host: HostStates, rank0: float) -> dict[str, float]:
    """Return the bytes {host, pinned} of all ranks of one host. Saves in the background keep {copies} of
    them: those of the first host, where rank 0 copies `rank0` bytes."""
    on_host = min(setup.ranks, GPUS_PER_HOST)
    others = 12 * setup.trained / setup.ranks if setup.stage else 0
    copies = rank0 + (on_host - 1) * others if rank0 else 0
    # Below ZeRO 3 each process builds its whole model on the host, before the GPU gets it.
    starting = 0 if setup.stage == 3 else 4 * setup.whole
    return {
        "host": on_host * (PROCESS + max(starting, host.moved)) + copies,
        "pinned": on_host * host.pinned + copies,
        "copies": copies,
    }


def estimate_disk(planned: dict, train: Train, keep_at: int) -> float:
    """Return the bytes of a run's folder at its largest.

    It then holds the kept checkpoints and the one being written, the start, final/ and `keep_at` kept
    weights."""
    return (train.keep_last + 1) * planned["checkpoint"] + (2 + keep_at) * planned["weights_file"]
