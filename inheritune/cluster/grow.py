"""`grow EXPERIMENT --run NAME`: stage after stage until parity or the last stage (paper, Algorithm 1).

`planner.plan_next_action` is a pure function of the files on disk. `grow` runs each action as its own process
and asks again, so a crash costs one step and a restart is the same command. Nothing here imports torch: it
also runs on a batch host.
"""

import os
import signal
import sys

from inheritune.cluster import launch
from inheritune.cluster.planner import Action, plan_next_action, read_stages, read_verdict
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.run import Grow
from inheritune.errors import Stopped, UserError
from inheritune.evaluation.reference import check_reference
from inheritune.files.json_files import write_json
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import RunDir, get_data_dir, is_finished
from inheritune.runs.changes import FREE_BETWEEN_STAGES, UNRESOLVED, check_kind, find_changes_since
from inheritune.runs.job import Job
from inheritune.runs.shapes import check_sources
from inheritune.runtime import job_reports, launcher, signals
from inheritune.runtime.signals import get_stop_signal


def grow(
    experiment: str,
    run: str,
    seed: int = 0,
    procs: int = 1,
    ds: str | None = None,
    slot: bool = False,
    rehearse: bool | None = None,
) -> None:
    """Do everything that `run` still needs: data, reference (trained, or evaluated), stages, verdict.

    With `slot`, do only the next of these, as one task of a job array. Each step runs as `procs` processes,
    or as the tasks of the job's srun line (`launch_verb`).

    Raises Stopped when asked to leave before the end, or when a slot has done its part and more remains."""
    loaded = load_experiment(experiment, rehearse)
    settings, depths, reference = _check_growth(loaded, run)
    folder = RunDir.of(loaded, run, seed)
    check_kind(folder, is_grown=True)
    check_sources(loaded, [run])
    if not folder.is_done():
        check_reference(loaded, reference, must_exist=True)
        if (measured := RunDir.of(loaded, reference, seed)).is_evaluated():
            measured.read_results()  # refused if the model has changed since
    _report_changes(Job(loaded, run, seed, stage=1), settings, depths)
    os.environ["INHERITUNE_STOP"] = str(folder.stop)  # the training of the reference obeys it too
    done_before: Action | None = None
    while not folder.is_done():
        if folder.stop.is_file():
            raise Stopped(
                f"{run} is not grown further: {folder.stop} exists; delete it to continue", again=False
            )
        action = plan_next_action(
            depths,
            settings,
            is_finished(loaded, reference, seed),
            is_prepared(get_data_dir(loaded)),
            reference,
            run,
            read_stages(folder, depths),
            is_external=loaded.run(reference).init.external is not None,
        )
        if action.verb == "finish":
            write_json(folder.done, action.verdict)
            break
        if get_stop_signal():
            raise Stopped(f"{run}: stopped before {action.title()}; the same command continues from there")
        if action == done_before:
            raise RuntimeError(f"{action.title()} finished without an error but left no result")
        if done_before and slot:
            raise Stopped(f"{run}: {done_before.title()} is done; next comes {action.title()}")
        _run_action(action, run, experiment, seed, procs, ds, loaded.rehearsal)
        done_before = action
    print(describe_verdict(read_verdict(folder, len(depths)), loaded, run, reference))


def _check_growth(experiment: Experiment, run: str) -> tuple[Grow, list[int], str]:
    """Return (the run's `grow` section, the layers of each stage, the name of its reference).

    Raises UserError if the run does not grow or has no reference."""
    spec = experiment.run(run)
    if not spec.grow:
        raise UserError(f"run '{run}' of {experiment.name} has no 'grow' section; use train")
    reference = experiment.reference_of(spec)
    if not reference:
        raise UserError(f"run '{run}' grows until it reaches a reference: give it 'compare: RUN'")
    return spec.grow, spec.depths(experiment.model.layers), reference


