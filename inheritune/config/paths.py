"""Paths of the repository, and paths that an experiment file names."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "recipes"
COMMIT = "COMMIT"
"""File of a snapshot of the checkout (submit/snapshot.py) that names its commit."""
OWN = "own"
"""Folder of a snapshot with the user's own files, each under its whole path."""


def find_checkout() -> Path:
    """Return the checkout that the user works in; the running code may be a snapshot of it."""
    given = os.environ.get("INHERITUNE_REPOSITORY")
    return Path(given) if given and (REPOSITORY / COMMIT).is_file() else REPOSITORY


def find_copy(path: Path) -> Path | None:
    """Return the snapshot's copy of a file, or of a path of the checkout, in a job that runs a snapshot; None
    if it has none, and outside such a job."""
    checkout = find_checkout()
    if checkout == REPOSITORY:
        return None
    absolute = Path(os.path.abspath(path))
    if (copy := REPOSITORY / OWN / absolute.relative_to("/")).is_file():  # a folder there is not whole
        return copy
    if not absolute.is_relative_to(checkout):
        return None
    copy = REPOSITORY / absolute.relative_to(checkout)
    return copy if copy.exists() else None


def resolve_path(path: str) -> Path:
    """Return a path of an experiment file: absolute, or relative to the current folder or the repository.

    In a job that runs a snapshot, it is the snapshot's copy where there is one."""
    given = Path(os.path.expandvars(path)).expanduser()
    if copy := find_copy(given):
        return copy
    return given if given.is_absolute() or given.exists() else REPOSITORY / given
