"""What a run records: metrics.jsonl (the record), its W&B mirror, provenance.json.

Nothing ever reads a log to learn a number: tables and plots come from metrics.jsonl and results.json.
"""

import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from xxhash import xxh3_64_intdigest

from inheritune.config.experiment import REPOSITORY, Experiment, read_yaml
from inheritune.errors import UserError
from inheritune.files.rundir import (
    RunDir,
    read_json,
    read_jsonl,
    replacing,
    root,
    sync_file,
    write_json,
    write_text,
)
from inheritune.runtime.dist import world
from inheritune.runtime.log import logger, progress

GIT_PATIENCE_S = 30

SPIKE_SIGMAS, SPIKE_ROWS = 7, 100


class Metrics:
    """Rank 0's writer of metrics.jsonl: one row per logged step (`loss` ...) or evaluation (`val_loss`).

    A run that resumes at `step` (-1: from nothing) goes on with the rows that its checkpoint keeps; those
    after them are moved to metrics.discarded.jsonl: nothing has two rows.

    A loss that lies SPIKE_SIGMAS standard deviations or more above the mean of the last SPIKE_ROWS logged
    ones gets a warning and `spike`, how many (OLMo 2's measure of stability, arXiv 2501.00656, over fewer
    rows). It is only reported."""

    def __init__(self, run_dir: RunDir, step: int, mirror=None):
        kept, known, losses = RunDir(run_dir.checkpoint(step)).metrics, set(), deque(maxlen=SPIKE_ROWS)
        for line in _whole_lines(kept):
            known.add(xxh3_64_intdigest(line))
            if b'"loss": ' in line:
                losses.append(line)
        _discard(run_dir, known)
        with replacing(run_dir.metrics) as temporary, open(temporary, "wb") as file:
            file.writelines(_whole_lines(kept))
        self._file = open(run_dir.metrics, "a", encoding="utf-8")  # noqa: SIM115 - open for the run's length
        self._mirror = mirror
        self._losses = deque((json.loads(line)["loss"] for line in losses), SPIKE_ROWS)

    def add(self, row: dict) -> None:
        if "loss" in row:
            row = {**row, **self._spike(row)}
            self._losses.append(row["loss"])
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._to_mirror("log", row)

    def _to_mirror(self, method: str, *arguments) -> None:
        """W&B never stops a run: where it fails, also by an error of its own process, the run goes on without
        it."""
        try:
            if self._mirror is not None:
                getattr(self._mirror, method)(*arguments)
        except Exception as error:
            self._mirror = None
            logger.warning("W&B failed (%r); the run goes on without it, metrics.jsonl is the record", error)

    def _spike(self, row: dict) -> dict:
        if len(self._losses) < SPIKE_ROWS // 5:  # too few to tell a spike from the fall of the first steps
            return {}
        mean, deviation = statistics.fmean(self._losses), max(statistics.stdev(self._losses), 1e-3)
        sigmas = (row["loss"] - mean) / deviation
        if sigmas < SPIKE_SIGMAS:
            return {}
        logger.warning(
            "step %d: the loss %.3f is %.0f standard deviations above the mean %.3f of the last %d logged; "
            "training goes on",
            row["step"],
            row["loss"],
            sigmas,
            mean,
            len(self._losses),
        )
        return {"spike": round(sigmas, 1)}

    def sync(self) -> None:
        """Bring the rows to disk: before a checkpoint says that these steps are behind us."""
        sync_file(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._to_mirror("finish")


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, but for a last one that a crash cut off; none without a file."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def _discard(run_dir: RunDir, known: set[int]) -> None:
    """Add the rows of metrics.jsonl that are not `known` (the hashes of their lines) to
    metrics.discarded.jsonl. None is added twice, however often a start is killed between this and the writing
    of metrics.jsonl."""
    try:
        rest = [line for line in _whole_lines(run_dir.metrics) if xxh3_64_intdigest(line) not in known]
    except OSError as error:
        logger.warning("the record up to the checkpoint is restored, what came after it is lost: %s", error)
        return
    rows = [line for line in rest if _is_row(line)]
    if len(rows) < len(rest):
        logger.warning("%d damaged lines of %s are left out", len(rest) - len(rows), run_dir.metrics)
    if not rows:
        return
    before = list(_whole_lines(run_dir.discarded_metrics))
    seen = set(before)
    with replacing(run_dir.discarded_metrics) as temporary, open(temporary, "wb") as file:
        file.writelines(before + [line for line in rows if line not in seen])


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def start_wandb(run_dir: RunDir, experiment: Experiment, run: str, mode: str, project: str):
    """The W&B run that mirrors this run folder (one id per folder, so a requeued job continues it), or None.

    W&B never stops a run: where it cannot start, the run goes on without it and says so."""
    if mode == "disabled":
        return None
    import wandb

    try:
        return _open_wandb(
            run_dir,
            f"{experiment.name}/{run}",
            experiment.model_dump(mode="json"),
            experiment.rehearsal,
            mode,
            project,
            60,
        )
    except (wandb.errors.Error, OSError) as error:
        logger.warning("W&B could not start (%s); the run goes on, metrics.jsonl is the record", error)
        return None


def _open_wandb(
    run_dir: RunDir, name: str, config: dict, rehearsal: bool, mode: str, project: str, patience_s: int = 0
):
    """The W&B run of this folder, new or continued. What has not reached W&B `patience_s` after its end (0:
    for ever) stays on disk only: a job near its time limit must not wait for a network. Raises what W&B
    raises."""
    import wandb

    if not run_dir.wandb_id.is_file():
        write_text(run_dir.wandb_id, uuid.uuid4().hex[:12])
    mirror = wandb.init(
        project=project,
        id=run_dir.wandb_id.read_text(),
        resume="allow",
        mode=mode,
        dir=str(run_dir.path),
        name=name,
        config=config,
        tags=["rehearsal"] if rehearsal else None,
        settings=wandb.Settings(silent=True, finish_timeout=patience_s),
    )
    mirror.define_metric(
        "*", step_metric="step"
    )  # rows are told apart by our step: a resumed run may log one again
    return mirror


def sync(folder: str) -> None:
    """Send the rows of a run folder's metrics.jsonl, those that an earlier sync did not, to its one W&B run,
    from a machine with internet. Offline segments are not looked at: metrics.jsonl is the record, and it
    holds no row twice.

    Raises UserError if `folder` is no run folder, and if W&B knows no account here or cannot be reached."""
    run_dir = RunDir(folder)
    stages = [f"stage{number}" for number in run_dir.stages() if run_dir.stage(number).metrics.is_file()]
    if stages and not run_dir.metrics.is_file():
        raise UserError(
            f"{folder} is a grown run, whose stages are runs of their own ({', '.join(stages)}); sync "
            f"{folder}/stage1"
        )
    if not (run_dir.metrics.is_file() and run_dir.experiment.is_file()):
        raise UserError(
            f"{folder} is no run folder (no metrics.jsonl and experiment.yaml); runs lie under "
            f"{root() / 'runs'}"
        )
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "offline"):
        raise UserError(
            f"WANDB_MODE is '{mode}', so there is nothing to sync to; unset it, or use offline or online"
        )
    described, marker = read_yaml(run_dir.experiment), run_dir.path / "wandb_synced.json"
    rows = read_jsonl(run_dir.metrics)
    synced = read_json(marker) if marker.is_file() and run_dir.wandb_id.is_file() else None
    # what was written to an offline segment has not reached W&B, as far as can be seen here
    new = _unsynced(rows, synced if synced and synced["mode"] == mode else None)
    if not new:
        print(f"{folder}: nothing new since the last sync ({mode}, {len(rows)} rows)")
        return
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "W&B knows no account on this machine: run 'wandb login', or set WANDB_API_KEY, and sync again"
        )
    name = f"{described['experiment']}/{described['run_name']}"
    try:
        mirror = _open_wandb(
            run_dir, name, described, described["rehearsal"], mode, described["train"]["wandb_project"]
        )
        for row in progress(new, desc="syncing", unit="row"):
            mirror.log(row)
        mirror.finish()
    except wandb.errors.AuthenticationError as error:
        raise UserError(
            f"W&B refuses this machine's account ({_one_line(error)}): run 'wandb login --relogin'"
        ) from None
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"W&B cannot be reached ({_one_line(error)}); sync where there is internet, or with "
            f"WANDB_MODE=offline into a "
            f"segment that 'wandb sync' can send later"
        ) from None
    write_json(marker, {"mode": mode, "rows": len(rows), "last_step": rows[-1]["step"]})
    done = "sent to" if mode == "online" else "written to a segment that 'wandb sync' sends, for"
    print(f"{folder}: {len(new)} of {len(rows)} rows {done} W&B run {mirror.id}")


