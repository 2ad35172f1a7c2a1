"""Writing files and folders so that a reader sees nothing or everything: a temporary name, then a rename."""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import xxhash

from inheritune.errors import UserError
from inheritune.files.processes import find_process_state, get_node_name, identify_machine
from inheritune.files.storage import explain_disk_error, list_names

logger = logging.getLogger("inheritune")


@contextmanager
def replace_atomically(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file or fill a folder at; it replaces `path` when the block ends.

    The rename is atomic and comes after every byte is on disk, so a reader sees nothing or everything. The
    temporary path is removed if the block fails, and so are those of earlier processes that have died. Raises
    UserError if the disk is full or the place cannot be written.

    `new`, for a folder that the user named: whatever is at `path` by then is left as it is, unless it is an
    empty folder. Raises UserError, and nothing is written."""
    temporary = get_temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield temporary
        for made in (*temporary.rglob("*"), temporary):
            sync_path(made)
        (_rename_to_new if new else _replace)(temporary, path)
        sync_path(path.parent)
    except BaseException as error:
        with suppress(OSError):  # what stopped the writing may stop this too
            remove_path(temporary)
        if isinstance(error, OSError) and _concerns(error, path, temporary):
            raise explain_disk_error(error, path) from error
        raise


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. Raises UserError if it is a file and `path` a folder."""
    if path.is_dir() and not path.is_symlink():
        if not temporary.is_dir():
            raise UserError(
                f"{path} is a folder, so no file of that name can be written; rename or remove it"
            )
        shutil.rmtree(path)  # a folder cannot be renamed over a non-empty one
    os.replace(temporary, path)


def _rename_to_new(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`, which the system refuses where anything but an empty folder is there."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"{path} was made by another process meanwhile, and is left as it is; nothing was written: give "
            f"another folder, or remove that one and repeat the command"
        ) from None


def _concerns(error: OSError, path: Path, temporary: Path) -> bool:
    """Return whether `error` came from writing `path`, not from another file that was read meanwhile."""
    if not isinstance(error.filename, str):
        return True
    name = Path(error.filename)
    return name.is_relative_to(temporary) or name.is_relative_to(path) or path.is_relative_to(name)


LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.tmp(?P<node>[\w.-]+?)(-(?P<place>[0-9a-f]{8}))?-(?P<pid>[0-9]+)", re.DOTALL | re.ASCII
)
ABANDONED_S = 24 * 3600
"""Age at which a temporary file counts as abandoned, whatever its process."""


def get_temporary_path(path: Path) -> Path:
    """Return where this process writes what will become `path`.

    The name identifies the process: node, machine (a hash) and process number."""
    return path.with_name(
        f".{path.name}.tmp{get_node_name()}-{_hash_machine(identify_machine())}-{os.getpid()}"
    )


@cache
def _hash_machine(place: str | None) -> str:
    return xxhash.xxh3_64_hexdigest(str(place).encode())[:8]


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose processes have died or have not written for a day."""
    with suppress(OSError):  # a folder that cannot be listed, another user's file: these do no harm
        for name in os.listdir(path.parent):
            match, left = LEFTOVER.fullmatch(name), path.parent / name
            if match and match["name"] == path.name and _is_abandoned(left, match):
                remove_path(left)


def _is_abandoned(left: Path, match: re.Match) -> bool:
    if left == get_temporary_path(left.with_name(match["name"])):
        return True  # an earlier attempt of this process, which failed
    here = identify_machine()
    place = here if match["place"] == _hash_machine(here) else None
    if find_process_state(place, int(match["pid"])) == "dead":
        return True
    return time.time() - max(made.lstat().st_mtime for made in (left, *left.rglob("*"))) > ABANDONED_S


def write_text(path: Path, text: str) -> None:
    """Write a text file, as `replace_atomically` does."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_path(path: Path) -> None:
    """Delete a file, a link or a folder with its content. A missing path is not an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that processes of this package left in `folder`.

    Call it while holding the folder's lock, so that no process still writes there. Other names that begin
    with a dot are left alone."""
    for name in list_names(folder):
        if LEFTOVER.fullmatch(name):
            remove_if_possible(folder / name)


def remove_if_possible(path: Path) -> None:
    """Delete what is no longer needed, or log a warning: no run fails because of it.

    Another user's file, or a reader on a network disk, may prevent the deletion."""
    try:
        remove_path(path)
    except OSError as error:
        _warn_kept(path, error.strerror)


@cache
def _warn_kept(path: Path, why: str) -> None:
    logger.warning("%s is not needed any more and cannot be deleted (%s): delete it by hand", path, why)


def break_links(path: Path) -> None:
    """Give a file its own content if it shares the content with other names; call before appending to it.

    A run copied by `cp -l` or `cp -s` shares its files."""
    if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
        with replace_atomically(path) as temporary:
            shutil.copyfile(path, temporary)


CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS)
"""Errors of fsync on some network and FUSE file systems, mostly for folders. A full or failing disk has other
errors."""


def sync_path(path: Path) -> None:
    """Write a file, or a folder's entries, to disk, so that a power cut does not lose them.

    Does nothing where the file system cannot do that."""
    if path.is_symlink():  # an entry of its folder, which is synced too
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:  # it may be written but not read
        _log_unsynced(error.strerror)
        return
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Call os.fsync, where the file system can do it. Raises OSError if the disk is full or fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        _log_unsynced(error.strerror)


@cache
def _log_unsynced(why: str) -> None:
    logger.debug("a file or folder cannot be synced (%s): a power cut may lose what was written last", why)
