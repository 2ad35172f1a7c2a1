"""`check EXPERIMENT`: whether an experiment, its DeepSpeed JSON and what a run starts from are sound.

It needs no GPU, and the parts that need torch are skipped where torch is missing.
"""

import os
from importlib.util import find_spec

from inheritune.cluster.commands import format_command
from inheritune.cluster.planner import find_unfinished_source
from inheritune.cluster.slurm_queue import has_slurm, read_queue
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.values import GPUS, read_numbers
from inheritune.errors import UserError
from inheritune.evaluation.reference import check_reference
from inheritune.evaluation.taskcode import refuse_task_code
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import get_data_dir
from inheritune.planning.workload import MFU, estimate_gpu_hours, list_models
from inheritune.runs.chosen_blocks import check_choice
from inheritune.runs.job import Job
from inheritune.runs.shapes import check_sources


def check(
    experiment: str,
    run: str | None = None,
    stage: int | None = None,
    seed: int = 0,
    rehearse: bool | None = None,
    ds: str | None = None,
    gpus: str | None = None,
    allow_task_code: bool = False,
    needs: bool = True,
) -> None:
    """Print that the experiment is sound and, for `run` (and `stage` of a grown run), that what it starts
    from exists.

    First prints the warnings about the DeepSpeed JSON of its runs (or `ds`), for each number in `gpus` ("4"
    or "1,2,4"). Code in its task files is refused unless `allow_task_code`. Without `needs`, what the run
    starts from may be missing: a job that runs before makes it.

    Raises UserError that names what is refused or missing, with the commands that make it."""
    loaded = load_experiment(experiment, rehearse)
    if loaded.evaluate.task_files and not find_spec("lm_eval"):
        print("the task files are not checked here, without lm_eval; evaluate checks them when it starts")
    else:
        refuse_task_code(loaded.evaluate.task_files, allow_task_code)
    names = [run] if run else list(loaded.runs)
    check_sources(loaded, names)
    for reference in dict.fromkeys(loaded.reference_of(loaded.run(name)) for name in names):
        if reference:
            check_reference(loaded, reference)
    check_json(loaded, names, ds, _read_gpus(gpus))
    if run is None:
        print(f"{loaded.name}: the file is sound; runs: {', '.join(loaded.runs)}")
        return
    spec = loaded.run(run)
    if stage:
        Job(loaded, run, seed, stage).depths()
    if not needs:
        return
    data_ready = is_prepared(get_data_dir(loaded))
    needed = find_unfinished_source(loaded, spec, seed)
    if not data_ready or needed:
        raise UserError(_describe_missing(loaded, run, data_ready, needed, stage, seed))
    check_choice(Job(loaded, run, seed, stage))
    print(f"{loaded.name}/{run}: what it starts from is there")


def check_json(experiment: Experiment, runs: list[str], ds: str | None, gpus: list[int]) -> None:
    """Print the warnings about the JSON files of `runs`, and how their batches are divided over each number
    of `gpus`.

    Raises UserError for what is refused. Where torch or DeepSpeed is missing (outside a container image), the
    job itself checks."""
    missing = [name for name in ("torch", "deepspeed") if not find_spec(name)]
    if missing:
        print(
            f"the DeepSpeed JSON is not checked here, without {' and '.join(missing)}; train checks it when "
            f"it starts"
        )
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed then neither needs nor warns about a GPU
    from inheritune.data.batches import Share
    from inheritune.engines.deepspeed_json import load_deepspeed_json
    from inheritune.engines.dslint import check_problems, lint

    trained = [
        experiment.train_of(experiment.run(name)) for name in runs if not experiment.run(name).init.external
    ]
    length = experiment.data.sequence_length
    for train in {(t.deepspeed, t.precision, t.batch_tokens): t for t in trained}.values():
        path = ds or train.deepspeed
        settings = load_deepspeed_json(path)
        counts: list[int | None] = [*gpus] if gpus else [None]
        found = [problem for n in counts for problem in lint(settings, experiment.model, train, n)]
        for warning in check_problems(path, list(dict.fromkeys(found))):
            print(f"warning: {warning}")
        ceiling, batch = settings["train_micro_batch_size_per_gpu"], train.batch_tokens // length
        for n in gpus:
            print(Share.of(batch, 0, n, ceiling).describe(batch, n, ceiling, length))


def _read_gpus(words: str | None) -> list[int]:
    """Return [1, 2, 4] for "1,2,4". Raises UserError if `words` are no numbers of GPUs."""
    try:
        return [int(number) for number in read_numbers(GPUS, words)] if words else []
    except ValueError:
        raise UserError(
            f"check: --gpus takes a number of GPUs or several, as in 1,2,4 (got '{words}')"
        ) from None


def _describe_missing(
    experiment: Experiment,
    run: str,
    data_ready: bool,
    needed: str | None,
    stage: int | None,
    seed: int,
) -> str:
    """Return what `run` lacks, with the commands that make it. `needed` is the unfinished run that `run`
    needs."""
    lacks = [] if data_ready else ["its data is not prepared"]
    lacks += [f"run '{needed}', which it needs, is not trained"] if needed else []
    text = f"{experiment.name}/{run} cannot start yet: {' and '.join(lacks)}.\n"
    slurm = has_slurm(read_queue())
    if not data_ready:
        where = "on the login node, " if slurm else ""
        steps = ["fetch"] if experiment.data.takes_from("hub") else []
        lines = [format_command(verb, experiment, slurm=slurm, shape=False) for verb in (*steps, "prepare")]
        text += f"First, {where}the data ({get_data_dir(experiment)}):\n    {' && '.join(lines)}\n"
    if needed:
        text += _describe_ways(experiment, run, needed, stage, seed, slurm)
    return text.rstrip()


def _describe_ways(
    experiment: Experiment, run: str, needed: str, stage: int | None, seed: int, slurm: bool
) -> str:
    """Return what to do while `needed` is not trained: train it and queue this behind it, or start from a
    public checkpoint."""
    settings = experiment.train_of(experiment.run(needed))
    layers, length = list_models(experiment, needed)[-1][1], experiment.data.sequence_length
    gpu_hours = estimate_gpu_hours(experiment.model, layers, settings, length)
    work = (
        f"{settings.steps * settings.batch_tokens / 1e9:.1f}B tokens, about {gpu_hours:,.0f} GPU-hours at "
        f"{MFU:.0%} of the bf16 rate of an H100"
    )
    verb = "grow" if experiment.run(needed).grow else "train"
    first = format_command(verb, experiment, needed, seed, slurm=slurm)
    again = format_command("train", experiment, run, seed, stage, slurm)
    text = f"Either train '{needed}' ({work})"
    if slurm:
        text += (
            f" and queue this behind it, with the number after 'submitted job' in what the first line "
            f"prints:\n    {first}\n    {again} -- --dependency=afterok:JOB"
        )
    else:
        text += f", then this:\n    {first}\n    {again}"
    sources = {
        other: spec.init.inherit.source for other, spec in experiment.runs.items() if spec.init.inherit
    }
    public = next((other for other, source in sources.items() if source not in experiment.runs), None)
    if public and experiment.run(run).init.inherit:
        verb = "grow" if experiment.run(public).grow else "train"
        lines = [
            format_command("fetch", experiment, slurm=slurm, shape=False),
            format_command(verb, experiment, public, seed, slurm=slurm),
        ]
        text += f"\nor start from the public checkpoint {sources[public]}:\n    " + "\n    ".join(lines)
    return text
