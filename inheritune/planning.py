"""`plan EXPERIMENT`: memory, time and disk of every run before it queues; by formulas, so that no GPU and no model is needed.

What is exact (weights, masters, moments, gradients, checkpoint bytes) follows how DeepSpeed 0.19 lays tensors out; activations
count what autograd saves per token and block; FRAMEWORK and FRAGMENTATION are estimates for a CUDA process. Bytes, unless a
name says otherwise. Nothing at the top imports torch: `stages` uses these hours on a batch host.
"""

import copy
import itertools
import json
from dataclasses import dataclass

from inheritune.batches import Share
from inheritune.config import GPUS, Experiment, Model, Run, Train, UserError, load_experiment, nearest
from inheritune.rundir import RunDir, read_json

FRAMEWORK = 1.5e9  # CUDA context, cuBLAS workspaces and NCCL's buffers of one GPU: typical, not measured here
FRAGMENTATION = 0.05  # of the peak: what PyTorch's allocator reserves beyond what is in use; typical, not measured here
PROCESS = 3.0e9  # host memory of one Python process with torch and CUDA loaded; typical, not measured here
GPUS_PER_HOST = 8
EVAL_BATCH = 8  # validate.EVAL_BATCH
MFU = 0.4
DEFAULTS = {  # DeepSpeed's own, where a JSON is silent
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
}
ALLREDUCE_ELEMENTS = 5e8  # DeepSpeed flattens so many elements of the gradients at once at ZeRO 0


@dataclass(frozen=True)
class Tensor:
    """A parameter: its elements, whether it is trained, and whether it is decayed (then in AdamW's first group)."""

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
    tied = model.vocab_size * model.width if model.tied_head else 0
    return sum(t.numel for t in tensors(model, layers) if t.decayed) + tied


def flops_per_token(model: Model, layers: int, length: int) -> float:
    """Training FLOPs per token, as models.flops_per_token counts them."""
    return 6.0 * matrix_elements(model, layers) + 12.0 * layers * model.width * length


def gpu_hours(model: Model, layers: int, train: Train, length: int, gpu: str = "H100", mfu: float = MFU) -> float:
    """Hours of one GPU for a whole run, without evaluation, saving and queueing."""
    flops = train.steps * train.batch_tokens * flops_per_token(model, layers, length)
    return flops / (mfu * GPUS[gpu]["tflops"] * 1e12) / 3600


def models_of(experiment: Experiment, name: str) -> list[tuple[int | None, int]]:
    """(stage, layers) of every model that run `name` trains: one, one per stage of a grown run, none of an external one."""
    run, full = experiment.run(name), experiment.model.layers
    if run.init.external:
        return []
    if run.grow:
        return list(enumerate(run.grow.depths(run.init.inherit.layers, full), start=1))
    return [(None, experiment.layers_of(run))]


