"""Standard input, output and error for a program that runs for days: a closed terminal, a closed pipe, a full
disk or a character that cannot be shown never stops the work.
"""

import errno
import io
import os
import select
import sys
from typing import Any

write_errors: dict[str, OSError] = {}
"""{"stdout" or "stderr": why it could not be written}; what follows is discarded."""


class Output(io.FileIO):
    """A standard stream that never fails: what cannot be written is discarded, also for other writers of this
    process."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.stream = name

    def write(self, data: Any) -> int:
        """Return how many bytes of `data` were written or discarded."""
        try:
            # None from a terminal that another program has put into non-blocking mode
            while (written := super().write(data)) is None:
                select.select([], [self], [], 1)
            return written
        except OSError as error:
            write_errors.setdefault(self.stream, error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # libraries written in C and child processes write there too
            os.close(nowhere)
            return len(data)


def guard_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams that never fail. Call it first of all."""
    for number in (0, 1, 2):
        _open_closed(number)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, "r", closefd=False))
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        encoding = old.encoding if old is not None else "utf-8"
        if old is not None:
            old.flush()
        text = io.TextIOWrapper(
            io.BufferedWriter(Output(number, name)),
            encoding=encoding,
            errors="replace" if number == 1 else "backslashreplace",
            line_buffering=number == 2 or old is not None and (old.line_buffering or old.write_through),
        )
        setattr(sys, name, text)


def find_write_error() -> OSError | None:
    """Return why standard output could not be written, or None. A reader that has read enough (`| head -1`)
    is no error."""
    sys.stdout.flush()
    error = write_errors.get("stdout")
    return None if error is None or error.errno == errno.EPIPE else error


def _open_closed(number: int) -> None:
    """Reopen a stream that was closed at the start (`>&-`), on its number: the next file opened would get
    that number, and with it what libraries print."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)
