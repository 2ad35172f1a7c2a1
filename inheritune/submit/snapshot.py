"""Snapshots of the checkout: a job runs the code that was there when it was submitted.

    runs/code/<hash of its content>/{inheritune, recipes, ds_configs, slurm, requirements.txt, pyproject.toml}

Jobs of the same code share one. COMMIT in it names the commit it was made from."""

import os
import shutil
from pathlib import Path

import xxhash

from inheritune.config import names
from inheritune.config.paths import COMMIT, REPOSITORY
from inheritune.files.storage import find_root
from inheritune.training.provenance import git_commit

FOLDERS = ("inheritune", "recipes", "ds_configs", "slurm")
FILES = ("pyproject.toml", "requirements.txt", "tests/requirements.txt")


def list_code() -> list[Path]:
    """Return the files that jobs run, relative to the repository, in order."""
    found = [Path(name) for name in FILES if (REPOSITORY / name).is_file()]
    for folder in FOLDERS:
        for place, inner, files in os.walk(REPOSITORY / folder):
            inner[:] = sorted(name for name in inner if name not in ("__pycache__", "results"))
            relative = Path(place).relative_to(REPOSITORY)
            found += [relative / name for name in sorted(files) if not name.endswith((".pyc", ".png"))]
    return found


def make_snapshot() -> Path:
    """Return the folder with a copy of the code as it is now; made unless an equal one exists."""
    files, hasher = list_code(), xxhash.xxh3_128()
    for file in files:
        hasher.update(f"{file}\0".encode())
        hasher.update((REPOSITORY / file).read_bytes())
    commit = git_commit() or "unknown"
    hasher.update(commit.encode())
    target = find_root() / "runs" / names.CODE / hasher.hexdigest()[:16]
    if (target / COMMIT).is_file():
        return target
    copy = target.with_name(f"{target.name}{names.TEMPORARY}-{os.getpid()}")
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / file, copy / file)
    (copy / COMMIT).write_text(f"{commit}\n", encoding="utf-8")
    try:
        copy.rename(target)
    except OSError:  # another submission was faster
        shutil.rmtree(copy)
    return target
