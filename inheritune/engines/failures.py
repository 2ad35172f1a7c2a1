"""Failures on one rank that every rank must learn of."""

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inheritune.errors import UserError
from inheritune.files import storage
from inheritune.files.processes import get_node_name
from inheritune.files.writing import remove_if_possible
from inheritune.runtime.dist import gather_objects
from inheritune.runtime.ranks import get_rank

Gather = Callable[[Any], list[Any]]
"""Returns every rank's value, in rank order, on every rank: `gather_objects`, or what does the same without a
collective."""


def explain_write_error(error: Exception, path: Path) -> Exception:
    """Return `error` as a UserError if the disk is full, which torch's zip writer reports as a RuntimeError
    of its own."""
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        return storage.explain_disk_error(OSError(errno.EFBIG if limited else errno.ENOSPC, ""), path)
    return storage.explain_disk_error(error, path) if isinstance(error, OSError) else error


def raise_on_all_ranks(
    problem: Exception | None, unfinished: Path | None = None, gather: Gather = gather_objects
) -> None:
    """Raise on every rank if any rank has a `problem`, after deleting the folder `unfinished`. A rank raises
    its own problem if that is no UserError; the other ranks raise a UserError that names the rank."""
    problems = gather(None if problem is None else f"{get_node_name()} (rank {get_rank()}): {problem}")
    failed = next(filter(None, problems), None)
    if failed is None:
        return
    if unfinished:
        if get_rank() == 0:
            remove_if_possible(unfinished)
        gather(None)  # before a rank leaves, and srun ends the others
    if problem is not None and not isinstance(problem, UserError):
        raise problem
    raise UserError(failed)
