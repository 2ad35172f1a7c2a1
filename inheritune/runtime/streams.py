"""Standard input, output and error as a program needs them that runs for days: a terminal that goes away, a
closed pipe, a full disk or a letter that cannot be shown never stops the work.
"""

import errno
import io
import os
import select
import sys

lost: dict[str, OSError] = {}
"""{"stdout" or "stderr": why it could not be written}; what follows is thrown away."""


class Output(io.FileIO):
    """A standard stream that never fails: what cannot be written is thrown away, by other writers of this
    process too."""

    def __init__(self, number: int, name: str):
        super().__init__(number, "w", closefd=False)
        self.stream = name

    def write(self, data) -> int:
        try:
            while (
                written := super().write(data)
            ) is None:  # some terminals are shared in the mode that does not wait
                select.select([], [self], [], 1)
            return written
        except OSError as error:
            lost.setdefault(self.stream, error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # libraries written in C and child processes write there too
            os.close(nowhere)
            return len(data)


def guard() -> None:
    """Replace sys.stdout and sys.stderr by streams that never fail. Call first of all."""
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


def unwritten() -> OSError | None:
    """Return why standard output could not be written, or None. That a reader has enough (`| head -1`) is no
    error."""
    sys.stdout.flush()
    error = lost.get("stdout")
    return None if error is None or error.errno == errno.EPIPE else error


def _open_closed(number: int) -> None:
    """Give a stream that was closed at the start (`>&-`) its number back: the next file opened would get it,
    and with it what libraries print."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)
