"""`plan EXPERIMENT`: print the memory, time and disk of every run before it queues. The formulas need no GPU
and build no model."""

import itertools
import json
from collections.abc import Callable

from inheritune.config.catalog import GPU_SPECS
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.run import Run
from inheritune.config.values import ARGUMENTS
from inheritune.engines.deepspeed_keys import saves_in_background
from inheritune.errors import UserError, suggest_name
from inheritune.files.rundir import RunDir
from inheritune.models.sizes import FORWARD_SHARE, count_trained_elements, predict_flops_per_token
from inheritune.planning.measured import compare_measured
from inheritune.planning.memory import estimate_disk, estimate_memory
from inheritune.planning.proposals import apply_change, get_value, propose_changes
from inheritune.planning.report import describe_plan, format_comparison, format_plans
from inheritune.planning.saving import estimate_saving
from inheritune.planning.workload import (
    MFU,
    count_teacher_elements,
    estimate_hours,
    get_teacher_depth,
    list_models,
    resolve_shape,
)


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
    rehearse: bool | None = None,
) -> None:
    """Print the plan of `run`, or of every run. With `against`, the folder of a finished run, print what was
    planned and what was measured."""
    from inheritune.engines.deepspeed_json import load_deepspeed_json

    _check_numbers(mfu=mfu, gpus=gpus, gpu_memory=gpu_memory)
    loaded = load_experiment(experiment, rehearse)
    if against:
        rows = compare_measured(RunDir(against), loaded)
        print(json.dumps(rows) if as_json else format_comparison(rows))
        return
    plans = plan_experiment(loaded, run, load_deepspeed_json(ds) if ds else None, gpus, gpu, gpu_memory, mfu)
    if as_json:
        print(json.dumps(plans, indent=2))
        return
    for facts in plans if run else []:
        print(describe_plan(facts), end="\n\n")
    print(format_plans(plans, gpus, gpu, gpu_memory or GPU_SPECS[gpu]["memory_gb"], mfu))


def _check_numbers(**numbers: float | None) -> None:
    """Raise UserError for an argument of the command line that is out of its range."""
    for name, value in numbers.items():
        kind = ARGUMENTS[name]
        if value is not None and (problem := kind.problem(value)):
            raise UserError(
                f"plan: --{name.replace('_', '-')} {kind.says or f'must be {problem}'} (got {value})"
            )


def plan_experiment(
    experiment: Experiment,
    run: str | None = None,
    settings: dict | None = None,
    gpus: int = 8,
    gpu: str = "H100",
    gpu_memory: float | None = None,
    mfu: float = MFU,
) -> list[dict]:
    """Return what `plan_model` does of every model of `run`, or of all runs, each with its `warnings`.

    `settings` is a DeepSpeed JSON in place of the one that the experiment names. Raises UserError for an
    unknown GPU, and if there is nothing to train."""
    from inheritune.engines.deepspeed_json import load_deepspeed_json

    if gpu not in GPU_SPECS:
        raise UserError(
            f"plan: --gpu '{gpu}' is not in inheritune/config/gpus.yaml; {suggest_name(gpu, GPU_SPECS)}"
        )
    room = (gpu_memory or GPU_SPECS[gpu]["memory_gb"]) * 1e9
    found = []
    for name in [run] if run else experiment.runs:
        chosen = settings or load_deepspeed_json(experiment.train_of(experiment.run(name)).deepspeed)
        for stage, layers in list_models(experiment, name):
            facts = plan_model(experiment, name, stage, layers, chosen, gpus, room, gpu, mfu)
            found.append(facts | {"warnings": _list_warnings(chosen, facts.get("change"))})
    if not found:
        raise UserError(
            f"run '{run}' of {experiment.name} is a third-party model; there is no training to plan"
        )
    return found


def _list_warnings(settings: dict, change: dict | None) -> list[str]:
    """Return what `check` warns of compiled blocks in `settings` with the proposed `change`."""
    from inheritune.engines.dslint import check_compile

    return [problem.sentence for problem in check_compile(apply_change(settings, change or {}))]


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
    """Return the plan of one model: sizes, work, memory and disk.

    If it does not fit into `room` bytes of a GPU, the plan has the cheapest `change` of `settings` that makes
    it fit, and its `diff`."""
    from inheritune.data.batches import Share

    spec, length = experiment.run(run), experiment.data.sequence_length
    train, model = experiment.train_of(spec), resolve_shape(experiment, spec)
    sequences, micro_ceiling = train.batch_tokens // length, settings["train_micro_batch_size_per_gpu"]
    ranks = min(gpus, sequences)
    teacher = count_teacher_elements(experiment, spec)

    def plan_memory(settings: dict) -> dict:
        return estimate_memory(model, layers, settings, train, ranks, length, teacher)

    planned = plan_memory(settings)
    flops = _count_run_flops(experiment, spec, layers)
    hours = estimate_hours(flops, gpu, mfu)
    share = Share.of(sequences, 0, ranks, micro_ceiling)
    useful = sequences / (ranks * share.micro_batch * share.accumulation)
    facts = {
        "run": run,
        "stage": stage,
        "layers": layers,
        "parameters": count_trained_elements(model, layers),
        "steps": train.steps,
        "tokens": train.steps * train.batch_tokens,
        "flops": flops,
        "gpu_hours": hours,
        "gpus": ranks,
        "hours": hours / ranks / useful,  # padding is computed too
        "batch": share.describe(sequences, ranks, micro_ceiling, length),
        "full_micro_batches_up_to_gpus": max(1, sequences // micro_ceiling),
        "most_gpus": sequences,
        "disk": estimate_disk(planned, train, len(spec.keep_at)),
        "fits": planned["peak"] <= room,
        **planned,
    }
    interval_s = facts["hours"] * 3600 / train.steps * train.checkpoint_every
    facts |= estimate_saving(planned, saves_in_background(settings, on_gpus=True), interval_s)
    return facts if facts["fits"] else facts | _find_change(settings, room, plan_memory)


def _count_run_flops(experiment: Experiment, run: Run, layers: int) -> float:
    """Count the FLOPs of all steps of a run, including those of its teacher."""
    train, length = experiment.train_of(run), experiment.data.sequence_length
    tokens = train.steps * train.batch_tokens
    flops = tokens * predict_flops_per_token(resolve_shape(experiment, run), layers, length)
    teacher_layers = get_teacher_depth(experiment, run)
    if teacher_layers:
        flops += tokens * predict_flops_per_token(experiment.model, teacher_layers, length) * FORWARD_SHARE
    return flops


def _find_change(settings: dict, room: float, plan_memory: Callable[[dict], dict]) -> dict:
    """Return {change, diff} of the cheapest change of `settings` whose peak fits into `room` bytes; change is
    None if none fits."""
    changes = (patch for _, patch in propose_changes(settings))
    fitting = (patch for patch in changes if plan_memory(apply_change(settings, patch))["peak"] <= room)
    change = next(fitting, None)
    lines = [
        [f'- "{key}": {json.dumps(get_value(settings, key))}', f'+ "{key}": {json.dumps(value)}']
        for key, value in (change or {}).items()
    ]
    return {"change": change, "diff": list(itertools.chain(*lines))}
