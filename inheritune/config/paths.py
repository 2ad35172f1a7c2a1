"""Paths of the repository, and paths that an experiment file names."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "recipes"
COMMIT = "COMMIT"
"""File of a snapshot of the checkout (submit/snapshot.py) that names its commit."""


def find_checkout() -> Path:
    """Return the checkout that the user works in; the running code may be a snapshot of it."""
    given = os.environ.get("INHERITUNE_REPOSITORY")
    return Path(given) if given and (REPOSITORY / COMMIT).is_file() else REPOSITORY


def resolve_path(path: str) -> Path:
    """Return a path of an experiment file: absolute, or relative to the current folder or the repository.

    In a job that runs a snapshot, a file of the checkout is that of the snapshot."""
    given = Path(os.path.expandvars(path)).expanduser()
    checkout, here = find_checkout(), Path.cwd()
    if checkout != REPOSITORY and not given.is_absolute() and here.is_relative_to(checkout):
        copy = REPOSITORY / here.relative_to(checkout) / given
        given = copy if copy.exists() else given
    return given if given.is_absolute() or given.exists() else REPOSITORY / given
