"""Outputs that the user names (--out, --to): their paths, resolved and checked before any work starts."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from inheritune.errors import UserError
from inheritune.files.storage import explain_disk_error


def resolve_output(path: str | Path) -> Path:
    """Return `path` with links followed: the target of a link is written, the link stays as it is.

    Raises UserError for a broken link, which may point to a disk that is not mounted."""
    given = Path(path).expanduser()
    for part in (given, *given.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(
                f"{part} is a link to {os.readlink(part)}, which does not exist; make that, or give "
                f"another path"
            )
    return given.resolve()


def check_new_folder(folder: Path) -> None:
    """Raises UserError if `folder`, resolved, cannot be made or replaced.

    That is so if it is a file, is not empty, is the current folder or is a mount point."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"{folder} already holds something; choose another folder, or delete it")
        if folder == Path.cwd():  # it would be replaced, and the shell's folder would no longer exist
            raise UserError(f"{folder} is the folder you are in; give the name of a new one")
        if os.path.ismount(folder):
            raise UserError(f"{folder} is where a disk is mounted; give the name of a new folder in it")
    elif folder.exists():
        raise UserError(f"{folder} is a file; give the name of a new folder")
    check_writable(folder.parent)


def check_new_file(file: Path) -> None:
    """Raises UserError if `file`, resolved, is a folder or its folder cannot be written to."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; give the file to write, such as {file / 'results.json'}")
    check_writable(file.parent)


def resolve_replaceable(path: str, what: str, is_own: Callable[[Path], bool]) -> Path:
    """Return `path` resolved. It must be new, or hold a `what`, which `is_own` recognizes.

    Raises UserError if it holds something else, or cannot be written."""
    file = resolve_output(path)
    check_new_file(file)
    if file.exists() and not is_own(file):
        raise UserError(
            f"{file} exists and is no {what}; it is left as it is: give another --out, or delete it"
        )
    return file


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written into `folder`, resolved, which need not exist yet."""
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    if not exists.is_dir():
        raise UserError(f"{exists} is a file, so nothing can be written below it; give another path")
    if not os.access(exists, os.W_OK | os.X_OK):
        raise UserError(f"{exists} cannot be written to; give a path below a folder that you own")
    try:  # /proc and the like let root in, and take no file
        with tempfile.TemporaryFile(dir=exists):
            pass
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
            raise UserError(f"{exists} takes no files ({error.strerror}); give another path") from None
        raise explain_disk_error(error, exists) from None
