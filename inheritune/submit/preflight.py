"""What is checked before a job queues: the experiment, the run, the JSON, what the job needs, its cost.

A job that cannot run is refused here, in seconds, instead of after hours in the queue."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from inheritune.cluster.check import check
from inheritune.cluster.planner import find_unfinished_source
from inheritune.config import names
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.jobs import TRAINING
from inheritune.config.units import format_memory
from inheritune.errors import UserError
from inheritune.files.advice import format_seed_flag
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import RunDir, check_has_parts, get_data_dir, parse_weights_name, require_weights
from inheritune.planning.workload import MFU
from inheritune.runtime import launcher
from inheritune.submit.request import Request
from inheritune.submit.runs import list_baselines, list_unmeasured
from inheritune.submit.sbatch import Shape, Submission
from inheritune.submit.site import Site


def check_request(request: Request, rehearsal: bool) -> Experiment | None:
    """Return the experiment of `request` once it is sound and has what the job needs; None for prepared data
    that belongs to no experiment.

    Raises UserError for an unknown experiment, run or stage, a JSON that is refused, and for what is missing,
    unless the job waits for another one."""
    name, values, verb = request.values["experiment"], request.values, request.job.verb
    if verb == "analyze" and Path(name).is_dir():
        return None
    loaded = load_experiment(name, rehearsal or None)
    if verb == "prepare":
        return loaded
    if verb in ("train", "grow"):
        for run in values["run"].split(","):
            _check_run(request, loaded, run)
        return loaded
    if verb == "baselines":  # whose sources may be others of them
        _check_quietly(name, None, rehearse=loaded.rehearsal, ds=values.get("ds"))
        return loaded
    if not request.waits:
        with _report_missing(request):
            _check_measured(request, loaded)
    return loaded


@contextmanager
def _report_missing(request: Request) -> Iterator[None]:
    """Print what is missing, in a dry run, instead of raising UserError."""
    try:
        yield
    except UserError as error:
        if "dry_run" not in request.switches:
            raise
        print(f"note: {str(error).partition(chr(10))[0]}")


def _check_measured(request: Request, loaded: Experiment) -> None:
    """Raise UserError if the data, or the weights that are to be evaluated, do not exist."""
    name, values = request.values["experiment"], request.values
    if request.job.verb == "evaluate" and "run" in values:
        for run in values["run"].split(","):
            check_has_parts(loaded, run)
            if not loaded.run(parse_weights_name(run)[0]).init.external:
                require_weights(loaded, run, request.seed)
    if not is_prepared(get_data_dir(loaded)):
        check(name, next(iter(loaded.runs)), rehearse=loaded.rehearsal)  # which says how to prepare it


def check_baselines(request: Request, loaded: Experiment, runs: list[str], is_whole: bool = False) -> None:
    """Raise UserError if the tasks of an array over `runs` could not start, unless the job waits for another:
    the data is not prepared, some start from a run that none of the baselines makes, or an analysis that
    chooses their layers is lacking. The whole of them, `is_whole`, is queued behind that analysis."""
    own = list_baselines(loaded)
    if request.waits:
        return
    with _report_missing(request), redirect_stdout(StringIO()):
        if not is_prepared(get_data_dir(loaded)):
            check(request.values["experiment"], runs[0], rehearse=loaded.rehearsal, seed=request.seed)
        needed = {run: find_unfinished_source(loaded, loaded.run(run), request.seed) for run in runs}
        lacking = {run: source for run, source in needed.items() if source and source not in own}
        if lacking:
            run, source = next(iter(lacking.items()))
            free = ",".join(str(n) for n, other in enumerate(own, 1) if other in runs and not needed[other])
            others = f", or submit those that need nothing: ARRAY={free}" if free else ""
            raise UserError(
                f"{len(lacking)} of these runs cannot start: '{run}' needs '{source}', which is not trained; "
                f"train it first, wait for its job with -- --dependency=afterok:JOB{others}"
            )
        if not is_whole:
            _check_choices(request, loaded, runs)


def _check_choices(request: Request, loaded: Experiment, runs: list[str]) -> None:
    """Raise UserError, with the job that makes it, if an analysis that chooses the layers of one of `runs` is
    lacking."""
    own = list_baselines(loaded)
    for number, model in list_unmeasured(loaded, request.seed).items():
        if own[number - 1] in runs:
            words = f"{launcher.format_script('analyze')} {shlex.join((model, request.values['experiment']))}"
            small = "REHEARSE=1 " if loaded.rehearsal else ""
            raise UserError(
                f"run '{own[number - 1]}' cannot start: an analysis of '{model}' chooses its layers, and "
                f"there is none; first: {small}{words}{format_seed_flag(request.seed)}"
            )


def _check_run(request: Request, loaded: Experiment, run: str) -> None:
    """Raise UserError if a run cannot be trained or grown as it is asked for."""
    spec, verb, name = loaded.run(run), request.job.verb, request.values["experiment"]
    if verb == "grow" and not spec.grow:
        raise UserError(f"run '{run}' of {loaded.name} has no 'grow' section; use train.sh")
    if verb == "train" and spec.grow and request.stage is None:
        raise UserError(
            f"run '{run}' of {loaded.name} grows by stages; use grow.sh, or --stage N for one of them"
        )
    if verb == "train" and spec.init.external:
        raise UserError(f"run '{run}' of {loaded.name} is a third-party model, which is only evaluated")
    stop = RunDir.of(loaded, run, request.seed).stop
    if stop.exists() and not request.waits:
        raise UserError(f"run '{run}' would stop at once: {stop} exists; delete it to continue")
    needs = verb == "train" and not request.waits  # a growth makes what it lacks
    options: dict[str, Any] = {"stage": request.stage, "seed": request.seed, "ds": request.values.get("ds")}
    _check_quietly(name, run, rehearse=loaded.rehearsal, needs=False, **options)
    if needs:
        with _report_missing(request), redirect_stdout(StringIO()):
            check(name, run, rehearse=loaded.rehearsal, **options)


def _check_quietly(name: str, run: str | None, **options: Any) -> None:
    """Run `check`, and print only its warnings."""
    said = StringIO()
    with redirect_stdout(said):
        check(name, run, **options)
    for line in said.getvalue().splitlines():
        if line.startswith("warning:"):
            print(line)


def check_folders(submission: Submission, root: Path) -> None:
    """Make the folders of the log and the record below `root`. Raises UserError if a job could not write
    them."""
    logs = Path(submission.log).parent
    for folder in (root / "runs" / names.JOBS, *([] if "%" in str(logs) else [logs])):
        probe = folder / f".probe-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"?")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}), so a job would leave neither a log nor a "
                "result; set INHERITUNE_ROOT in slurm/site.sh to a folder on a shared disk that you can write"
            ) from None


def describe_cost(request: Request, loaded: Experiment | None, shape: Shape, site: Site) -> str:
    """Return one line: what the job takes, and what it leaves."""
    time = f", at most {site.get('TIME')} each time" if site.get("TIME") else ""
    if not shape.gpus:
        return (
            f"cost: {shape.tasks} task(s) of {shape.cpus} CPU(s); leaves {_describe_result(request, loaded)}"
        )
    gpus = f"{shape.gpus} GPU(s)"
    plans = _plan(request, loaded, shape.gpus) if loaded else []
    if not plans:
        return f"cost: {gpus}{time}; leaves {_describe_result(request, loaded)}"
    hours = [facts["gpu_hours"] for facts in plans]
    disk = format_memory(sum(facts["disk"] for facts in plans))
    most = "at most " if request.job.verb == "grow" and len(plans) > 1 else ""
    return (
        f"cost: {gpus} for {most}{sum(hours) / shape.gpus:,.1f} hours, {most}{sum(hours):,.1f} GPU-hours at "
        f"{MFU:.0%} of the bf16 rate of an H100; leaves {_describe_result(request, loaded)} ({disk})"
    )


def _plan(request: Request, loaded: Experiment, gpus: int) -> list[dict]:
    """Return the plans of the models that the job trains; none where there is nothing to train."""
    if request.job.verb not in TRAINING:
        return []
    runs = [request.values["run"]] if "run" in request.values else list_baselines(loaded)
    try:
        from inheritune.planning.plan import plan_experiment

        plans = [facts for run in runs for facts in plan_experiment(loaded, run, gpus=gpus)]
    except ImportError:  # on a host whose Python lacks what the image has
        return []
    return [facts for facts in plans if request.stage in (None, facts["stage"])]


def _describe_result(request: Request, loaded: Experiment | None) -> str:
    """Return what the job leaves."""
    if loaded is None:
        return "attention.jsonl and its plots"
    verb, run = request.job.verb, request.values.get("run")
    if verb == "prepare":
        return str(get_data_dir(loaded))
    folder = RunDir.of(loaded, run.split(",")[0] if run else "X", request.seed)
    if verb == "evaluate":
        return "results.json in the folder of each run" if not run else f"results.json of {run}"
    if verb == "analyze":
        return "attention.jsonl and its plots"
    return str((folder.stage(request.stage) if request.stage else folder).path if run else folder.path.parent)
