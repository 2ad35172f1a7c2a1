"""Errors that end a command without a traceback, and words for their messages."""

import difflib
import errno
import os
from collections.abc import Iterable

OUT_OF_MEMORY = ("allocate memory", "out of memory", "start new thread", "failed to map segment")
OUT_OF_FILES = (os.strerror(errno.EMFILE), os.strerror(errno.ENFILE))


class UserError(Exception):
    """A user error: printed as one sentence without a traceback; exit code 2."""


class NoAccess(UserError):
    """A file that this user may not read. It says nothing about the content, which may be sound."""

    def __init__(self, path: object, why: str | None):
        super().__init__(f"{path} cannot be read ({why}): see its owner and mode")


class Stopped(Exception):
    """A signal or a STOP file stopped the command early, with its work saved; exit code 0.

    `again`: there is more to do, and the job's script may run the same command again. False after a STOP
    file, which a user made."""

    def __init__(self, message: str, again: bool = True):
        super().__init__(message)
        self.again = again


def suggest_name(name: object, valid: Iterable[object]) -> str:
    """Return the end of a sentence that refuses `name`: the closest valid name, or all of them."""
    known = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid names: " + ", ".join(sorted(known)) if known else "nothing is valid here"


def is_machine_limit(error: BaseException) -> bool:
    """Return whether `error` means that memory or open files are used up. It then says nothing about the file
    that was being read, which must not be called damaged or left out."""
    if isinstance(error, UserError):
        return False
    # libraries repeat the system's words in errors of their own types
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_FILES + OUT_OF_MEMORY)


def summarize_error(error: Exception) -> str:
    """Return the first line of a library's error message; the rest is for the library's developers."""
    return str(error).strip().partition("\n")[0]
