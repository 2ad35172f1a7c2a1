"""`status EXPERIMENT`: where every run stands, read from the run folders (and squeue) alone, without torch.

Runs are written while this reads: rows come from the end of metrics.jsonl, and a line cut in the middle is
left out. What the paper's logs say at the same step comes from recipes/paper (curves.yaml tells which curve
belongs to which run).
"""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from inheritune.cluster.grow import unfinished_source
from inheritune.config import names
from inheritune.config.experiment import Experiment, Run, load_experiment
from inheritune.errors import UserError
from inheritune.files.lock import Lock, describe_holder, lock_holders
from inheritune.files.rundir import (
    MARKERS,
    RunDir,
    damages,
    data_dir,
    marked_files,
    read_json,
    root,
    seed_flag,
)
from inheritune.paper.items import curve_of, published_curves, published_loss
from inheritune.runtime import launcher

COLUMNS = (
    "run",
    "state",
    "step",
    "loss",
    "validation loss",
    "minus the paper's there",
    "tokens/s",
    "time left",
    "job and node",
)
TAIL_BYTES = (1 << 14, 1 << 20)
"""Of metrics.jsonl: the last rows, and, if they hold no evaluation, some thousand, more than lie between two
evaluations."""
SQUEUE = ["squeue", "-h", "-r", "--me", "-o", "%i|%A|%T|%N|%r"]
"""Array tasks one by one: job (123_4), its own number, state, nodes, reason for waiting."""


@dataclass(frozen=True)
class Job:
    """The last Slurm job that worked on a run. `state` is squeue's, empty when the job has left the queue."""

    name: str
    failure: str = ""
    state: str = ""
    where: str = ""


@dataclass
class Standing:
    """Where a run, or a stage of a grown one, stands. state: not started, running, stopped, finished, failed;
    unknown where its files do not tell."""

    label: str
    state: str = "not started"
    steps: int | None = None
    train: dict | None = None
    """Last training row of metrics.jsonl; `evaluation`: the last evaluation."""
    evaluation: dict | None = None
    published: float | None = None
    """The paper's validation loss at the evaluation's step, in nats."""
    job: str = ""
    errors: list[str] = field(default_factory=list)
    """What went wrong with the run, and which of its files cannot be read."""

    def cells(self) -> list[str]:
        """The row of the table, COLUMNS wide."""
        row, evaluation = self.train or {}, self.evaluation or {}
        loss, rate, step_s = evaluation.get("val_loss"), _number(row, "tokens_per_s"), _number(row, "step_s")
        left = (self.steps - row["step"]) * step_s if row and step_s and self.state == "running" else None
        return [
            self.label,
            self.state,
            f"{row.get('step', 0):,} of {self.steps:,}" if self.steps and self.state != "not started" else "",
            f"{row['loss']:.4f}" if row else "",
            f"{loss:.4f} at {evaluation['step']:,}" if evaluation else "",
            f"{loss - self.published:+.4f}" if self.published is not None else "",
            f"{rate:,.0f}" if rate else "",
            "" if left is None else f"{left / 3600:.1f} h" if left >= 3600 else f"{left / 60:.1f} min",
            self.job,
        ]

    @contextmanager
    def noting(self):
        """A part of the look at a run's files. What cannot be read is one of its errors: the other runs are
        shown."""
        try:
            yield
        except UserError as error:
            self.errors.append(str(error))
        except OSError as error:
            self.errors.append(f"{error.filename} cannot be read ({error.strerror})")


class View:
    """What all runs of an experiment and a seed are looked at with; each file and folder that they share is
    read once."""

    def __init__(self, experiment: Experiment, seed: int):
        self.experiment, self.seed = experiment, seed
        self.queue = read_queue()
        self.jobs = read_jobs(self.queue)
        self.curves = {} if experiment.rehearsal else published_curves(experiment.name)
        self.data_ready = os.path.isfile(data_dir(experiment) / "manifest.json")
        self.slurm = shutil.which("sbatch") is not None
        self._holders: dict[Path, dict[str, dict]] = {}

    def folder(self, run: str) -> RunDir:
        return RunDir.of(self.experiment, run, self.seed)

    def curve(self, run: str, layers: Callable[[], int]) -> dict[int, float]:
        """The paper's curve of a run; `layers` are counted only where the paper has one."""
        return curve_of(self.curves, run, layers()) if run in self.curves else {}

    def holder(self, path: Path) -> dict | None:
        """Who holds the lock of `path`, or None."""
        if path.parent not in self._holders:
            self._holders[path.parent] = lock_holders(path.parent)
        holder = self._holders[path.parent].get(path.name)
        if holder and holder.get("slurm") and self.queue and holder["silent"] > 2 * Lock.BEAT:
            return holder if holder["slurm"][0] in self.queue else None  # None: its job has left the queue
        return holder


