"""`plan EXPERIMENT`: memory, time and disk of every run before it queues; by formulas, so that no GPU and no
model is needed.

What is exact (weights, masters, moments, gradients, checkpoint bytes) follows how DeepSpeed 0.19 lays tensors
out; activations count what autograd saves per token and block; FRAMEWORK and FRAGMENTATION are estimates for
a CUDA process. Bytes, unless a name says otherwise. Nothing at the top imports torch: `stages` uses these
hours on a batch host.
"""

import copy
import itertools
import json
import math
from dataclasses import dataclass

from inheritune.config.experiment import GPUS, Experiment, Model, Run, Train, load_experiment
from inheritune.config.values import ARGUMENTS
from inheritune.engines.sizes import checkpoint_bytes
from inheritune.errors import UserError, nearest
from inheritune.files.rundir import RunDir, read_json

FRAMEWORK = 1.5e9  # CUDA context, cuBLAS workspaces and NCCL's buffers of one GPU: typical, not measured here
FRAGMENTATION = (
    0.05  # of the peak: what PyTorch's allocator reserves beyond what is in use; typical, not measured here
)
PROCESS = 3.0e9  # host memory of one Python process with torch and CUDA loaded; typical, not measured here
GPUS_PER_HOST = 8
EVAL_BATCH = 8  # validate.EVAL_BATCH
LOSS_CHUNK = (
    1 << 26
)  # elements of the logits that the loss takes to fp32 at once on a GPU: validate._TokenLosses.CHUNK
MFU = 0.4
DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
}
"""DeepSpeed's own values of the keys that matter here, where a JSON is silent."""
ALLREDUCE_ELEMENTS = 5e8  # DeepSpeed flattens so many elements of the gradients at once at ZeRO 0


@dataclass(frozen=True)
class Tensor:
    """A parameter: its elements, whether it is trained, and whether it is decayed (then in AdamW's first
    group)."""

    numel: int
    trained: bool = True
    decayed: bool = False


def tensors(model: Model, layers: int) -> list[Tensor]:
    """Parameters of `model`, `layers` blocks deep, in the model's order; a tied head once."""
    d, f, vocabulary = model.width, model.mlp_width, Tensor(model.vocab_size * model.width)
    if model.family == "gpt2":  # biases are held at zero
        norm = [Tensor(d), Tensor(d, trained=False)]

        def linear(n, m):
            return [Tensor(n * m, decayed=True), Tensor(m, trained=False)]

        block = [*norm, *linear(d, 3 * d), *linear(d, d), *norm, *linear(d, f), *linear(f, d)]
        head = [] if model.tied_head else [Tensor(vocabulary.numel, decayed=True)]
        return [vocabulary, Tensor(model.positions * d), *block * layers, *norm, *head]
    kv = d * model.kv_heads // model.heads
    block = [Tensor(n * d, decayed=True) for n in (d, kv, kv, d, f, f, f)] + [Tensor(d), Tensor(d)]
    head = [] if model.tied_head else [Tensor(vocabulary.numel, decayed=True)]
    return [vocabulary, *block * layers, Tensor(d), *head]


def parameters(model: Model, layers: int) -> int:
    """Trained parameters, as models.count_parameters counts them."""
    return sum(t.numel for t in tensors(model, layers) if t.trained)


def matrix_elements(model: Model, layers: int) -> int:
    """Elements of the matrices that a token is multiplied with, the head's among them."""
    return (
        sum(t.numel for t in tensors(model, layers) if t.decayed)
        + model.vocab_size * model.width * model.tied_head
    )


def flops_per_token(model: Model, layers: int, length: int) -> float:
    """Training FLOPs per token, as models.flops_per_token counts them."""
    return 6.0 * matrix_elements(model, layers) + 12.0 * layers * model.width * length


def gpu_hours(
    model: Model, layers: int, train: Train, length: int, gpu: str = "H100", mfu: float = MFU
) -> float:
    """Hours of one GPU for a whole run, without evaluation, saving and queueing."""
    flops = train.steps * train.batch_tokens * flops_per_token(model, layers, length)
    return flops / (mfu * GPUS[gpu]["tflops"] * 1e12) / 3600