def describe_verdict(verdict: dict, experiment: Experiment, run: str, reference: str) -> str:
    """Return the verdict in words, with or without parity."""
    gap = verdict["difference"]
    size = f"{verdict['layers']} of {experiment.model.layers} layers"
    numbers = (
        f"{gap['mean']:+.4f} nats, 95% interval {gap['low']:+.4f} to {gap['high']:+.4f} over {gap['n']} "
        f"windows, one seed"
    )
    mark = "REHEARSAL, not a result: " if experiment.rehearsal else ""
    if verdict["parity"]:
        return (
            f"{mark}{run} reached {reference}'s validation loss with {size} ({numbers}; margin "
            f"{verdict['margin']})."
        )
    failed = f"{run} did not reach {reference}'s validation loss; its best stage has {size}"
    return f"{mark}{failed} ({numbers}; margin {verdict['margin']})."


def _report_changes(job: Job, settings: Grow, depths: list[int]) -> None:
    """Print which settings have changed since a grown run was finished. `job` is its first stage.

    Raises UserError if it is not finished, and its first stage was trained under other settings."""
    folder, free = job.root, (*UNRESOLVED, *FREE_BETWEEN_STAGES)
    changes = find_changes_since(job.dir.experiment, job, job.settings, free)
    if not folder.is_done():
        if changes and job.dir.is_done():
            key, old, new = changes[0]
            raise UserError(
                f"stage 1 of {folder.path} was trained with {key} = {old}, now it is {new}; go back to it, "
                f"or grow a run of another name"
            )
        return
    done = read_verdict(folder, len(depths))
    for key, old, new in changes:
        print(
            f"note: this run was grown with {key} = {old}, the experiment now has {new}; to train that, grow "
            f"a run of another name"
        )
    for key in ("margin", "max_layers"):
        now = getattr(settings, key)
        if key in done and done[key] != now:
            print(
                f"note: this run was grown with {key} {done[key]}, the experiment now has {now}"
                f"{'' if changes else _suggest_growing_on(folder, depths)}"
            )


def _suggest_growing_on(folder: RunDir, depths: list[int]) -> str:
    """Return how to continue with other settings of growth; "" if the stages are not those of `depths`."""
    try:
        read_stages(folder, depths)
    except UserError:
        return ""
    return f"; to continue with that, delete {folder.done} and give the same command"


def _run_action(
    action: Action, run: str, experiment: str, seed: int, procs: int, ds: str | None, rehearsal: bool
) -> None:
    """Run one action of the growth of `run` to its end.

    Raises Stopped if it was stopped with work left, also where it only waited for another job. If it fails,
    having printed its reason, raises SystemExit with its exit code."""
    verb = [action.verb, experiment]
    if action.run:
        verb += ["--run", action.run, "--seed", str(seed)]
    if action.verb == "evaluate":  # growth asks for the loss only
        verb += ["--tasks", "none"]
    if action.verb == "train":
        verb += ["--stage", str(action.stage)] if action.stage else []
    if action.verb in ("train", "evaluate"):
        verb += ["--ds", ds] if ds else []
    verb += ["--rehearse"] if rehearsal else []
    print(f"$ python -m inheritune {' '.join(verb)}", flush=True)
    has_ranks = action.verb in launcher.JOINING
    with job_reports.collect_reports() as told:
        code = launch.launch_verb(verb, procs if has_ranks else 1, as_step=has_ranks)
        stop = None if code else job_reports.find_stop(told)
    if stop:
        said = f"{run}: stopped within {action.title()}; the same command continues from there"
        raise Stopped(said, again=stop == "more")
    if code in (-signal.SIGINT, -signal.SIGUSR1, signals.INTERRUPTED) and get_stop_signal():
        raise Stopped(
            f"{action.title()} was stopped before it had begun; the same grow command continues from there"
        )
    if code:
        print(
            f"grow stops: this step failed with code {code}; the same grow command continues from there",
            file=sys.stderr,
        )
        raise SystemExit(code if code > 0 else 128 - code)
