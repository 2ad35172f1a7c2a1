"""Paths of the repository, and paths that an experiment file names."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "recipes"


def resolve_path(path: str) -> Path:
    """Return a path of an experiment file: absolute, or relative to the current folder or the repository."""
    given = Path(os.path.expandvars(path)).expanduser()
    return given if given.is_absolute() or given.exists() else REPOSITORY / given
