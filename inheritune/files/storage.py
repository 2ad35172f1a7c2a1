"""Storage: the folders that are written to, their free space, and errors of a full or read-only disk."""

import errno
import os
import shutil
from pathlib import Path

from inheritune.config.paths import REPOSITORY
from inheritune.config.units import format_bytes
from inheritune.errors import UserError


def find_root() -> Path:
    """Return the folder of runs/ and data/: $INHERITUNE_ROOT (a scratch file system), or the repository."""
    return Path(os.environ.get("INHERITUNE_ROOT") or REPOSITORY).expanduser().resolve()


def list_names(folder: Path) -> list[str]:
    """Return the names of a folder's entries; none if there is no such folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of what cannot be written for want of room: on the disk, in a quota, or below `ulimit -f`."""


def explain_disk_error(error: OSError, path: Path) -> Exception:
    """Return `error` as a UserError if it is about a full or read-only disk, a limit of file sizes, or
    $INHERITUNE_ROOT.

    Any other error is returned as it is."""
    if problem := explain_root_error(error):
        return problem
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left while writing {path} ({format_bytes(count_free_bytes(path), 'MB')} free); "
            f"{suggest_more_space(path)}"
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"{path} is larger than a file may be here ({os.strerror(errno.EFBIG)}); raise the limit of this "
            f"shell or job (ulimit -f), or {_suggest_folder(path, 'on a disk that takes larger files')}"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(
            f"cannot write {path}: {os.strerror(error.errno)}; {_suggest_folder(path, 'that you can write')}"
        )
    return error


def explain_root_error(error: OSError) -> UserError | None:
    """Return `error` as a UserError if it says that the missing folder $INHERITUNE_ROOT cannot be made.

    That happens below /proc, for example. Any other error gives None."""
    given = os.environ.get("INHERITUNE_ROOT")
    if not given or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
        return None
    root, failed = find_root(), get_error_path(error, Path())
    if root.is_dir():
        return None
    if root.is_relative_to(failed) or error.errno == errno.ENOTDIR and failed.is_relative_to(root):
        return UserError(
            f"INHERITUNE_ROOT={given} is not a folder and cannot be created ({error.strerror}); set it to "
            f"another one"
        )
    return None


def get_error_path(error: Exception, default: Path) -> Path:
    """Return the file that `error` is about, or `default` if it names none."""
    name = getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else default


def find_fullest_folder() -> Path:
    """Return the folder with the least free space of all that this package and its libraries write to.

    An error that names no file is most likely about this folder."""
    return min((folder.expanduser() for folder, *_ in _list_movable_folders()), key=count_free_bytes)


def count_free_bytes(path: Path) -> int:
    """Return the free space of the disk on which `path` is or will be stored."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.is_dir())).free


def check_free_space(path: Path, need: int, what: str, first: str = "", last: str = "") -> None:
    """Raise UserError if the disk of `path` has fewer than `need` bytes free, which `what` needs.

    `first` and `last` stand before and after the advice on how to get more space."""
    free = count_free_bytes(path)
    if free < need:
        raise UserError(
            f"{what} needs {format_bytes(need, 'MB')}, its disk has {format_bytes(free, 'MB')} free; "
            f"{first}{suggest_more_space(path)}{last}"
        )


def suggest_more_space(path: Path) -> str:
    """Return what to do when the disk of `path` is full, as the end of a sentence."""
    return f"free some, or {_suggest_folder(path, 'on a larger disk')}"


def _suggest_folder(path: Path, which: str) -> str:
    """Return how to store `path` in a folder `which` ("on a larger disk"), so that the same command works."""
    variable, place = find_moving_variable(path)
    if variable is None:
        return f"choose a folder {which}"
    if variable == "TMPDIR" or not list_names(place):
        return f"set {variable} to a folder {which}"
    return f"set {variable} to a copy of {place} {which}"


def find_moving_variable(path: Path) -> tuple[str | None, Path]:
    """Return (the environment variable that decides where `path` is stored, the folder that it names now).

    The variable is None for a place that the user chose, such as --out."""
    real = Path(os.path.realpath(path))
    around: list[tuple[str, str | None, Path]] = []
    for folder, name, place in _list_movable_folders():
        parent = os.path.realpath(folder.expanduser())
        if real.is_relative_to(parent) and (name != "TMPDIR" or _is_scratch(real, parent)):
            around.append((parent, name, place))
    _, variable, named = max(around, key=lambda one: len(one[0]), default=("", None, path))
    return variable, named


def _is_scratch(path: Path, temporary: str) -> bool:
    """Return whether a library made `path` in the temporary folder (tempfile's names), not the user."""
    return path == Path(temporary) or path.relative_to(temporary).parts[0].startswith("tmp")


def _list_movable_folders() -> list[tuple[Path, str, Path]]:
    """Return (folder, environment variable that moves it, folder that the variable names now) of each folder
    that an environment variable moves."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()
    datasets = os.environ.get("HF_DATASETS_CACHE") or home / "datasets"
    temporary = os.environ.get("TMPDIR") or "/tmp"
    named = {"HF_HOME": home, "HF_DATASETS_CACHE": Path(datasets), "TMPDIR": Path(temporary)}
    hubs = [name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name)]
    named |= {name: Path(os.environ[name]) for name in hubs[:1]}  # the first one counts
    root = find_root()
    own = [(root / name, "INHERITUNE_ROOT", root) for name in ("runs", "data")]
    return own + [(folder, variable, folder) for variable, folder in named.items()]