def status(experiment: str, seed: int = 0, rehearse=None) -> None:
    """Print the standing of every run of `experiment`, and below it errors and next commands. A run whose
    files are damaged or cannot be read is a row with a remark."""
    loaded = load_experiment(experiment, rehearse)
    view = View(loaded, seed)
    cells, remarks = [], []
    for name, run in loaded.runs.items():
        standings = stand(view, name, run)
        cells += [standing.cells() for standing in standings]
        said = list(dict.fromkeys(error for standing in standings for error in standing.errors))
        command = next_command(view, experiment, name, run, standings[0].state)
        if said or command:
            remarks.append(f"{name}: " + "; ".join(said + [f"next: {command}"] * bool(command)))
    print(
        f"{'REHEARSAL ' if loaded.rehearsal else ''}{loaded.name}, seed {seed}, in {view.folder('').path}\n"
    )
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    shown = [[row[i] for i in used] for row in cells]
    print(tabulate(shown, headers=[COLUMNS[i] for i in used], tablefmt="simple", disable_numparse=True))
    print(
        "\n"
        + "\n".join(
            [*remarks, f"all that is finished: python -m inheritune table {experiment}{_flags(loaded, seed)}"]
        )
    )


def stand(view: View, name: str, run: Run) -> list[Standing]:
    """The run's standing; of a grown run, its own and below it those of its stages up to the current one."""
    folder, experiment = view.folder(name), view.experiment
    steps = experiment.train_of(run).steps
    if run.init.external:
        found = Standing(f"{name} (a model of others)", "unknown")
        with found.noting():
            found.state = "finished" if folder.results.is_file() else "not started"
        return [found]
    if not run.grow:
        return [one(view, name, folder, steps, view.curve(name, lambda: experiment.layers_of(run)))]
    depths = run.grow.depths(run.init.inherit.layers, experiment.model.layers)
    whole = Standing(name, "unknown")
    with whole.noting():
        chosen = _chosen_stage(folder, len(depths))
        whole.state = "finished" if chosen else "not started"
    if whole.errors:
        return [whole]
    stages = []
    for number, layers in enumerate(depths, start=1):
        label = f"{name}/stage{number}, {layers} layers" + (" (chosen)" if chosen == number else "")
        stages.append(
            one(view, label, folder.stage(number), steps, view.curve(name, lambda layers=layers: layers))
        )
        if stages[-1].state != "finished":
            break
    if chosen:
        stages = [stage for stage in stages if stage.state != "not started"]
        whole.label = f"{name} (stage {chosen} of {len(depths)})"
        return [whole, *stages]
    now = stages[-1].state
    between = len(stages) > 1 and now == "not started" or now == "finished"
    return [
        Standing(f"{name} (stage {len(stages)} of {len(depths)})", "stopped" if between else now),
        *stages,
    ]


def _chosen_stage(folder: RunDir, n_stages: int) -> int | None:
    """The stage that the DONE of a grown run names; None without one. Raises UserError if it names none of
    them."""
    if not folder.is_done():
        return None
    done = read_json(folder.done)
    stage = done.get("stage") if isinstance(done, dict) else None
    if type(stage) is not int or not 1 <= stage <= n_stages:
        raise UserError(
            f"{folder.done} names no stage of the run: it is damaged; restore it, or delete it and grow again"
        )
    return stage


def one(view: View, label: str, folder: RunDir, steps: int, curve: dict) -> Standing:
    """Where the run in `folder` stands, as its files, its lock and its last job tell."""
    found = Standing(label, "unknown", steps)
    with found.noting():
        rows = last_rows(folder.metrics, ("loss", "val_loss"))
        found.train, found.evaluation = rows.get("loss"), rows.get("val_loss")
        found.published = published_loss(curve, found.evaluation["step"]) if found.evaluation else None
    with found.noting():
        _find_state(found, view, folder)
    return found


def _find_state(found: Standing, view: View, folder: RunDir) -> None:
    """Fill in state, job and error. Raises UserError or OSError for what cannot be read."""
    job, holder = view.jobs.get(folder.path), view.holder(folder.path)
    if job and job.state:
        found.job = (
            f"{job.name} on {job.where}"
            if job.state == "RUNNING"
            else f"{job.name} {job.state} {job.where}".rstrip()
        )
    if folder.is_done():
        found.state, found.job = "finished", ""
    elif holder:
        found.state, found.job = "running", found.job or describe_holder(holder)
    elif job and job.state in ("RUNNING", "COMPLETING"):
        found.state = "running"
    elif job and job.failure:
        found.state = "failed"
        found.errors.append(f"job {job.name} failed: {job.failure}")
    elif folder.stopped.is_file():
        found.state = "stopped"
        found.errors.append(f"stopped: {_why_stopped(folder.stopped)}")
    elif folder.provenance.is_file():
        found.state = "failed"
        start = folder.read_starts()[-1]
        words = {"slurm_job": "job {}", "host": "{}", "time": "started {}"}
        where = ", ".join(word.format(start[key]) for key, word in words.items() if start.get(key))
        found.errors.append(f"its last start ended without a word ({where}): killed, or its node was lost")
    else:
        found.state = "not started"