def _unsynced(rows: list[dict], synced: dict | None) -> list[dict]:
    """The rows after those that an earlier sync sent. A run that went back to a checkpoint since then has
    other rows at its end: of these, the steps that are new (W&B cannot take back what it has)."""
    if synced is None:
        return rows
    count = synced["rows"]
    if len(rows) >= count and rows[count - 1]["step"] == synced["last_step"]:
        return rows[count:]
    return [row for row in rows if row["step"] > synced["last_step"]]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def record_provenance(run_dir: RunDir, **facts) -> None:
    """Add this start of the run to provenance.json: when, where, which code and versions, and `facts` (data,
    parents)."""
    starts = run_dir.read_starts() if run_dir.provenance.is_file() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "host": socket.gethostname(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "ranks": world(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in ("torch", "deepspeed", "transformers", "numpy")},
            **facts,
        }
    )
    write_json(run_dir.provenance, {"starts": starts})


class StartClock:
    """Seconds of a start by part: from the beginning of the process, or of a later job in it, to the end of
    the first step."""

    def __init__(self, first: bool):
        self.parts: dict[str, float] = {}
        self._last = time.time()
        if first:
            with contextlib.suppress(psutil.Error):  # where /proc is not mounted
                self._last = psutil.Process().create_time()

    def end(self, part: str) -> None:
        """`part` ends now."""
        now = time.time()
        self.parts[part], self._last = round(now - self._last, 2), now

    def record(self, run_dir: RunDir) -> None:
        """Say it, and add it to this start in provenance.json."""
        shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        logger.info("the first step ended %.1f s after the start: %s", sum(self.parts.values()), shown)
        starts = run_dir.read_starts()
        starts[-1]["start_s"] = self.parts
        write_json(run_dir.provenance, {"starts": starts})


def git_commit() -> str | None:
    """Commit of the repository, with '+changes' where files differ from it; None outside a git checkout,
    without git, or where git refuses or does not answer (a checkout that another user owns, a network disk
    that hangs)."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "-uno") else "")


def _git(*words: str) -> str | None:
    """What git says of the repository, None if it fails. It takes no lock: others may be working in the
    checkout."""
    command = ["git", "--no-optional-locks", *words]
    try:
        said = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=GIT_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if said.returncode else said.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