def models_of(experiment: Experiment, name: str) -> list[tuple[int | None, int]]:
    """(stage, layers) of every model that run `name` trains: one, one per stage of a grown run, none of an
    external one."""
    run, full = experiment.run(name), experiment.model.layers
    if run.init.external:
        return []
    if run.grow:
        return list(enumerate(run.grow.depths(run.init.inherit.layers, full), start=1))
    return [(None, experiment.layers_of(run))]


def shape_of(experiment: Experiment, run: Run) -> Model:
    """The experiment's model as `run` has it but for the depth: at half width as inherit.half_config cuts
    it."""
    model = experiment.model
    if not run.init.half_width:
        return model
    heads = model.heads // model.kv_heads * (model.kv_heads // 2)
    sizes = {"width": model.width * heads // model.heads, "mlp_width": model.mlp_width * heads // model.heads}
    return model.model_copy(update={"heads": heads, "kv_heads": model.kv_heads // 2, **sizes})


def teacher_layers(experiment: Experiment, run: Run) -> int:
    """Depth of the teacher of a distilled run (one from outside is taken to be as deep as the reference),
    else 0."""
    name = run.distil.teacher if run.distil else None
    return (
        experiment.layers_of(experiment.runs[name])
        if name in experiment.runs
        else experiment.model.layers
        if name
        else 0
    )


def teacher_size(experiment: Experiment, run: Run) -> int:
    """Elements of that teacher."""
    layers = teacher_layers(experiment, run)
    return sum(t.numel for t in tensors(experiment.model, layers)) if layers else 0


# --- memory -------------------------------------------------------------------------------------------------


def element_sizes(precision: str) -> tuple[int, int]:
    """Bytes of an element of (the weights and the residual stream, what enters a matrix product)."""
    return {"fp32": (4, 4), "bf16": (2, 2)}.get(precision, (4, 2))


def block_activations(
    model: Model, precision: str, length: int, keeps_inputs: bool = False, eager: bool = False
) -> float:
    """Bytes per token that autograd saves in one block, with flash or memory-efficient attention unless
    `eager`.

    `keeps_inputs`: DeepSpeed's linear function of ZeRO 3 saves its input before autocast rounds it."""
    r, e = element_sizes(precision)
    d, f = model.width, model.mlp_width
    attention = 4 * model.heads  # the log-sum-exp of each query
    if eager:  # the softmax, in fp32 where autocast or pure bf16 asks for it, and its copy for the product
        attention = model.heads * length * (4 if precision == "fp32" else 6)
    if model.family == "gpt2":
        norms = 2 * (r + e) * d + 16
        return norms + 4 * e * d + attention + 2 * e * f  # before and after the GELU
    kv = d * model.kv_heads // model.heads
    norms = 2 * (4 + r + (r if keeps_inputs else e)) * d + 8
    return norms + 2 * e * (d + kv) + attention + 4 * e * f  # q, k, v, out; gate, its SiLU, up, their product


def activations(
    model: Model,
    layers: int,
    precision: str,
    tokens: int,
    length: int,
    checkpointing: bool,
    stage: int = 0,
    eager: bool = False,
) -> dict[str, float]:
    """{activations, autocast weights, logits, loss} of a micro batch of `tokens` at the end of its forward;
    the loss adds, at the start of backward, the gradient of the logits and the softmax of a chunk of them."""
    r, e = element_sizes(precision)
    keeps_inputs = stage == 3 and model.family == "llama"  # GPT-2's Conv1D is not replaced
    block = block_activations(model, precision, length, keeps_inputs, eager)
    last = (r + e + (0 if model.family == "gpt2" else 4)) * model.width  # the final norm
    saved = layers * r * model.width + block if checkpointing else layers * block
    # autocast keeps each matrix's rounded copy for backward; with checkpointing only until forward ends
    rounded = 2 * matrix_elements(model, layers) if (r, e) == (4, 2) and not keeps_inputs else 0
    return {
        "activations": tokens * (saved + last),
        "autocast weights": rounded,
        "logits": tokens * model.vocab_size * e,
        "loss": tokens * model.vocab_size * e + 4 * min(tokens * model.vocab_size, LOSS_CHUNK),
    }


def partitions(its: list[Tensor], ranks: int, stage: int) -> tuple[list[int], int]:
    """([elements of a rank's part of each of AdamW's groups, padded], elements of all parameters that these
    parts touch)."""
    parts, touched = [], 0
    for group in ([t.numel for t in its if t.trained and t.decayed == decayed] for decayed in (True, False)):
        starts = [0, *itertools.accumulate(group)]
        # ZeRO 3 cuts each parameter, ZeRO 1 and 2 the flattened group, at even elements
        size = sum(-(-n // ranks) for n in group) if stage == 3 else -(-starts[-1] // (2 * ranks)) * 2
        ends = [(size * rank, size * (rank + 1)) for rank in range(ranks)]
        held = [
            sum(b - a for a, b in itertools.pairwise(starts) if a < last and b > first)
            for first, last in ends
        ]
        parts, touched = [*parts, size], touched + max(held)
    return parts, touched


def offloads(settings: dict) -> tuple[bool, bool]:
    """Whether (optimizer states, weights) lie on the host. Raises UserError for NVMe, which is not
    planned."""
    found = []
    for key in ("offload_optimizer", "offload_param"):
        device = settings.get("zero_optimization", {}).get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"plan knows zero_optimization.{key}.device 'cpu' and 'none' (got '{device}')")
        found.append(device == "cpu")
    return found[0], found[1]


def memory(
    model: Model, layers: int, settings: dict, train: Train, ranks: int, length: int, teacher: int = 0
) -> dict:
    """Bytes of one GPU by `component` and by `phases`, the largest of which makes the `peak`; of one `host`;
    on disk.

    A teacher, of so many elements, is on each GPU whole and in fp32. Gradients are those between the last
    backward and the step."""
    from inheritune.data.batches import Share

    zero = {**DEFAULTS, **settings.get("zero_optimization", {})}
    stage, (optimizer_away, weights_away) = int(zero.get("stage", 0)), offloads(settings)
    precision = "bf16_autocast" if train.precision == "auto" else train.precision
    b, e = element_sizes(precision)
    share = Share.of(train.batch_tokens // length, 0, ranks, settings["train_micro_batch_size_per_gpu"])
    its = tensors(model, layers)
    whole, trained, largest = sum(t.numel for t in its), parameters(model, layers), max(t.numel for t in its)
    parts, touched = partitions(its, ranks if stage else 1, stage)
    part, several = sum(parts), share.accumulation > 1
    checkpointing = settings.get("inheritune", {}).get("activation_checkpointing", False)
    made = activations(model, layers, precision, share.micro_batch * length, length, checkpointing, stage)

    held = {
        "weights": b * whole,
        "masters": 4 * part,
        "moments": 8 * part,
        "gradients": 4 * touched,
        "buckets": 0,
    }
    bucket = min(zero["reduce_bucket_size"], trained)
    live = between = 0  # gathered weights; gradients of the micro batches before
    if stage == 0:
        held["masters"], reducing, between = 0, 4 * min(trained, ALLREDUCE_ELEMENTS), 4 * trained
        step = last = 0
    elif (
        stage < 3
        # buckets are made anew in each backward; then a group's gradients are flattened, its norm taken in
        # fp64
    ):
        overlap = 2 if zero.get("overlap_comm") else 1
        reducing = b * zero["reduce_bucket_size"] * overlap
        step = max(4 * max(parts), 8 * min(largest, part))
        between = 4 * trained if stage == 1 else 4 * touched
        last = 4 * (trained - touched) if stage == 1 else 4 * touched * several  # beside held["gradients"]
    else:
        gathers = ranks > 1 or weights_away  # one rank's part is the whole weight
        persistent = zero["stage3_param_persistence_threshold"]
        kept = sum(t.numel for t in its if t.numel <= persistent) * gathers
        held["weights"] = b * (kept + (0 if weights_away else sum(-(-t.numel // ranks) for t in its)))
        if (
            second := zero.get("zero_hpz_partition_size", 1)
        ) > 1:  # hierarchical partitioning: a copy on each node, in shards
            held["weights"] += b * sum(
                t.numel // min(second, ranks) for t in its if t.numel > persistent or not t.trained
            )
        held |= {"gradients": 4 * part, "buckets": b * zero["reduce_bucket_size"]}
        at_once = max(zero["stage3_max_live_parameters"], largest + zero["stage3_prefetch_bucket_size"])
        live = b * min(whole - kept, at_once) * gathers
        reducing, step, last = 2 * b * bucket, 4 * min(max(parts), zero["sub_group_size"]), 0
        between = held["gradients"]
    pinned = moved = 0
    if optimizer_away:
        pinned = 12 * part if stage == 3 else (8 + b) * part + b * (largest + several * touched)
        moved = pinned + held["moments"]
        held |= {"masters": 0, "moments": 0, "gradients": b * largest}
        step, between, last = 0, between if stage == 1 else 0, last if stage == 1 else 0
    static = held["weights"] + held["masters"] + held["moments"] + held["buckets"]
    if teacher:  # the divergence keeps two log-softmaxes in fp32, and makes a gradient of that size
        static, made["loss"] = static + 4 * teacher + made["logits"], made["loss"] + 12 * made["logits"] / e
    before = static + live + between * (several or stage == 3)
    saved, logits = made["activations"] + made["autocast weights"], made["logits"]
    checked = EVAL_BATCH * length * model.vocab_size
    checked = checked * e + 8 * min(checked, LOSS_CHUNK)
    phases = {
        "loss": before + saved + logits + made["loss"],
        "backward": before + saved + logits + 4 * largest + reducing * (stage > 0),
        "reduction": static + live + held["gradients"] + last + reducing,
        "optimizer step": static + held["gradients"] + step,
        "validation": static + live + checked + made["autocast weights"] + held["gradients"] * (stage == 3),
    }
    worst = max(phases, key=phases.get)
    starting = 0 if stage == 3 else 4 * whole  # each process builds its model before the GPU gets it
    on_host = min(ranks, GPUS_PER_HOST)
    return {
        "component": held
        | {
            "teacher": 4 * teacher,
            "live weights": live,
            **made,
            "reduction": reducing,
            "optimizer step": step,
        },
        "phases": phases,
        "peak_phase": worst,
        "peak": (phases[worst] + FRAMEWORK) * (1 + FRAGMENTATION),
        "host": on_host * (PROCESS + max(starting, moved + b * part * weights_away)),
        "pinned": on_host * (pinned + b * part * weights_away),
        "checkpoint": checkpoint_bytes(trained, b * whole, stage),
        "weights_file": 4 * whole,
    }


def disk(planned: dict, train: Train, keep_at: int) -> float:
    """Bytes of a run's folder at its largest: kept checkpoints and the one being written, start, final/ and
    kept weights."""
    return (train.keep_last + 1) * planned["checkpoint"] + (2 + keep_at) * planned["weights_file"]


# --- a JSON that fits ---------------------------------------------------------------------------------------

STAGE_SLOWDOWN = (1.0, 1.01, 1.06, 1.25)
"""Rough factors on the time of a step, as those below: only their order matters, the cheapest change that
fits is proposed."""
SMALL_BUCKETS = ("reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
ON_HOST = {"device": "cpu", "pin_memory": True}


def proposals(settings: dict) -> list[tuple[float, dict]]:
    """(slowdown, {dotted key: new value}) of every change of `settings` that saves memory, cheapest first."""
    zero, micro = settings.get("zero_optimization", {}), settings["train_micro_batch_size_per_gpu"]
    stage, away = int(zero.get("stage", 0)), offloads(settings)
    small = {key: int(min(1e7, zero.get(key, DEFAULTS[key]))) for key in SMALL_BUCKETS}
    kinds = [
        [
            (1.05**halved, {"train_micro_batch_size_per_gpu": micro >> halved})
            for halved in range(micro.bit_length())
        ],
        [(1.0, {}), (1.33, {"inheritune.activation_checkpointing": True})],
        [
            (STAGE_SLOWDOWN[s] / STAGE_SLOWDOWN[stage], {"zero_optimization.stage": s})
            for s in range(stage, 4)
        ],
        [(1.0, {}), (1.03, {f"zero_optimization.{key}": value for key, value in small.items()})],
        [(1.0, {}), (2.0, {"zero_optimization.offload_optimizer": ON_HOST})],
        [(1.0, {}), (2.5, {"zero_optimization.offload_param": ON_HOST})],
    ]
    found = []
    for chosen in itertools.product(*kinds):
        patch = {key: value for _, keys in chosen for key, value in keys.items()}
        new_stage = patch["zero_optimization.stage"]
        optimizer, weights = (
            any("offload_" + what in key for key in patch) for what in ("optimizer", "param")
        )
        if (optimizer and not new_stage) or (weights and (new_stage < 3 or not (optimizer or away[0]))):
            continue
        patch = {key: value for key, value in patch.items() if new_stage == 3 or "stage3_" not in key}
        found.append(
            (
                math.prod(cost for cost, _ in chosen),
                {k: v for k, v in patch.items() if value_at(settings, k) != v},
            )
        )
    return sorted(found, key=lambda pair: (pair[0], len(pair[1])))


def value_at(settings: dict, key: str):
    """The value of a dotted key, or None."""
    outer, _, inner = key.rpartition(".")
    return (settings.get(outer, {}) if outer else settings).get(inner)


def changed(settings: dict, patch: dict) -> dict:
    """A copy of `settings` with the dotted keys of `patch` set."""
    new = copy.deepcopy(settings)
    for key, value in patch.items():
        outer, _, inner = key.rpartition(".")
        (new.setdefault(outer, {}) if outer else new)[inner] = value
    return new


# --- the verb -----------------------------------------------------------------------------------------------


def plan_model(
    experiment: Experiment,
    run: str,
    stage: int | None,
    layers: int,
    settings: dict,
    gpus: int,
    room: float,
    gpu: str,
    mfu: float,
) -> dict:
    """Everything `plan` says of one model: sizes, work, memory, disk, and the change that fits `room` bytes
    if it does not."""
    from inheritune.data.batches import Share

    spec, length = experiment.run(run), experiment.data.sequence_length
    train, model, taught_by = (
        experiment.train_of(spec),
        shape_of(experiment, spec),
        teacher_layers(experiment, spec),
    )
    sequences = train.batch_tokens // length
    ranks = min(gpus, sequences)
    teacher = teacher_size(experiment, spec)
    planned = memory(model, layers, settings, train, ranks, length, teacher)
    flops = train.steps * train.batch_tokens * flops_per_token(model, layers, length)
    if taught_by:  # of its forward and backward passes only the forward one, a third
        flops += train.steps * train.batch_tokens * flops_per_token(experiment.model, taught_by, length) / 3
    hours = flops / (mfu * GPUS[gpu]["tflops"] * 1e12) / 3600
    share = Share.of(sequences, 0, ranks, settings["train_micro_batch_size_per_gpu"])
    useful = sequences / (ranks * share.micro_batch * share.accumulation)
    facts = {
        "run": run,
        "stage": stage,
        "layers": layers,
        "parameters": parameters(model, layers),
        "steps": train.steps,
        "tokens": train.steps * train.batch_tokens,
        "flops": flops,
        "gpu_hours": hours,
        "gpus": ranks,
        "hours": hours / ranks / useful,  # padding is computed too
        "batch": share.describe(sequences, ranks, settings["train_micro_batch_size_per_gpu"], length),
        "full_micro_batches_up_to_gpus": max(1, sequences // settings["train_micro_batch_size_per_gpu"]),
        "most_gpus": sequences,
        "disk": disk(planned, train, len(spec.keep_at)),
        "fits": planned["peak"] <= room,
        **planned,
    }
    if not facts["fits"]:

        def peak(patch: dict) -> float:
            return memory(model, layers, changed(settings, patch), train, ranks, length, teacher)["peak"]

        patch = facts["change"] = next((p for _, p in proposals(settings) if peak(p) <= room), None)
        lines = [
            [f'- "{key}": {json.dumps(value_at(settings, key))}', f'+ "{key}": {json.dumps(patch[key])}']
            for key in patch or ()
        ]
        facts["diff"] = list(itertools.chain(*lines))
    return facts


def plan_experiment(
    experiment: Experiment,
    run: str | None = None,
    settings: dict | None = None,
    gpus: int = 8,
    gpu: str = "H100",
    gpu_memory: float | None = None,
    mfu: float = MFU,
) -> list[dict]:
    """plan_model's facts of every model of `run`, or of all runs. Raises UserError for an unknown GPU, or
    nothing to train."""
    from inheritune.engines.engine import load_json

    if gpu not in GPUS:
        raise UserError(f"plan: --gpu '{gpu}' is not in inheritune/config/gpus.yaml; {nearest(gpu, GPUS)}")
    room = (gpu_memory or GPUS[gpu]["memory_gb"]) * 1e9
    found = []
    for name in [run] if run else experiment.runs:
        its = settings or load_json(experiment.train_of(experiment.run(name)).deepspeed)
        for stage, layers in models_of(experiment, name):
            found.append(plan_model(experiment, name, stage, layers, its, gpus, room, gpu, mfu))
    if not found:
        raise UserError(
            f"run '{run}' of {experiment.name} is a finished model of others; there is no training to plan"
        )
    return found


def plan(
    experiment: str,
    run: str | None = None,
    ds: str | None = None,
    gpus: int = 8,
    gpu: str = "H100",
    gpu_memory: int | None = None,
    mfu: float = MFU,
    as_json: bool = False,
    against: str | None = None,
    rehearse=None,
) -> None:
    """Print the plan of `run`, or of every run; or, `against` a run's folder, predicted beside measured."""
    from inheritune.engines.engine import load_json

    for name, value in (("mfu", mfu), ("gpus", gpus), ("gpu_memory", gpu_memory)):
        kind = ARGUMENTS[name]
        if value is not None and (problem := kind.problem(value)):
            raise UserError(
                f"plan: --{name.replace('_', '-')} {kind.says or f'must be {problem}'} (got {value})"
            )
    loaded = load_experiment(experiment, rehearse)
    if against:
        rows = compare(RunDir(against), loaded)
        shown = [[what, gb(its), gb(got), f"{its / max(1, got) - 1:+.1%}"] for what, its, got in rows]
        print(
            json.dumps(rows) if as_json else table(["per rank", "planned", "measured", "planned is"], shown)
        )
        return
    plans = plan_experiment(loaded, run, load_json(ds) if ds else None, gpus, gpu, gpu_memory, mfu)
    if as_json:
        print(json.dumps(plans, indent=2))
        return
    room, named = gpu_memory or GPUS[gpu]["memory_gb"], {}
    for facts in plans if run else []:
        print(describe(facts), end="\n\n")
    rows = [
        [
            title(facts),
            facts["layers"],
            f"{facts['parameters'] / 1e6:,.0f}M",
            f"{facts['tokens'] / 1e9:.1f}B",
            f"{facts['flops']:.1e}",
            f"{facts['gpu_hours']:,.1f}",
            f"{facts['hours']:,.1f}",
            gb(facts["peak"]),
            "yes" if facts["fits"] else "NO",
            gb(facts["disk"]),
        ]
        for facts in plans
    ]
    print(table("run layers parameters tokens FLOPs GPU-hours hours peak/GPU fits disk".split(), rows))  # noqa: SIM905
    print(
        f"in all {sum(facts['gpu_hours'] for facts in plans):,.1f} GPU-hours, if every stage of growth is "
        f"needed, and "
        f"{gb(sum(facts['disk'] for facts in plans))} of disk; {gpus} x {gpu} ({room} GB) at {mfu:.0%} of "
        f"{GPUS[gpu]['tflops']:g} TFLOP/s, without evaluation, saving and queueing"
    )
    for facts in plans:
        if not facts["fits"]:
            named.setdefault("\n    ".join(facts["diff"]), []).append(title(facts))
    for diff, names in named.items():
        way_out = (
            f"the smallest change of the JSON that fits:\n    {diff}"
            if diff
            else "no change of the JSON fits: take more GPUs"
        )
        print(f"{', '.join(names)}: too large; {way_out}")


def title(facts: dict) -> str:
    return facts["run"] + (f" stage {facts['stage']}" if facts["stage"] else "")


def describe(facts: dict) -> str:
    """One model in words: batch, memory by component and by phase, host, disk."""
    parts, phases = (
        ", ".join(f"{what} {gb(size)}" for what, size in facts[kind].items() if size)
        for kind in ("component", "phases")
    )
    return (
        f"{title(facts)}: {facts['batch']}\n"
        f"  whole micro batches up to {facts['full_micro_batches_up_to_gpus']} GPUs; at most "
        f"{facts['most_gpus']} GPUs\n"
        f"  one GPU holds: {parts}\n  its phases: {phases}\n"
        f"  peak {gb(facts['peak'])} in '{facts['peak_phase']}', with {gb(FRAMEWORK)} of CUDA and NCCL and "
        f"{FRAGMENTATION:.0%} for the allocator (these two are estimates)\n"
        f"  one host: {gb(facts['host'])} of memory, {gb(facts['pinned'])} of it pinned (up to twice that "
        f"where torch rounds "
        f"blocks up to powers of two); a checkpoint: {gb(facts['checkpoint'])}; the run's folder: "
        f"{gb(facts['disk'])}"
    )


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def table(heads: list, rows: list[list]) -> str:
    from tabulate import tabulate

    return tabulate(
        rows,
        heads,
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(heads) - 1),
    )


def compare(folder: RunDir, experiment: Experiment) -> list[list]:
    """[component, planned, measured] of a finished run: the same JSON, ranks and precision as its last start.

    Raises UserError if the run has left no measurement."""
    results = folder.read_results() if folder.results.is_file() else {}
    measured = [rank for rank in results.get("memory", []) if "weights" in rank]
    if not measured:
        raise UserError(
            f"{folder.path} holds no measured memory (results.json of a finished run); train it to its end "
            f"first"
        )
    start = folder.read_starts("deepspeed", "ranks")[-1]
    spec = experiment.run(results["run"])
    train = experiment.train_of(spec).model_copy(update={"precision": results["precision"]})
    length = experiment.data.sequence_length
    shape, teacher = shape_of(experiment, spec), teacher_size(experiment, spec)
    planned = memory(shape, results["layers"], start["deepspeed"], train, start["ranks"], length, teacher)
    held = ("weights", "masters", "moments", "gradients")
    rows = [[what, planned["component"][what], max(rank[what] for rank in measured)] for what in held]
    for step in folder.complete_checkpoints()[-1:]:  # a short run has saved none
        files = read_json(folder.checkpoint(step) / "COMPLETE")["files"]
        rows.append(["checkpoint", planned["checkpoint"], sum(facts["bytes"] for facts in files.values())])
    peak = planned["phases"][
        planned["peak_phase"]
    ]  # without what CUDA and NCCL hold, which torch does not count either
    for what, its in (("allocated", peak), ("reserved", peak * (1 + FRAGMENTATION))):
        peaks = [rank["peak"][what] for rank in measured if what in rank["peak"]]
        rows += [[f"peak {what}", its, max(peaks)]] if peaks else []
    return rows
