"""Errors of the operating system that the user can fix: memory, open files, disk space, permissions."""

import errno
import os

from inheritune.errors import OUT_OF_FILES, OUT_OF_MEMORY, UserError
from inheritune.files.storage import (
    DISK_FULL,
    explain_disk_error,
    explain_root_error,
    find_fullest_folder,
    find_root,
    get_error_path,
)
from inheritune.runtime.ranks import NodeError

UNUSABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ESTALE)


def explain_limit(error: Exception) -> NodeError | None:
    """Return what to tell the user if `error` means that memory, open files or the disk are used up, or that
    a file cannot be used; else None."""
    if isinstance(error, OSError) and error.filename:
        found = _explain_file_error(error)
        if found is not None:
            return found
    words = "" if isinstance(error, UserError) else str(error).partition("\n")[0]
    if "No usable temporary directory" in words:  # raised by tempfile, at the import of any library
        return NodeError(
            "no folder for temporary files can be written (/tmp, /var/tmp); set TMPDIR to one that can"
        )
    if any(sign in words for sign in OUT_OF_FILES):
        return NodeError(f"{words}; allow more, as in: ulimit -n 4096")
    # the Rust code of tokenizers raises plain Exceptions with these words
    if full := [code for code in DISK_FULL if os.strerror(code) in words]:
        return NodeError(
            str(explain_disk_error(OSError(full[0], words), get_error_path(error, find_fullest_folder())))
        )
    if isinstance(error, MemoryError) or any(sign in words for sign in OUT_OF_MEMORY):
        what = f"out of memory ({words or type(error).__name__})"
        return NodeError(
            f"{what}; ask for more (--mem, ulimit -v) or use less (ds_configs/README.md; prepare --workers 1)"
        )
    return None


def _explain_file_error(error: OSError) -> NodeError | None:
    """Return what to tell the user if the file that `error` names cannot be used; else None."""
    if error.errno == errno.EROFS:
        return NodeError(str(explain_disk_error(error, get_error_path(error, find_root()))))
    if error.errno == errno.ENAMETOOLONG:
        return NodeError(
            f"no file can have the name {str(error.filename)[:60]}...: it is too long; correct it"
        )
    problem = explain_root_error(error)
    if problem:
        return NodeError(str(problem))
    if error.errno in UNUSABLE:  # wherever it occurs, it is a user error
        return NodeError(
            f"{error.filename} cannot be used ({error.strerror}): see its owner and mode, or restore it"
        )
    return None
