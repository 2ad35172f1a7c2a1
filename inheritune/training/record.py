"""metrics.jsonl, the record of a run. No log is ever read to learn a number: tables and plots come from
metrics.jsonl and results.json."""

import json
import statistics
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from inheritune.config.sections import Train
from inheritune.files.rundir import RunDir
from inheritune.files.writing import replace_atomically, sync_file
from inheritune.runs.job import Job
from inheritune.runtime.dist import get_rank
from inheritune.runtime.log import logger
from inheritune.training.mirror import start_wandb

if TYPE_CHECKING:
    from wandb import Run

SPIKE_SIGMAS = 7
"""A loss this many standard deviations above the mean of the last SPIKE_ROWS logged ones is a spike."""
SPIKE_ROWS = 100


class Metrics:
    """Rank 0's writer of metrics.jsonl: one row per logged step (`loss` ...) or validation (`val_loss`).

    A run that resumes at `step` (-1: that starts anew) continues with the rows that its checkpoint keeps.
    The rows after them are moved to metrics.discarded.jsonl, so that no step has two rows.

    A spike of the loss (SPIKE_SIGMAS) gets a warning, and its row `spike`, the number of deviations. This is
    OLMo 2's measure of stability (arXiv 2501.00656) over fewer rows. It is only reported."""

    def __init__(self, run_dir: RunDir, step: int, mirror: "Run | None" = None):
        kept, known = RunDir(run_dir.checkpoint(step)).metrics, set()
        losses: deque[bytes] = deque(maxlen=SPIKE_ROWS)
        for line in _whole_lines(kept):
            known.add(xxh3_64_intdigest(line))
            if b'"loss": ' in line:
                losses.append(line)
        _discard(run_dir, known)
        with replace_atomically(run_dir.metrics) as temporary, open(temporary, "wb") as file:
            file.writelines(_whole_lines(kept))
        self._file = open(run_dir.metrics, "a", encoding="utf-8")  # noqa: SIM115 - open for the run's length
        self._mirror = mirror
        self._losses = deque((json.loads(line)["loss"] for line in losses), SPIKE_ROWS)

    def add(self, row: dict) -> None:
        """Write a row, and send it to W&B."""
        if "loss" in row:
            row = {**row, **self._spike(row)}
            self._losses.append(row["loss"])
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._to_mirror("log", row)

    def _to_mirror(self, method: str, *arguments: dict) -> None:
        """Call a method of the W&B run. If it fails, even by an error of W&B's own process, the run continues
        without it."""
        try:
            if self._mirror is not None:
                getattr(self._mirror, method)(*arguments)
        except Exception as error:
            self._mirror = None
            logger.warning(
                "W&B failed (%r); the run continues without it, metrics.jsonl is the record", error
            )

    def _spike(self, row: dict) -> dict[str, float]:
        """Return the size of a spike, or {}; warn of it."""
        if len(self._losses) < SPIKE_ROWS // 5:  # too few to tell a spike from the steep fall at first
            return {}
        mean, deviation = statistics.fmean(self._losses), max(statistics.stdev(self._losses), 1e-3)
        sigmas = (row["loss"] - mean) / deviation
        if sigmas < SPIKE_SIGMAS:
            return {}
        logger.warning(
            "step %d: the loss %.3f is %.0f standard deviations above the mean %.3f of the last %d logged; "
            "training continues",
            row["step"],
            row["loss"],
            sigmas,
            mean,
            len(self._losses),
        )
        return {"spike": round(sigmas, 1)}

    def sync(self) -> None:
        """Bring the rows to disk. A checkpoint must not be complete before the rows of its steps are."""
        sync_file(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._to_mirror("finish")


def open_metrics(job: Job, train: Train, resumed_at: int | None) -> Metrics | None:
    """Open the record of a run that resumes at step `resumed_at` (None: that starts anew), and its W&B
    mirror. Returns None on all ranks but 0."""
    if get_rank() != 0:
        return None
    mirror = start_wandb(job.dir, job.experiment, job.name, train.wandb, train.wandb_project)
    return Metrics(job.dir, -1 if resumed_at is None else resumed_at, mirror)


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without a last one that a crash cut off; nothing if there is no file."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def _discard(run_dir: RunDir, known: set[int]) -> None:
    """Add the rows of metrics.jsonl whose lines' hashes are not `known` to metrics.discarded.jsonl. No row is
    added twice, however often a start is killed between this and the writing of metrics.jsonl."""
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
    with replace_atomically(run_dir.discarded_metrics) as temporary, open(temporary, "wb") as file:
        file.writelines(before + [line for line in rows if line not in seen])


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
