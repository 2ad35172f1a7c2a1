"""A limit of open files, for a part of a test."""

import os
import resource
import tracemalloc  # noqa: F401 (pytest imports it when something is not closed, which may be within)
from contextlib import contextmanager


@contextmanager
def open_files_limited(more: int):
    """Allow as many open files as there are now, and `more`."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
