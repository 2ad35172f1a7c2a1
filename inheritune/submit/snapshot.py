"""Snapshots of the checkout: a job runs the code and reads the settings of the moment of its submission.

    runs/code/<hash of its content>/{inheritune, recipes, ds_configs, slurm, requirements.txt, pyproject.toml}
    runs/code/<hash of its content>/own/   the user's files that the job names, each under its whole path

Jobs of the same code share one. COMMIT in it names the commit it was made from. snapshot_uses.py removes old
ones."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import xxhash

from inheritune.config import names
from inheritune.config.experiment import Experiment, is_path
from inheritune.config.jobs import TRAINING
from inheritune.config.paths import COMMIT, OWN, REPOSITORY, resolve_path
from inheritune.files.storage import explain_disk_error, find_root
from inheritune.submit.request import Request
from inheritune.submit.snapshot_uses import announce_use, drop_use
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


def list_own_files(request: Request, loaded: Experiment | None) -> list[Path]:
    """Return the user's files that shape a job and are not part of the code: its experiment and DeepSpeed
    JSONs, as absolute paths."""
    name = request.values["experiment"]
    named = [Path(name)] if is_path(name) else []
    if request.job.verb in TRAINING and loaded:
        trains = [loaded.train, *map(loaded.train_of, loaded.runs.values())]
        given = request.values.get("ds")
        named += [resolve_path(file) for file in ([given] if given else {t.deepspeed for t in trains})]
    code = {REPOSITORY / path for path in list_code()}
    absolute = {Path(os.path.abspath(path)) for path in named}
    return sorted(path for path in absolute - code if path.is_file())


def make_snapshot(own: Iterable[Path] = ()) -> Path:
    """Return the folder with a copy of the code, and of the files `own`, as they are now; made unless an
    equal one exists. It has the mark of this process, until a job's or `drop_use` takes its place.

    Raises UserError, and leaves nothing, where the disk is full."""
    files, hasher = {path: REPOSITORY / path for path in list_code()}, xxhash.xxh3_128()
    files |= {OWN / path.relative_to("/"): path for path in own}
    for file, source in files.items():
        hasher.update(f"{file}\0".encode())
        hasher.update(source.read_bytes())
    commit = git_commit() or "unknown"
    hasher.update(commit.encode())
    target = find_root() / "runs" / names.CODE / hasher.hexdigest()[:16]
    copy = target.with_name(f"{target.name}{names.TEMPORARY}-{os.getpid()}")
    try:
        announce_use(target)  # first: nobody removes what is found here
        if (target / COMMIT).is_file():
            return target
        for file, source in files.items():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy / file)
        (copy / COMMIT).write_text(f"{commit}\n", encoding="utf-8")
    except BaseException as error:
        shutil.rmtree(copy, ignore_errors=True)
        drop_use(target)
        if isinstance(error, OSError):
            raise explain_disk_error(error, target) from error
        raise
    try:
        copy.rename(target)
    except OSError:  # another submission was faster
        shutil.rmtree(copy)
    return target