def _why_stopped(file: Path) -> str:
    """The reason in STOPPED. Raises UserError if it is damaged."""
    said = read_json(file)
    if not isinstance(said, dict) or not isinstance(said.get("why"), str):
        raise UserError(f"{file} does not say why the run stopped: it is damaged; delete it")
    return said["why"]


def _number(row: dict, key: str) -> float | None:
    value = row.get(key)
    return (
        value
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def last_rows(path: Path, keys: tuple[str, ...]) -> dict[str, dict]:
    """{key: the last row of a JSON-lines file that has a number there}, from the end of the file; {} without
    one."""
    found = {}
    for n_bytes in TAIL_BYTES:
        missing = [key for key in keys if key not in found]
        tail = _read_tail(path, n_bytes) if missing else b""
        found |= {key: row for key in missing if (row := _last_row(tail, key))}
    return found


def _read_tail(path: Path, n_bytes: int) -> bytes:
    """The last `n_bytes` of a file; none without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - n_bytes))
            return file.read()
    except FileNotFoundError:
        return b""


def _last_row(tail: bytes, key: str) -> dict | None:
    """The last row with a step and a number at `key`. Only lines that name it are parsed: a record without
    any evaluation has thousands. A line that is cut or damaged is left out: the last one may be written at
    this moment."""
    word, end = json.dumps(key).encode(), len(tail)
    while (place := tail.rfind(word, 0, end)) >= 0:
        end, newline = tail.rfind(b"\n", 0, place) + 1, tail.find(b"\n", place)
        try:
            row = json.loads(tail[end:newline] if newline >= 0 else tail[end:])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and _number(row, key) is not None:
            return row
    return None


# --- Slurm --------------------------------------------------------------------------------------------------


def read_queue() -> dict[str, Job] | None:
    """{number or name: Job} of the user's jobs in the queue; None where there is no Slurm or it does not
    answer."""
    try:
        done = subprocess.run(SQUEUE, capture_output=True, text=True, errors="replace", timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = {}
    for line in done.stdout.splitlines():
        name, number, state, nodes, reason = line.split("|", 4)
        found[name] = found[number] = Job(name, "", state, nodes or f"({reason})")
    return found


def read_jobs(queue: dict[str, Job] | None) -> dict[Path, Job]:
    """{run folder: the last job that worked on it}, from runs/jobs/ (dist.tell_run, slurm/job.sh). Where that
    one has ended and others of its array wait, the first of these. What is not named like a job there, or
    cannot be read, is left out."""
    found, queue, arrays, marks, base = {}, queue or {}, {}, [], root()
    for other, job in queue.items():
        arrays.setdefault(other.partition("_")[0] + "_", job)
    folder = base / "runs" / names.JOBS
    listed = []
    with suppress(OSError):
        listed = os.listdir(folder)
    for name in listed:
        with suppress(OSError):
            if re.fullmatch(r"[0-9]+(_[0-9]+)?", name):
                run = folder / name / "run"
                marks.append(
                    (run.stat().st_mtime_ns, name, run.read_text(encoding="utf-8", errors="replace").strip())
                )
    for _, name, run in sorted(marks):
        queued = queue.get(name) or arrays.get(name.partition("_")[0] + "_") or Job(name)
        found[base / run] = Job(queued.name, _cause(folder / name / "failure"), queued.state, queued.where)
    return found


def _cause(failure: Path) -> str:
    """The first line of a job's failure file; empty without one."""
    try:
        return failure.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{failure} cannot be read ({error.strerror})"


# --- what to do next ----------------------------------------------------------------------------------------


def _flags(loaded: Experiment, seed: int) -> str:
    return seed_flag(seed) + (" --rehearse" if loaded.rehearsal else "")


def next_command(view: View, experiment: str, name: str, run: Run, state: str) -> str:
    """The line to paste that brings the run on; empty for one that is running or finished, or whose state is
    not known."""
    if state in ("running", "finished", "unknown"):
        return ""
    loaded, seed = view.experiment, view.seed
    if run.init.external:
        return f"python -m inheritune evaluate {experiment} --run {name}{_flags(loaded, seed)}"
    stop, verb = view.folder(name).stop, "grow" if run.grow else "train"
    again = f"rm {stop} && " if stop.is_file() else ""
    if verb == "train":  # grow does by itself what its run needs
        try:
            needed = unfinished_source(loaded, run, seed)
        except OSError:  # that run has a row of its own, which says what cannot be read
            return ""
        if needed:
            name, verb = needed, "grow" if loaded.run(needed).grow else "train"
    prefix = "REHEARSE=1 " if loaded.rehearsal else ""
    if verb == "train" and not view.data_ready:
        by_hand = f"python -m inheritune prepare {experiment}{_flags(loaded, 0)}"
        return f"{prefix}{launcher.script('prepare')} {experiment}" if view.slurm else by_hand
    if view.slurm:
        return f"{again}{prefix}{launcher.script(verb)} {experiment} {name}{seed_flag(seed)}"
    return f"{again}python -m inheritune {verb} {experiment} --run {name}{_flags(loaded, seed)}"


# --- are the files whole? -----------------------------------------------------------------------------------


def verify(path: str | Path, progress: Callable[[list], Iterable] = iter) -> None:
    """Print for every marker at or below `path` whether its files are whole, what has none yet, and what in
    checkpoints/ is not ours.

    Raises UserError at the end if anything is damaged or cannot be read, or if there is nothing to verify."""
    top = Path(path)
    folders, markers, unreadable = _look_below(top)
    if not markers and not unreadable:
        raise UserError(f"nothing to verify in {top}: no {', '.join(MARKERS)} at or below it")
    damaged = len(unreadable)
    for marker in progress(markers):
        damaged += _verify_marker(marker)
    for sentence in unreadable:
        print(f"DAMAGED: {sentence}")
    for folder in folders:
        if folder.name == "checkpoints":
            _print_unused(RunDir(folder.parent), set(folders))
    if damaged:
        raise UserError(
            f"{damaged} files of {top} are damaged (named above): restore them, or delete the folders they "
            f"are in"
        )


def _look_below(top: Path) -> tuple[list[Path], list[Path], list[str]]:
    """(`top` and all folders below it, links followed, each once; the markers in them; a sentence for each
    folder that cannot be read)."""
    folders, markers, unreadable, seen, waiting = [], [], [], set(), [top]
    while waiting:
        folder = waiting.pop()
        try:
            facts, entries = folder.stat(), list(os.scandir(folder))
            inner = [folder / entry.name for entry in entries if entry.is_dir()]
            found = [folder / entry.name for entry in entries if entry.name in MARKERS and entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):  # a running job deletes its old checkpoints
            continue
        except OSError as error:
            unreadable.append(f"{folder} cannot be read ({error.strerror})")
            continue
        if (facts.st_dev, facts.st_ino) not in seen:
            seen.add((facts.st_dev, facts.st_ino))
            folders.append(folder)
            markers += found
            waiting += inner
    order = {name: place for place, name in enumerate(MARKERS)}
    return (
        sorted(folders),
        sorted(markers, key=lambda path: (path.parent, order[path.name])),
        sorted(unreadable),
    )


def _verify_marker(marker: Path) -> int:
    """Print whether the files of `marker` are whole.  -> how many are not"""
    try:
        files = marked_files(marker)
        problems = list(damages(marker.parent, files))
    except (UserError, OSError) as error:
        files, problems = {}, [str(error)]
    if (
        problems and not marker.is_file()
    ):  # a running job keeps its last checkpoints only, and deletes their marker first
        print(f"deleted meanwhile: {marker.parent}")
        return 0
    size = sum(facts["bytes"] for facts in files.values()) / 1e6
    print(f"{'DAMAGED' if problems else 'whole'}: {marker} ({len(files)} files, {size:,.1f} MB)")
    print("".join(f"  {problem}\n" for problem in problems), end="")
    return len(problems)


def _print_unused(run: RunDir, readable: set[Path]) -> None:
    """Print what in checkpoints/ no run reads: unfinished, a copy under a wrong name, or of no name of
    ours."""
    own = {
        run.checkpoint(step).name: step for step in run.checkpoint_steps() if run.checkpoint(step) in readable
    }
    for path in sorted(path for path in run.checkpoints.iterdir() if path in readable or path.is_file()):
        if path.name in own and not (path / "COMPLETE").is_file():
            print(f"unfinished: {path} has no COMPLETE, so no run reads it")
        elif path.name in own and run.named_step(own[path.name]) != own[path.name]:
            print(
                f"not read by any run: {path} is a copy of the checkpoint of step "
                f"{run.named_step(own[path.name])}"
            )
        elif path.name not in own and not path.name.startswith(
            "."
        ):  # names with a dot are the system's, or temporary
            print(f"not read by any run: {path} has no name of a checkpoint")