def shape_of(experiment: Experiment, run: Run) -> Model:
    """The experiment's model as `run` has it but for the depth: at half width as inherit.half_config cuts it."""
    model = experiment.model
    if not run.init.half_width:
        return model
    heads = model.heads // model.kv_heads * (model.kv_heads // 2)
    sizes = {"width": model.width * heads // model.heads, "mlp_width": model.mlp_width * heads // model.heads}
    return model.model_copy(update={"heads": heads, "kv_heads": model.kv_heads // 2, **sizes})


def teacher_layers(experiment: Experiment, run: Run) -> int:
    """Depth of the teacher of a distilled run (one from outside is taken to be as deep as the reference), else 0."""
    name = run.distil.teacher if run.distil else None
    return experiment.layers_of(experiment.runs[name]) if name in experiment.runs else experiment.model.layers if name else 0


# --- memory ---------------------------------------------------------------------------------------------------------------


def element_sizes(precision: str) -> tuple[int, int]:
    """Bytes of an element of (the weights and the residual stream, what enters a matrix product)."""
    return {"fp32": (4, 4), "bf16": (2, 2)}.get(precision, (4, 2))


def block_activations(model: Model, precision: str, length: int, keeps_inputs: bool = False, eager: bool = False) -> float:
    """Bytes per token that autograd saves in one block, with flash or memory-efficient attention unless `eager`.

    `keeps_inputs`: DeepSpeed's linear function of ZeRO 3 saves its input before autocast rounds it."""
    r, e = element_sizes(precision)
    d, f = model.width, model.mlp_width
    attention = 4 * model.heads  # the log-sum-exp of each query
    if eager:  # the softmax, in fp32 where autocast or pure bf16 asks for it, and its copy for the product
        attention = model.heads * length * (4 if precision == "fp32" else 6)
    if model.family == "gpt2":
        norms = 2 * (r + e) * d + 16
        # gelu_new is written out: x^3's x, tanh, 1 + tanh, x / 2 and the result; autocast takes x^3 in fp32
        gelu = 16 * f if (r, e) == (4, 2) else 5 * e * f
        return norms + 4 * e * d + attention + gelu
    kv = d * model.kv_heads // model.heads
    norms = 2 * (4 + r + (r if keeps_inputs else e)) * d + 8
    return norms + 2 * e * (d + kv) + attention + 4 * e * f  # q, k, v, out; gate, its SiLU, up, their product


def activations(model: Model, layers: int, precision: str, tokens: int, length: int, checkpointing: bool, stage: int = 0,
                eager: bool = False) -> dict[str, float]:  # fmt: skip
    """{activations, autocast weights, logits, loss} of a micro batch of `tokens` at the end of its forward; the loss adds
    log-probabilities (saved) and, at the start of backward, two gradients of that size."""
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
        "loss": tokens * model.vocab_size * 12,
    }


def partitions(its: list[Tensor], ranks: int, stage: int) -> tuple[int, int]:
    """(elements of a rank's part of the trained parameters with padding; elements of all parameters that the part touches)."""
    if stage == 3:
        part = sum(-(-t.numel // ranks) for t in its if t.trained)
        return part, part
    part = touched = 0
    for decayed in (True, False):
        ends = list(itertools.accumulate(t.numel for t in its if t.trained and t.decayed == decayed))
        size = -(-ends[-1] // (2 * ranks)) * 2  # DeepSpeed aligns to two elements a rank
        starts = [0, *ends]
        touched += max(
            sum(b - a for a, b in itertools.pairwise(starts) if a < size * (rank + 1) and b > size * rank)
            for rank in range(ranks)
        )
        part += size
    return part, touched


def offloads(settings: dict) -> tuple[bool, bool]:
    """Whether (optimizer states, weights) lie on the host. Raises UserError for NVMe, which is not planned."""
    found = []
    for key in ("offload_optimizer", "offload_param"):
        device = settings.get("zero_optimization", {}).get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"plan knows zero_optimization.{key}.device 'cpu' and 'none' (got '{device}')")
        found.append(device == "cpu")
    return found[0], found[1]


def memory(model: Model, layers: int, settings: dict, train: Train, ranks: int, length: int, teacher: int = 0) -> dict:
    """Bytes of one GPU by `component`, its `phases` and their largest, `peak`; of one `host`; and of one `checkpoint`. A
    teacher, of so many elements, is on each GPU whole and in fp32."""
    zero = {**DEFAULTS, **settings.get("zero_optimization", {})}
    stage, (optimizer_away, weights_away) = int(zero.get("stage", 0)), offloads(settings)
    precision = "bf16_autocast" if train.precision == "auto" else train.precision
    b, e = element_sizes(precision)
    share = Share.of(train.batch_tokens // length, 0, ranks, settings["train_micro_batch_size_per_gpu"])
    its = tensors(model, layers)
    whole, trained = sum(t.numel for t in its), sum(t.numel for t in its if t.trained)
    part, touched = partitions(its, ranks, stage) if stage else (trained, trained)
    largest = max(t.numel for t in its)
    several, overlap = share.accumulation > 1, zero.get("overlap_comm") or (zero.get("overlap_comm") is None and stage == 3)
    dtypes = [4, 2] if precision == "bf16_autocast" else [4 if precision == "fp32" else 2]
    ours = settings.get("inheritune", {})
    micro = share.micro_batch * length
    made = activations(model, layers, precision, micro, length, bool(ours.get("activation_checkpointing")), stage)

    component = {"weights": b * whole, "masters": 4 * part if stage else 0, "moments": 8 * part}
    bucket = min(zero["reduce_bucket_size"], trained) if stage else min(trained, ALLREDUCE_ELEMENTS)
    live = between = step = 0.0
    if stage == 3:
        kept = sum(t.numel for t in its if t.numel <= zero["stage3_param_persistence_threshold"])
        component["weights"] = b * (0 if weights_away else sum(-(-t.numel // ranks) for t in its)) + b * kept
        live = b * min(whole - kept, max(zero["stage3_max_live_parameters"], largest + zero["stage3_prefetch_bucket_size"]))
        component["gradients"] = 0 if optimizer_away else 4 * part
        component["buckets"] = sum(dtypes) * zero["reduce_bucket_size"]  # held all the time, full size
        reduce = max(dtypes) * 2 * bucket  # the same, interleaved by rank, and its parts
        step = 0 if optimizer_away else 4 * min(part, zero["sub_group_size"])
    elif stage:
        component["gradients"] = b * largest if optimizer_away else 4 * touched if stage == 2 or several else 0
        component["buckets"] = 0  # made anew in each backward, one for each type that gradients travel in
        buffers = b * zero["reduce_bucket_size"] * len(dtypes) * (2 if overlap else 1)
        reduce = buffers + (bucket * 2 if precision == "bf16_autocast" else 0)
        if stage == 1:
            between, component["gradients"] = 4 * trained if several else 0, 4 * trained
        elif several and not optimizer_away:
            between = 4 * touched
        step = 0 if optimizer_away else 4 * part + 8 * min(largest, part)
    else:
        component["gradients"], component["buckets"], reduce = 4 * trained, 0, 4 * bucket
        between = 4 * trained if several else 0
    if optimizer_away:
        component["masters"] = component["moments"] = 0
    static = component["weights"] + component["masters"] + component["moments"] + component["buckets"]
    static += (component["gradients"] if stage == 3 else 0) + (4 * teacher + made["logits"] if teacher else 0)
    final = 0 if stage == 3 else component["gradients"] + (4 * touched if stage == 2 and several and not optimizer_away else 0)
    saved = made["activations"] + made["autocast weights"]
    logits = made["logits"]
    phases = {
        "loss": static + between + live + saved + logits + made["loss"],
        "backward": static + between + live + saved + 2 * logits + 4 * largest + (reduce if stage else 0),
        "reduction": static + final + live + logits + reduce,
        "optimizer step": static + (0 if stage == 3 else component["gradients"]) + step + logits,
        "validation": static + live + EVAL_BATCH * length * model.vocab_size * (e + 8) + 2 * matrix_elements(model, layers),
    }
    component |= {"teacher": 4 * teacher, "live weights": live, **made, "reduction buffers": reduce, "optimizer step": step}
    worst = max(phases, key=phases.get)
    on_host = min(ranks, GPUS_PER_HOST)
    pinned = 0.0
    if optimizer_away:
        pinned = (4 + 4 + (4 if stage == 3 else b)) * part + (0 if stage == 3 else b * (largest + several * touched))
    pinned += b * part if weights_away else 0
    moments_on_host = 8 * part if optimizer_away else 0
    starting = 0 if stage == 3 else 4 * whole  # each process builds its model before the GPU gets it
    return {
        "component": component,
        "phases": phases,
        "peak_phase": worst,
        "peak": (phases[worst] + FRAMEWORK) * (1 + FRAGMENTATION),
        "host": on_host * (PROCESS + max(starting, pinned + moments_on_host)),
        "pinned": on_host * pinned,
        "checkpoint": checkpoint_bytes(trained, b * whole, stage),
        "weights_file": 4 * whole,
        "micro_batch": share.micro_batch,
        "accumulation": share.accumulation,
    }


def checkpoint_bytes(trained: int, weights: int, stage: int) -> int:
    """Bytes of one checkpoint: fp32 masters and two moments of what is trained; below ZeRO 3 the weights beside them, which
    at ZeRO 0 are the masters."""
    return 12 * trained + (weights - 4 * trained if stage == 0 else weights if stage < 3 else 0)


def disk(planned: dict, train: Train, keep_at: int) -> float:
    """Bytes of a run's folder at its largest: kept checkpoints and the one being written, start, final/ and kept weights."""
    return (train.keep_last + 1) * planned["checkpoint"] + (2 + keep_at) * planned["weights_file"]


# --- a JSON that fits ------------------------------------------------------------------------------------------------------

SLOWDOWN = {  # rough factors on the time of a step: only their order matters, the cheapest change that fits is proposed
    "halved micro batch": 1.05,
    "small buckets": 1.03,
    "activation_checkpointing": 1.33,
    "stage": (1.0, 1.01, 1.06, 1.25),
    "offload_optimizer": 2.0,
    "offload_param": 2.5,
}


def proposals(settings: dict) -> list[tuple[float, dict]]:
    """(slowdown, settings) of every change of `settings` in SLOWDOWN's keys that saves memory, cheapest first."""
    zero = settings.get("zero_optimization", {})
    stage, micro = int(zero.get("stage", 0)), settings["train_micro_batch_size_per_gpu"]
    away = offloads(settings)
    found = []
    for new_stage, halvings, checkpointing, small, optimizer, weights in itertools.product(
        range(stage, 4), range(micro.bit_length()), (False, True), (False, True), (away[0], True), (away[1], True)
    ):
        if (optimizer and not new_stage) or (weights and (new_stage < 3 or not optimizer)):
            continue
        new = copy.deepcopy(settings)
        new["train_micro_batch_size_per_gpu"] = micro >> halvings
        new_zero = new.setdefault("zero_optimization", {})
        new_zero["stage"] = new_stage
        cost = SLOWDOWN["halved micro batch"] ** halvings * SLOWDOWN["stage"][new_stage] / SLOWDOWN["stage"][stage]
        if checkpointing and not new.get("inheritune", {}).get("activation_checkpointing"):
            new.setdefault("inheritune", {})["activation_checkpointing"] = True
            cost *= SLOWDOWN["activation_checkpointing"]
        if small:
            keys = {1: ["reduce_bucket_size"], 2: ["reduce_bucket_size"]}.get(
                new_stage, ["reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size"]
            )
            new_zero |= {key: int(min(1e7, new_zero.get(key, DEFAULTS[key]))) for key in keys if new_stage}
            cost *= SLOWDOWN["small buckets"]
        for key, wanted, before in (("offload_optimizer", optimizer, away[0]), ("offload_param", weights, away[1])):
            if wanted and not before:
                new_zero[key] = {"device": "cpu", "pin_memory": True}
                cost *= SLOWDOWN[key]
        found.append((cost, new))
    return sorted(found, key=lambda pair: pair[0])


def smallest_change(fits, settings: dict) -> dict | None:
    """The cheapest settings for which `fits` answers true, or None."""
    return next((new for _, new in proposals(settings) if fits(new)), None)


def difference(before: dict, after: dict, prefix: str = "") -> list[str]:
    """Lines '- "key": old' and '+ "key": new' of two settings, nested keys joined by dots."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(new, dict):
            lines += difference(old or {}, new, f"{prefix}{key}.")
        elif old != new:
            lines += [f'- "{prefix}{key}": {json.dumps(old)}'] * (key in before) + [f'+ "{prefix}{key}": {json.dumps(new)}']
    return lines


# --- the verb --------------------------------------------------------------------------------------------------------------


def plan_model(experiment: Experiment, run: str, stage: int | None, layers: int, settings: dict, gpus: int, room: float,
               gpu: str, mfu: float) -> dict:  # fmt: skip
    """Everything `plan` says of one model: sizes, work, memory, disk, and the change that fits `room` bytes if it does not."""
    spec, length = experiment.run(run), experiment.data.sequence_length
    train, model, taught_by = experiment.train_of(spec), shape_of(experiment, spec), teacher_layers(experiment, spec)
    sequences = train.batch_tokens // length
    ranks = min(gpus, sequences)
    teacher = sum(t.numel for t in tensors(experiment.model, taught_by)) if taught_by else 0
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
        change = smallest_change(
            lambda new: memory(model, layers, new, train, ranks, length, teacher)["peak"] <= room, settings
        )
        facts["change"] = None if change is None else difference(settings, change)
    return facts


def plan_experiment(experiment: Experiment, run: str | None = None, settings: dict | None = None, gpus: int = 8,
                    gpu: str = "H100", gpu_memory: float | None = None, mfu: float = MFU) -> list[dict]:  # fmt: skip
    """plan_model's facts of every model of `run`, or of all runs. Raises UserError for an unknown GPU, or nothing to train."""
    from inheritune.engine import load_json

    if gpu not in GPUS:
        raise UserError(f"plan: --gpu '{gpu}' is not in inheritune/gpus.yaml; {nearest(gpu, GPUS)}")
    room = (gpu_memory or GPUS[gpu]["memory_gb"]) * 1e9
    found = []
    for name in [run] if run else experiment.runs:
        its = settings or load_json(experiment.train_of(experiment.run(name)).deepspeed)
        for stage, layers in models_of(experiment, name):
            found.append(plan_model(experiment, name, stage, layers, its, gpus, room, gpu, mfu))
    if not found:
        raise UserError(f"run '{run}' of {experiment.name} is a finished model of others; there is no training to plan")
    return found


def plan(experiment: str, run: str | None = None, ds: str | None = None, gpus: int = 8, gpu: str = "H100",
         gpu_memory: int | None = None, mfu: float = MFU, as_json: bool = False, against: str | None = None,
         rehearse=None) -> None:  # fmt: skip
    """Print the plan of `run`, or of every run; or, `against` a run's folder, predicted beside measured."""
    from inheritune.engine import load_json

    if not 0 < mfu <= 1:
        raise UserError(f"plan: --mfu is the share of the GPU's peak rate that is used, between 0 and 1 (got {mfu})")
    loaded = load_experiment(experiment, rehearse)
    if against:
        rows = compare(RunDir(against), loaded)
        print(json.dumps(rows, indent=2) if as_json else table(["bytes per rank", "planned", "measured"], rows))
        return
    plans = plan_experiment(loaded, run, load_json(ds) if ds else None, gpus, gpu, gpu_memory, mfu)
    if as_json:
        print(json.dumps(plans, indent=2))
        return
    room = gpu_memory or GPUS[gpu]["memory_gb"]
    for facts in plans if run else []:
        print(describe(facts), end="\n\n")
    rows = [
        [
            facts["run"] + (f" stage {facts['stage']}" if facts["stage"] else ""), facts["layers"],
            f"{facts['parameters'] / 1e6:,.0f}M", f"{facts['tokens'] / 1e9:.1f}B", f"{facts['flops']:.1e}",
            f"{facts['gpu_hours']:,.1f}", f"{facts['hours']:,.1f}", gb(facts["peak"]), "yes" if facts["fits"] else "NO",
            gb(facts["disk"]),
        ]
        for facts in plans
    ]  # fmt: skip
    heads = ["run", "layers", "parameters", "tokens", "FLOPs", "GPU-hours", "hours", "peak/GPU", "fits", "disk"]
    print(table(heads, rows))
    hours, folders = sum(facts["gpu_hours"] for facts in plans), sum(facts["disk"] for facts in plans)
    print(
        f"in all {hours:,.1f} GPU-hours, if every stage of growth is needed, and {gb(folders)} of disk; "
        f"{gpus} x {gpu} ({room} GB) at {mfu:.0%} of {GPUS[gpu]['tflops']:g} TFLOP/s, without evaluation, saving and queueing"
    )
    for facts in plans:
        if not facts["fits"]:
            print(f"{facts['run']} ({facts['layers']} layers) does not fit; " + way_out(facts))


def way_out(facts: dict) -> str:
    if facts["change"] is None:
        return "no change of the JSON fits: take more GPUs, or GPUs with more memory"
    return "the smallest change of the JSON that fits:\n    " + "\n    ".join(facts["change"])


def describe(facts: dict) -> str:
    """One model in words: batch, memory by component and by phase, host, disk."""
    title = f"{facts['run']}{' stage ' + str(facts['stage']) if facts['stage'] else ''}, {facts['layers']} layers"
    parts = ", ".join(f"{what} {gb(size)}" for what, size in facts["component"].items() if size)
    phases = ", ".join(f"{what} {gb(size)}" for what, size in facts["phases"].items())
    checkpoint = f"a checkpoint: {gb(facts['checkpoint'])}"
    return (
        f"{title}: {facts['batch']}\n"
        f"  whole micro batches up to {facts['full_micro_batches_up_to_gpus']} GPUs; at most {facts['most_gpus']} GPUs\n"
        f"  one GPU holds: {parts}\n"
        f"  its phases: {phases}\n"
        f"  peak {gb(facts['peak'])} in '{facts['peak_phase']}', with {gb(FRAMEWORK)} of CUDA and NCCL and "
        f"{FRAGMENTATION:.0%} for the allocator (these two are estimates)\n"
        f"  one host: {gb(facts['host'])} of memory, {gb(facts['pinned'])} of it pinned; {checkpoint}; "
        f"the run's folder: {gb(facts['disk'])}"
    )


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def table(heads: list, rows: list[list], style: str = "simple") -> str:
    from tabulate import tabulate

    return tabulate(rows, heads, tablefmt=style, disable_numparse=True, colalign=["left"] + ["right"] * (len(heads) - 1))


def compare(folder: RunDir, experiment: Experiment) -> list[list]:
    """[component, planned, measured] of a finished run: the same JSON, ranks and precision as its last start.

    Raises UserError if the run has left no measurement."""
    results = read_json(folder.results) if folder.results.is_file() else {}
    measured = [rank for rank in results.get("memory", []) if "weights" in rank]
    if not measured:
        raise UserError(f"{folder.path} holds no measured memory (results.json of a finished run); train it to its end first")
    start = read_json(folder.provenance)["starts"][-1]
    train = experiment.train_of(experiment.run(results["run"])).model_copy(update={"precision": results["precision"]})
    length = experiment.data.sequence_length
    planned = memory(experiment.model, results["layers"], start["deepspeed"], train, start["ranks"], length)
    held = ("weights", "masters", "moments", "gradients")
    rows = [[what, planned["component"][what], max(rank[what] for rank in measured)] for what in held]
    files = read_json(folder.checkpoint(folder.complete_checkpoints()[-1]) / "COMPLETE")["files"]
    rows.append(["checkpoint", planned["checkpoint"], sum(facts["size"] for facts in files.values())])
    for what, its in (("allocated", planned["phases"][planned["peak_phase"]]), ("reserved", planned["peak"])):
        peaks = [rank["peak"][what] for rank in measured if what in rank["peak"]]
        rows += [[f"peak {what}", its, max(peaks)]] if peaks else []
    return [[what, f"{its:,.0f}", f"{got:,.0f}"] for what, its, got in rows]
