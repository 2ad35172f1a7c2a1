"""`status EXPERIMENT`: where every run stands, read from the run folders (and squeue) alone, without torch.

Runs are written while this reads: rows come from the end of metrics.jsonl, and a line cut in the middle is left out. What the
paper's logs say at the same step comes from recipes/paper (curves.yaml tells which curve belongs to which run).
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from inheritune import names
from inheritune.config import Experiment, Run, UserError, load_experiment
from inheritune.paper import curve_of, published_curves, published_loss
from inheritune.rundir import MARKERS, Lock, RunDir, damages, data_dir, lock_holder, marked_files, read_json, root, seed_flag
from inheritune.stages import unfinished_source

COLUMNS = (
    "run", "state", "step", "loss", "validation loss", "minus the paper's there", "tokens/s", "time left", "job and node",
)  # fmt: skip
TAIL_BYTES = 1 << 20  # of metrics.jsonl: some thousand rows, more than lie between two evaluations
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
    """Where a run, or a stage of a grown one, stands. state: not started, running, stopped, finished, failed."""

    label: str
    state: str = "not started"
    steps: int | None = None
    train: dict | None = None
    """Last training row of metrics.jsonl; `evaluation`: the last evaluation."""
    evaluation: dict | None = None
    published: float | None = None
    """The paper's validation loss at the evaluation's step, in nats."""
    job: str = ""
    error: str = ""

    def cells(self) -> list[str]:
        """The row of the table, COLUMNS wide."""
        row, evaluation = self.train or {}, self.evaluation or {}
        loss, rate = evaluation.get("val_loss"), row.get("tokens_per_s")
        left = (self.steps - row["step"]) * row["step_s"] if row and self.state == "running" else None
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


def status(experiment: str, seed: int = 0, rehearse=None) -> None:
    """Print the standing of every run of `experiment`, and below it errors and next commands."""
    loaded = load_experiment(experiment, rehearse)
    queue = read_queue()
    jobs, curves = read_jobs(queue), {} if loaded.rehearsal else published_curves(loaded.name)
    cells, remarks = [], []
    for name, run in loaded.runs.items():
        standings = stand(loaded, name, run, seed, curves, jobs, queue)
        cells += [standing.cells() for standing in standings]
        said = next((standing.error for standing in standings if standing.error), "")
        command = next_command(loaded, experiment, name, run, seed, standings[0].state)
        if said or command:
            remarks.append(f"{name}: " + "; ".join(filter(None, [said, f"next: {command}" if command else ""])))
    print(f"{'REHEARSAL ' if loaded.rehearsal else ''}{loaded.name}, seed {seed}, in {RunDir.of(loaded, '', seed).path}\n")
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    shown = [[row[i] for i in used] for row in cells]
    print(tabulate(shown, headers=[COLUMNS[i] for i in used], tablefmt="simple", disable_numparse=True))
    print("\n" + "\n".join([*remarks, f"all that is finished: python -m inheritune table {experiment}{_flags(loaded, seed)}"]))


def stand(loaded: Experiment, name: str, run: Run, seed: int, curves: dict, jobs: dict, queue: dict | None) -> list[Standing]:
    """The run's standing; of a grown run, its own and below it those of its stages up to the current one."""
    folder, steps = RunDir.of(loaded, name, seed), loaded.train_of(run).steps
    if run.init.external:
        return [Standing(f"{name} (a model of others)", "finished" if folder.results.is_file() else "not started")]
    if not run.grow:
        return [one(name, folder, steps, curve_of(curves, name, loaded.layers_of(run)), jobs, queue)]
    depths = run.grow.depths(run.init.inherit.layers, loaded.model.layers)
    done = read_json(folder.done) if folder.is_done() else None
    stages = []
    for number, layers in enumerate(depths, start=1):
        label = f"{name}/stage{number}, {layers} layers" + (" (chosen)" if done and done["stage"] == number else "")
        stages.append(one(label, folder.stage(number), steps, curve_of(curves, name, layers), jobs, queue))
        if stages[-1].state != "finished":
            break
    if done:
        stages = [stage for stage in stages if stage.state != "not started"]
        return [Standing(f"{name} (stage {done['stage']} of {len(depths)})", "finished"), *stages]
    now = stages[-1].state
    between = len(stages) > 1 and now == "not started" or now == "finished"
    return [Standing(f"{name} (stage {len(stages)} of {len(depths)})", "stopped" if between else now), *stages]


def one(label: str, folder: RunDir, steps: int, curve: dict, jobs: dict, queue: dict | None) -> Standing:
    """Where the run in `folder` stands, as its files, its lock and its last job tell."""
    rows, job, holder = last_rows(folder.metrics, ("loss", "val_loss")), jobs.get(folder.path), lock_holder(folder.path)
    evaluation = rows.get("val_loss")
    found = Standing(label, "not started", steps, rows.get("loss"), evaluation)
    found.published = published_loss(curve, evaluation["step"]) if evaluation else None
    if holder and holder.get("slurm") and queue and holder["silent"] > 2 * Lock.BEAT and holder["slurm"][0] not in queue:
        holder = None  # its job has left the queue
    if job and job.state:
        found.job = f"{job.name} on {job.where}" if job.state == "RUNNING" else f"{job.name} {job.state} {job.where}".rstrip()
    if folder.is_done():
        found.state, found.job = "finished", ""
    elif holder:
        found.state = "running"
        found.job = found.job or f"{holder.get('job') or 'process ' + str(holder.get('pid'))} on {holder.get('host')}"
    elif job and job.state in ("RUNNING", "COMPLETING"):
        found.state = "running"
    elif job and job.failure:
        found.state, found.error = "failed", f"job {job.name} failed: {job.failure}"
    elif folder.stopped.is_file():
        found.state, found.error = "stopped", f"stopped: {read_json(folder.stopped)['why']}"
    elif folder.provenance.is_file():
        start = read_json(folder.provenance)["starts"][-1]
        where = f"{'job ' + start['slurm_job'] + ', ' if start['slurm_job'] else ''}{start['host']}, started {start['time']}"
        found.state, found.error = "failed", f"its last start ended without a word ({where}): killed, or its node was lost"
    return found


