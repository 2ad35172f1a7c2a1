"""What the ranks report to the script of their Slurm job, as files in $INHERITUNE_JOB: the run folder, a stop
with work left, the cause of a failure. slurm/job.sh reads them, and so does `grow`, which has a folder of its
own ($INHERITUNE_TOLD) outside a job."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from inheritune.errors import Stopped, UserError
from inheritune.files.processes import get_node_name
from inheritune.files.storage import find_root
from inheritune.runtime.ranks import get_rank


def report_run(folder: Path) -> None:
    """Record for `status` which run folder this job works on ($INHERITUNE_JOB/run, relative to
    $INHERITUNE_ROOT)."""
    if get_rank() == 0:
        _write_report("run", f"{folder.relative_to(find_root())}\n")


def report_stopped(stop: Stopped) -> None:
    """Report that this start has saved and stopped with work left. The script resumes it ("more") or leaves
    that to the user who asked for the stop ("stopped").

    Raises UserError if the report cannot be written: the script would take the work for finished."""
    try:
        _write_report("more" if stop.again else "stopped", f"{stop}\n")
    except OSError as error:
        raise UserError(
            f"{stop}; but {error.filename} cannot be written ({error.strerror}), so the job stops here"
        ) from None


@contextmanager
def collect_reports() -> Iterator[Path]:
    """Yield the folder in which ranks that start within it report: the job's, or a temporary one."""
    if folder := os.environ.get("INHERITUNE_JOB"):  # from which the job's start has removed older ones
        yield Path(folder)
        return
    with TemporaryDirectory(prefix="inheritune-") as told:
        os.environ["INHERITUNE_TOLD"] = told
        try:
            yield Path(told)
        finally:
            del os.environ["INHERITUNE_TOLD"]


def find_stop(folder: Path) -> str | None:
    """Return how a rank stopped with work left: "more" if the same command may go on, "stopped" if the user
    asked for it, None if it did not."""
    return next((name for name in ("stopped", "more") if (folder / name).is_file()), None)


def report_failure(sentence: str, code: int = 1) -> None:
    """Report why this rank failed, and its exit code (srun may report that of a task it ended because of this
    one). Only the first report is kept: it is the cause, the other ranks have only lost their peer."""
    line = sentence.strip().partition("\n")[0].rstrip(".")
    try:
        _write_report("failure", f"{get_node_name()} rank {get_rank()}: {line}\n{code}\n", mode="x")
    # another rank was first, or the disk is full: the log has the sentence, and the exit code shows a failure
    except OSError:
        return


def _write_report(name: str, text: str, mode: str = "w") -> None:
    """Write a file for the script of this Slurm job, or for `grow`, if there is one. Raises OSError."""
    if folder := os.environ.get("INHERITUNE_JOB") or os.environ.get("INHERITUNE_TOLD"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / name, mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
