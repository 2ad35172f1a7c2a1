"""Signals that ask a process to save and stop, and Ctrl-C for a process that has nothing to save.

    SIGUSR1            the time limit is near (slurm/job.sh)         SIGHUP   the terminal was closed
    SIGTERM            preemption, scancel, kill                     SIGINT   Ctrl-C

`listen_for_signals` collects them in `received`, where the work looks between two steps. A second Ctrl-C ends
the process at once. A terminal sends Ctrl-C to everything that it runs, to `launch` as well as to its ranks.
So if another program started this process and decides what follows it (`is_supervised`), that program handles
the second one.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from inheritune.runtime.launcher import find_launch

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C ended, as a shell shows it. A saved stop has it too: a script must not
continue with its next line as if the work were done."""

SAVE = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
ONE_PRESS_S = 0.3
"""Signals closer than this are one Ctrl-C: `timeout` and other programs pass on what the terminal has already
sent to all processes."""

SAVING = "Ctrl-C: saving, then stopping; a second Ctrl-C stops at once and loses what is not saved"
STOPPING = "Ctrl-C: stopping"

CHILD = "INHERITUNE_CHILD"
"""Set for the processes that `launch` starts."""

received: list[str] = []
"""Names of the signals that this process has received since `listen_for_signals`."""

exit_callbacks: list[Callable[[], None]] = []
"""Called when a second Ctrl-C ends this process, which must not leave its children behind."""

_watch: threading.Thread | None = None
_print_lock = threading.Lock()
_printed: list[str] = []


def listen_for_signals() -> None:
    """Let the signals of SAVE ask this process to save and stop, from now on. Call it first of all: without a
    handler a signal to the job step ends the process, whatever it is doing."""
    _watch_interrupts(SAVING)
    for number in SAVE:
        # what was ignored at the start stays so: nohup's SIGHUP, the SIGINT of a shell's background job
        if number in (signal.SIGUSR1, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _record_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVE)


def _record_signal(number: int, _: FrameType | None) -> None:
    """Handle a signal of SAVE."""
    received.append(signal.Signals(number).name)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, so that temporary files are removed on the way out; a second one
    ends the process at once."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        _watch_interrupts(STOPPING)
        signal.signal(signal.SIGINT, _raise_once)


def _raise_once(number: int, _: FrameType | None) -> None:
    """Raise KeyboardInterrupt for the first SIGINT only. A second must not interrupt the removal of files: it
    ends the process (`_watch_interrupts`)."""
    if "SIGINT" not in received:
        received.append("SIGINT")
        _print_once(STOPPING)
        raise KeyboardInterrupt


def get_stop_signal() -> str | None:
    """Return the first signal that this process has received since `listen_for_signals`, or None.
    `dist.agree_on_stop` makes it one answer for all ranks."""
    return received[0] if received else None


def is_interrupted() -> bool:
    """Return whether this process received a Ctrl-C that no program which started it handles."""
    return "SIGINT" in received and not is_supervised()


def is_supervised() -> bool:
    """Return whether another program decides what follows this process: `launch`, a launcher of several
    ranks, a job's script."""
    return (
        bool(os.environ.get(CHILD) or os.environ.get("INHERITUNE_JOB")) or find_launch(os.environ).world > 1
    )


@contextmanager
def hold_signals() -> Iterator[None]:
    """Hold signals back while a process is started: it inherits the mask, and receives them once it
    listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SAVE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Leave the signals to the parent, which saves and ends this process."""
    for number in SAVE:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVE)


def exit_interrupted() -> None:
    """End this process as SIGINT ends one without a handler: a shell then also ends the loop or script around
    it."""
    # signal.signal works in the main thread only, which may be inside a library call for minutes
    ctypes.CDLL(None).signal(int(signal.SIGINT), None)  # SIG_DFL
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(INTERRUPTED)


def _watch_interrupts(sentence: str) -> None:
    """Handle Ctrl-C in a thread: Python runs a handler only after the library call that the main thread is
    in. The first Ctrl-C prints `sentence`, a second ends the process."""
    global _watch
    if _watch is not None or is_supervised():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _watch = threading.Thread(target=_handle_interrupts, args=(reader, sentence), daemon=True)
    _watch.start()


def _handle_interrupts(reader: int, sentence: str) -> None:
    """Read the numbers of received signals from the pipe `reader`, and handle those that are SIGINT. Never
    returns."""
    pressed_s: float | None = None
    while True:
        for number in os.read(reader, 64):
            now_s = time.monotonic()
            if number != signal.SIGINT or (pressed_s is not None and now_s - pressed_s < ONE_PRESS_S):
                continue
            if pressed_s is not None:
                for callback in exit_callbacks:
                    callback()
                exit_interrupted()
            pressed_s = now_s
            _print_once(sentence)


def _print_once(sentence: str) -> None:
    """Print `sentence` unless it was printed before. Not with print, whose lock the main thread may hold."""
    with _print_lock:
        if sentence in _printed:
            return
        _printed.append(sentence)
        try:
            os.write(2, f"inheritune: {sentence}\n".encode())
        except OSError:  # the terminal was closed
            return
