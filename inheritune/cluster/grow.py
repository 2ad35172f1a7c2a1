"""`grow EXPERIMENT --run NAME`: stage after stage until parity or the last stage (paper, Algorithm 1).

`next_action` is a pure function of the files on disk; `grow` runs each action as its own process and asks
again. So a crash costs one step, a restart is the same command, and the growth logic is tested in
milliseconds. Nothing here imports torch: it runs on a batch host.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec

from inheritune.config.experiment import REPOSITORY, Experiment, Grow, Run, load_experiment
from inheritune.config.values import GPUS, read_numbers
from inheritune.errors import Stopped, UserError
from inheritune.evaluation.taskcode import refuse_task_code
from inheritune.files.rundir import RunDir, data_dir, read_json, seed_flag, write_json
from inheritune.planning.plan import MFU, gpu_hours, models_of
from inheritune.runs.job import Job
from inheritune.runtime import launcher, signals
from inheritune.runtime.dist import free_port
from inheritune.runtime.signals import asked_to_stop


@dataclass(frozen=True)
class StageResult:
    """What a finished stage left: its depth and the paired difference to the reference, in nats."""

    layers: int
    difference: dict
    paper_rule: bool
    train_flops: float
    weights: str | None = None
    """Hash that tells its weights from others."""


@dataclass(frozen=True)
class Action:
    """What comes next: `prepare`, `train` (a run, or a stage of the grown run) or `finish`."""

    verb: str
    run: str = ""
    stage: int | None = None
    verdict: dict | None = None

    def title(self) -> str:
        return f"{self.verb} {self.run}".strip() + (f" stage {self.stage}" if self.stage else "")


def parity(difference: dict, margin: float) -> bool:
    """The stop rule: the upper end of the 95% interval of (ours - reference) is at or below `margin` nats."""
    return difference["high"] <= margin


def next_action(
    depths: list[int],
    grow: Grow,
    reference_done: bool,
    data_ready: bool,
    reference: str,
    run: str,
    stages: list[StageResult],
) -> Action:
    """What to do next, given what is finished (pure). The stop rule looks at each stage once, after its full
    schedule."""
    if not data_ready:
        return Action("prepare")
    if not reference_done:
        return Action("train", run=reference)
    if stages and (parity(stages[-1].difference, grow.margin) or len(stages) == len(depths)):
        reached = parity(stages[-1].difference, grow.margin)
        # without parity the chosen stage is the best one, which need not be the deepest
        best = (
            len(stages)
            if reached
            else min(range(len(stages)), key=lambda i: stages[i].difference["mean"]) + 1
        )
        return Action("finish", run=run, stage=best, verdict=_verdict(stages, best, reached, grow))
    return Action("train", run=run, stage=len(stages) + 1)


def _verdict(stages: list[StageResult], best: int, reached: bool, grow: Grow) -> dict:
    by_paper = next((i + 1 for i, stage in enumerate(stages) if stage.paper_rule), None)
    return {
        "stage": best,
        "layers": stages[best - 1].layers,
        "weights": stages[best - 1].weights,
        "parity": reached,
        "margin": grow.margin,
        "max_layers": grow.max_layers,
        "difference": stages[best - 1].difference,
        "paper_rule_stage": by_paper,
        "train_flops_of_all_stages": sum(stage.train_flops for stage in stages),
        "note": "the interval covers the choice of validation windows, not of seeds: one seed can stop by "
        "luck",
    }


def read_stages(root: RunDir, n_stages: int) -> list[StageResult]:
    """Results of the finished stages, in order, up to the first unfinished one."""
    found = []
    for number in range(1, n_stages + 1):
        stage = root.stage(number)
        if not stage.is_done():
            break
        results = stage.read_results()
        if "difference" not in results:
            raise UserError(
                f"{stage.results} holds no difference to the reference; run evaluate, or train the stage "
                f"again"
            )
        keys = ("layers", "difference", "paper_rule", "train_flops")
        found.append(StageResult(*(results[key] for key in keys), results.get("weights")))
    return found


def grow(
    experiment: str,
    run: str,
    seed: int = 0,
    procs: int = 1,
    ds: str | None = None,
    slot: bool = False,
    rehearse=None,
) -> None:
    """Do everything that `run` still needs: data, reference, stages, verdict; `slot`: only the next of these,
    as one task of a job array. `procs` processes each, or the tasks of the job's srun line (`launch`).

    Raises Stopped when asked to leave before the end, or when a slot has done its part and more is to do."""
    loaded = load_experiment(experiment, rehearse)
    spec = loaded.run(run)
    if not spec.grow:
        raise UserError(f"run '{run}' of {loaded.name} has no 'grow' section; use train")
    reference = loaded.reference_of(spec)
    if not reference:
        raise UserError(f"run '{run}' grows until it reaches a reference: give it 'compare: RUN'")
    depths = spec.grow.depths(spec.init.inherit.layers, loaded.model.layers)
    root = RunDir.of(loaded, run, seed)
    _tell_change_since(root, spec.grow)
    done_before, os.environ["INHERITUNE_STOP"] = (
        None,
        str(root.stop),
    )  # heeded by the reference's training too
    while not root.is_done():
        if root.stop.is_file():
            raise Stopped(
                f"{run} is not grown further: {root.stop} is there; delete it to go on", again=False
            )
        action = next_action(
            depths,
            spec.grow,
            RunDir.of(loaded, reference, seed).is_done(),
            (data_dir(loaded) / "manifest.json").is_file(),
            reference,
            run,
            read_stages(root, len(depths)),
        )
        if action.verb == "finish":
            write_json(root.done, action.verdict)
            break
        if action == done_before:
            trained = RunDir.of(loaded, action.run, seed) if action.run else root
            trained = trained.stage(action.stage) if action.stage else trained
            if asked_to_stop() or trained.stopped.is_file():
                raise Stopped(f"{run}: stopped within {action.title()}; the same command goes on from there")
            raise RuntimeError(f"{action.title()} ended without an error but left no result")
        if asked_to_stop():
            raise Stopped(f"{run}: stopped before {action.title()}; the same command goes on from there")
        if done_before and slot:
            raise Stopped(f"{run}: {done_before.title()} is done; next comes {action.title()}")
        _run(action, experiment, seed, procs, ds, loaded)
        done_before = action
    print(sentence(read_json(root.done), loaded, run, reference))


def check(
    experiment: str,
    run: str | None = None,
    stage: int | None = None,
    seed: int = 0,
    rehearse=None,
    ds: str | None = None,
    gpus: str | None = None,
    allow_task_code: bool = False,
) -> None:
    """Print that the experiment is sound and, for `run` (and `stage` of a grown run), that what it starts
    from is there; before that, what is wrong with the DeepSpeed JSON of its runs (or `ds`), for each number
    in `gpus` ("4" or "1,2,4"), and code in its task files that is not allowed.

    Raises UserError naming what is refused or missing, with the commands that make it."""
    loaded = load_experiment(experiment, rehearse)
    if loaded.evaluate.task_files and not find_spec("lm_eval"):
        print("the task files are not looked at here, without lm_eval; evaluate does it at its start")
    else:
        refuse_task_code(loaded.evaluate.task_files, allow_task_code)
    check_json(loaded, [run] if run else list(loaded.runs), ds, _numbers(gpus))
    if run is None:
        print(f"{loaded.name}: the file is sound; runs: {', '.join(loaded.runs)}")
        return
    spec = loaded.run(run)
    if stage:
        Job(loaded, run, seed, stage).depths()
    ready = (data_dir(loaded) / "manifest.json").is_file()
    needed = unfinished_source(loaded, spec, seed)
    if ready and not needed:
        print(f"{loaded.name}/{run}: what it starts from is there")
        return
    lacks = ["its data is not prepared"] * (not ready) + [
        f"run '{needed}', which it needs, is not trained"
    ] * bool(needed)
    ways = f"{loaded.name}/{run} cannot start yet: {' and '.join(lacks)}.\n"
    if not ready:
        fetch = f"{launcher.script('fetch')} {experiment} && " if loaded.data.source == "hub" else ""
        ways += f"First, on the login node, the data ({data_dir(loaded)}):\n"
        ways += f"    {fetch}{_again(loaded)}{launcher.script('prepare')} {experiment}\n"
    raise UserError(
        (ways + (_two_ways(loaded, experiment, run, needed, stage, seed) if needed else "")).rstrip()
    )


def check_json(experiment: Experiment, runs: list[str], ds: str | None, gpus: list[int]) -> None:
    """Print the warnings of the JSON files of `runs`, and how their batches are cut over each number of
    `gpus`.

    Raises UserError for what is refused. Where torch or DeepSpeed is missing (beside an image), the job
    itself checks."""
    missing = [name for name in ("torch", "deepspeed") if not find_spec(name)]
    if missing:
        print(
            f"the DeepSpeed JSON is not checked here, without {' and '.join(missing)}; train does it at its "
            f"start"
        )
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is asked for, and none is missed
    from inheritune.data.batches import Share
    from inheritune.engines.dslint import lint, report
    from inheritune.engines.engine import load_json

    trained = [
        experiment.train_of(experiment.run(name)) for name in runs if not experiment.run(name).init.external
    ]
    length = experiment.data.sequence_length
    for train in {(t.deepspeed, t.precision, t.batch_tokens): t for t in trained}.values():
        path = ds or train.deepspeed
        settings = load_json(path)
        found = [problem for n in gpus or [None] for problem in lint(settings, experiment.model, train, n)]
        for warning in report(path, list(dict.fromkeys(found))):
            print(f"warning: {warning}")
        ceiling, batch = settings["train_micro_batch_size_per_gpu"], train.batch_tokens // length
        for n in gpus:
            print(Share.of(batch, 0, n, ceiling).describe(batch, n, ceiling, length))


def _numbers(words: str | None) -> list[int]:
    """[1, 2, 4] of "1,2,4"."""
    try:
        return read_numbers(GPUS, words) if words else []
    except ValueError:
        raise UserError(
            f"check: --gpus takes a number of GPUs or several, as in 1,2,4 (got '{words}')"
        ) from None


def unfinished_source(experiment: Experiment, spec: Run, seed: int) -> str | None:
    """Name of the run of this file that `spec` starts or learns from and that is not finished, or None."""
    needed = (source for source, _ in spec.sources() if source in experiment.runs)
    return next((source for source in needed if not RunDir.of(experiment, source, seed).is_done()), None)


def _again(experiment: Experiment) -> str:
    return "REHEARSE=1 " if experiment.rehearsal else ""


def _two_ways(experiment: Experiment, name: str, run: str, needed: str, stage: int | None, seed: int) -> str:
    """What to do while `needed` is not trained: train it and queue this behind it, or start from a public
    checkpoint."""
    train = f"{_again(experiment)}{launcher.script('train')} {name}"
    flag = seed_flag(seed)
    again = f"{train} {run}{f' --stage {stage}' if stage else ''}{flag}"
    settings = experiment.train_of(experiment.run(needed))
    layers, length = models_of(experiment, needed)[-1][1], experiment.data.sequence_length
    hours = (
        f"about {gpu_hours(experiment.model, layers, settings, length):,.0f} GPU-hours at {MFU:.0%} of the "
        f"bf16 rate of an H100"
    )
    sentence = (
        f"Either train '{needed}' ({settings.steps * settings.batch_tokens / 1e9:.1f}B tokens, {hours}) "
        f"and queue this behind it, with the number after 'submitted job' in what the first line prints:\n"
        f"    {train} {needed}{flag}\n"
        f"    {again} -- --dependency=afterok:JOB"
    )
    sources = {
        other: spec.init.inherit.source for other, spec in experiment.runs.items() if spec.init.inherit
    }
    public = next((other for other, source in sources.items() if source not in experiment.runs), None)
    if public and experiment.run(run).init.inherit:
        sentence += (
            f"\nor start from the public checkpoint {sources[public]}:\n    {launcher.script('fetch')} "
            f"{name}\n"
        )
        verb = "grow" if experiment.run(public).grow else "train"
        sentence += f"    {launcher.script(verb)} {name} {public}{flag}"
    return sentence


def sentence(verdict: dict, experiment: Experiment, run: str, reference: str) -> str:
    """The verdict in words, whichever way it came out."""
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


def _tell_change_since(root: RunDir, grow: Grow) -> None:
    """Print what the experiment says otherwise than when the run in `root` was ended, and how to go on."""
    done = read_json(root.done) if root.is_done() else {}
    for key in ("margin", "max_layers"):
        if key in done and done[key] != getattr(grow, key):
            print(
                f"note: this run was grown with {key} {done[key]}, the experiment now has "
                f"{getattr(grow, key)}; to grow on by "
                f"that, delete {root.done} and give the same command"
            )


def _run(action: Action, experiment: str, seed: int, procs: int, ds: str | None, loaded: Experiment) -> None:
    """Run one action to its end; if it fails, whose reason it has printed, leave with its exit code."""
    verb = [action.verb, experiment]
    if action.verb == "train":
        verb += ["--run", action.run, "--seed", str(seed)]
        verb += ["--stage", str(action.stage)] if action.stage else []
        verb += ["--ds", ds] if ds else []
    verb += ["--rehearse"] if loaded.rehearsal else []
    print(f"$ python -m inheritune {' '.join(verb)}", flush=True)
    code = launch(verb, procs, as_step=True) if action.verb == "train" else launch(verb, 1, as_step=False)
    if code in (-signal.SIGINT, -signal.SIGUSR1, signals.INTERRUPTED) and asked_to_stop():
        raise Stopped(
            f"{action.title()} was stopped before it had begun; the same grow command goes on from there"
        )
    if code:
        print(
            f"grow stops: this step ended with code {code}; the same grow command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(code if code > 0 else 128 - code)


def launch(verb: list[str], procs: int, as_step: bool = True) -> int:
    """Run `python -m inheritune VERB ...` as `procs` processes on this machine, or (`as_step`) inside a Slurm
    job as the tasks of $INHERITUNE_LAUNCH (an srun line, slurm/job.sh); returns the exit code of the first
    that failed, or 0. The others are ended then: they would wait for it for ever. A signal to this process
    that asks it to save reaches the ranks as SIGUSR1 (srun would answer a SIGTERM by killing its tasks); a
    second Ctrl-C ends them."""
    signals.listen()
    step = as_step and _has_step()
    tasks: list[subprocess.Popen] = []

    def end() -> None:
        _end(tasks, gently=step)

    signals.before_leaving.append(end)
    try:
        if step:
            _start_step(tasks, verb)
        else:
            _start_here(tasks, verb, procs)
        return _wait_for(tasks)
    finally:
        end()
        signals.before_leaving.remove(end)


def _wait_for(tasks: list[subprocess.Popen]) -> int:
    """Pass signals on until all processes have ended, or one has failed; the exit code."""
    told = 0
    while any(process.poll() is None for process in tasks):
        failed = next((process.returncode for process in tasks if process.poll()), 0)
        if failed:
            time.sleep(1)  # let the others say what they know
            return failed
        for _ in signals.asked[told:]:
            told += 1
            for process in tasks:
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    return next((process.returncode for process in tasks if process.returncode), 0)


def _has_step() -> bool:
    return launcher.in_batch_script(os.environ) and bool(os.environ.get("INHERITUNE_LAUNCH"))


def _start_step(tasks: list[subprocess.Popen], verb: list[str]) -> None:
    """Start the srun of a Slurm job's script, which starts the ranks on the job's nodes."""
    command = [*shlex.split(os.environ["INHERITUNE_LAUNCH"]), "python", "-m", "inheritune", *verb]
    if not shutil.which(command[0]):
        raise UserError(
            f"'{command[0]}', with which this job starts its ranks (INHERITUNE_LAUNCH), is not on the PATH"
        )
    tasks.append(subprocess.Popen(command, env=_environment(1)))


def _start_here(tasks: list[subprocess.Popen], verb: list[str], procs: int) -> None:
    """Start `procs` processes on this machine, ranks of one launch if there are several."""
    image = (
        os.environ.get("INHERITUNE_PYTHON") if launcher.in_batch_script(os.environ) else None
    )  # Python within an image
    command = [*shlex.split(image or shlex.quote(sys.executable)), "-m", "inheritune", *verb]
    if not shutil.which(command[0]):
        raise UserError(f"'{command[0]}', which is to start Python (INHERITUNE_PYTHON), is not on the PATH")
    port = free_port()
    for rank in range(procs):
        own = launcher.Launch(rank, procs, rank, port=port).variables(port) if procs > 1 else {}
        # no signal may end a rank before it listens; an image's own starter is left alone
        with contextlib.nullcontext() if image else signals.held_back():
            tasks.append(subprocess.Popen(command, env={**_environment(procs), **own}))


def _environment(procs: int) -> dict[str, str]:
    """What the processes of a launch share: this repository, its share of the cores, nothing of the launch of
    this process."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(max(1, (os.cpu_count() or 1) // procs))
    inherited = launcher.without_launch(os.environ)
    return {"OMP_NUM_THREADS": threads, **inherited, "PYTHONPATH": path, signals.CHILD: "1"}


def _end(tasks: list[subprocess.Popen], gently: bool) -> None:
    """End what still runs: ranks at once; an srun (`gently`) by SIGTERM, on which it ends its tasks too."""
    for process in tasks:
        if gently and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if process.poll() is None:
            process.kill()
    for process in tasks:
        process.wait()