def last_rows(path: Path, keys: tuple[str, ...]) -> dict[str, dict]:
    """{key: the last row of a JSON-lines file that has it}, from the last TAIL_BYTES of the file; {} without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # the last line is being written; the first may be cut
            continue
        found |= {key: row for key in keys if key in row and key not in found}
        if len(found) == len(keys):
            break
    return found


# --- Slurm ----------------------------------------------------------------------------------------------------------------


def read_queue() -> dict[str, Job] | None:
    """{number or name: Job} of the user's jobs in the queue; None where there is no Slurm or it does not answer."""
    try:
        said = subprocess.run(SQUEUE, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = {}
    for line in said.splitlines():
        name, number, state, nodes, reason = line.split("|", 4)
        found[name] = found[number] = Job(name, "", state, nodes or f"({reason})")
    return found


def read_jobs(queue: dict[str, Job] | None) -> dict[Path, Job]:
    """{run folder: the last job that worked on it}, from runs/jobs/ (dist.tell_run, slurm/job.sh). Where that one has ended
    and others of its array wait, the first of these."""
    found, queue = {}, queue or {}
    marks = [(path.stat().st_mtime_ns, path) for path in (root() / "runs" / names.JOBS).glob("*/run")]
    for _, path in sorted(marks):
        name, failure = path.parent.name, path.parent / "failure"
        array = name.partition("_")[0] + "_"
        queued = queue.get(name) or next((job for other, job in queue.items() if other.startswith(array)), Job(name))
        cause = failure.read_text(encoding="utf-8").partition("\n")[0] if failure.is_file() else ""
        found[root() / path.read_text(encoding="utf-8").strip()] = Job(queued.name, cause, queued.state, queued.where)
    return found


# --- what to do next ------------------------------------------------------------------------------------------------------


def _flags(loaded: Experiment, seed: int) -> str:
    return seed_flag(seed) + (" --rehearse" if loaded.rehearsal else "")


def next_command(loaded: Experiment, experiment: str, name: str, run: Run, seed: int, state: str) -> str:
    """The line to paste that brings the run on; empty for one that is running or finished."""
    if state in ("running", "finished"):
        return ""
    if run.init.external:
        return f"python -m inheritune evaluate {experiment} --run {name}{_flags(loaded, seed)}"
    stop, verb = RunDir.of(loaded, name, seed).stop, "grow" if run.grow else "train"
    again = f"rm {stop} && " if stop.is_file() else ""
    if verb == "train":  # grow does by itself what its run needs
        needed = unfinished_source(loaded, run, seed)
        if needed:
            name, verb = needed, "grow" if loaded.run(needed).grow else "train"
    slurm = shutil.which("sbatch")
    prefix = "REHEARSE=1 " if loaded.rehearsal else ""
    if verb == "train" and not (data_dir(loaded) / "manifest.json").is_file():
        by_hand = f"python -m inheritune prepare {experiment}{_flags(loaded, 0)}"
        return f"{prefix}bash slurm/prepare.sh {experiment}" if slurm else by_hand
    if slurm:
        return f"{again}{prefix}bash slurm/{verb}.sh {experiment} {name}{seed_flag(seed)}"
    return f"{again}python -m inheritune {verb} {experiment} --run {name}{_flags(loaded, seed)}"


# --- are the files whole? ---------------------------------------------------------------------------------------------------


def verify(path: str | Path, progress: Callable[[list], Iterable] = iter) -> None:
    """Print for every marker at or below `path` whether its files are whole, and what has none yet.

    Raises UserError at the end if anything is damaged, or if there is nothing to verify."""
    top = Path(path)
    folders = [top, *sorted(p for p in top.rglob("*") if p.is_dir())]
    markers = [folder / name for folder in folders for name in MARKERS if (folder / name).is_file()]
    if not markers:
        raise UserError(f"nothing to verify in {top}: no {', '.join(MARKERS)} at or below it")
    damaged = 0
    for marker in progress(markers):
        try:
            files = marked_files(marker)
            problems = list(damages(marker.parent, files))
        except (UserError, OSError) as error:
            files, problems = {}, [str(error)]
        damaged += len(problems)
        size = sum(facts["bytes"] for facts in files.values()) / 1e6
        print(f"{'DAMAGED' if problems else 'whole'}: {marker} ({len(files)} files, {size:,.1f} MB)")
        print("".join(f"  {problem}\n" for problem in problems), end="")
    for folder in folders:
        if folder.parent.name == "checkpoints" and folder.name.startswith("step_") and folder / "COMPLETE" not in markers:
            print(f"unfinished: {folder} has no COMPLETE, so no run reads it")
    if damaged:
        raise UserError(f"{damaged} files of {top} are damaged (named above): restore them, or delete the folders they are in")
