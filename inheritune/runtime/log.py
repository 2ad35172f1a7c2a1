"""What a run says: rank 0's log, on the terminal and in train.log, and progress bars. Nothing reads a log to
learn a number."""

import logging
import sys

from tqdm import tqdm

from inheritune.files.rundir import RunDir, break_links
from inheritune.runtime.dist import rank

logger = logging.getLogger("inheritune")


def setup(run_dir: RunDir | None = None) -> None:
    """Rank 0 speaks on the terminal and in the run's train.log; the other ranks only warn."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if run_dir is not None and rank() == 0:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        break_links(run_dir.log)
        file = logging.FileHandler(run_dir.log, encoding="utf-8", errors="replace")
        file.handleError = lambda _: None  # a full disk: the record's own write says so, once
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(file)


def progress(steps=None, desc: str = "", unit: str = "it", **options) -> tqdm:
    """A tqdm bar on rank 0's terminal; nothing in a log file, where lines of the logger tell the progress."""
    hidden = True if rank() else None  # None: tqdm hides itself where there is no terminal
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
