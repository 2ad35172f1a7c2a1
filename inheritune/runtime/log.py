"""The log of rank 0, on the terminal and in train.log, and progress bars. No program reads a number from a
log."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from inheritune.files.rundir import RunDir
from inheritune.files.writing import break_links
from inheritune.runtime.ranks import get_rank

logger = logging.getLogger("inheritune")


class _LogFile(logging.FileHandler):
    """A log file that ignores a full disk: the write of metrics.jsonl reports it, once."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def set_up_logging(run_dir: RunDir | None = None) -> None:
    """Let rank 0 log to the terminal and to the run's train.log; the other ranks only log warnings."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if get_rank() == 0 else logging.WARNING)
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if run_dir is not None and get_rank() == 0:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        break_links(run_dir.log)
        file = _LogFile(run_dir.log, encoding="utf-8", errors="replace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(file)


def make_progress_bar(
    steps: Iterable[Any] | None = None, desc: str = "", unit: str = "it", **options: Any
) -> tqdm:
    """Return a tqdm bar for rank 0's terminal. It writes nothing to a file: there the logger's lines show the
    progress."""
    hidden = True if get_rank() else None  # None: tqdm hides itself if there is no terminal
    return tqdm(
        steps,
        desc=desc,
        unit=unit,
        leave=False,
        disable=hidden,
        mininterval=0.5,
        dynamic_ncols=True,
        **options,
    )
