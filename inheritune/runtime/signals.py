"""Signals: those that ask a process to save and leave, and Ctrl-C for one that has nothing to save.

    SIGUSR1            the time limit is near (slurm/job.sh)         SIGHUP   the terminal went away
    SIGTERM            preemption, scancel, kill                     SIGINT   Ctrl-C

`listen` collects them in `asked`, and the work looks there between two steps. A second Ctrl-C leaves at once.
A terminal sends Ctrl-C to everything that it runs, `launch` and its ranks alike; so where something else
started this process and decides what comes after it (`is_supervised`), that one answers the second.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from inheritune.runtime.launcher import find_launch

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C ended, as a shell shows it. Also after a saved stop: a script must not
continue with its next line as if the work were done."""

SAVE = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
ONE_PRESS_S = 0.3
"""Signals closer than this are one Ctrl-C: `timeout` and others pass on what the terminal has sent to all
already."""

SAVING = "Ctrl-C: saving, then stopping; a second Ctrl-C stops at once and loses what is not saved"
STOPPING = "Ctrl-C: stopping"

CHILD = "INHERITUNE_CHILD"
"""Set for the processes that `launch` starts."""

asked: list[str] = []
"""Names of the signals that this process got since `listen`."""

before_leaving: list[Callable[[], None]] = []
"""Called when a second Ctrl-C ends this process: it must not leave others behind."""

_watch: threading.Thread | None = None
_saying, _said = threading.Lock(), []


def listen() -> None:
    """Let the signals of SAVE ask this process to save and leave, from now on. Call first of all: without a
    handler a signal to the job step ends the process, whatever it is doing."""
    _watch_interrupts(SAVING)
    for number in SAVE:
        # what was ignored at the start stays so: nohup's SIGHUP, the SIGINT of a shell's background job
        if number in (signal.SIGUSR1, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVE)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, so that temporary files are removed on the way out; a second one
    leaves at once."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        _watch_interrupts(STOPPING)
        signal.signal(signal.SIGINT, _raise_once)


def _raise_once(number: int, _) -> None:
    """A second one must not interrupt the removal of files: it ends the process (`_watch_interrupts`)."""
    if "SIGINT" not in asked:
        asked.append("SIGINT")
        _say(STOPPING)
        raise KeyboardInterrupt


def asked_to_stop() -> str | None:
    """Return the first signal that this process got since `listen`, or None; `dist.agree` makes it one answer
    for all ranks."""
    return asked[0] if asked else None


def is_interrupted() -> bool:
    """Return whether this process got a Ctrl-C and nothing that started it answers for it."""
    return "SIGINT" in asked and not is_supervised()


def is_supervised() -> bool:
    """Return whether another process decides what comes after this one: `launch`, a launcher of several
    ranks, a job's script."""
    return (
        bool(os.environ.get(CHILD) or os.environ.get("INHERITUNE_JOB")) or find_launch(os.environ).world > 1
    )


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back while a process is started: it inherits that, and gets them when it listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SAVE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Leave the signals to the parent, who saves and ends this process."""
    for number in SAVE:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVE)


def leave_interrupted() -> None:
    """End this process as SIGINT ends one that does not listen to it: a shell then also ends the loop or
    script around it."""
    # signal.signal is for the main thread only, which may be inside a library for minutes
    ctypes.CDLL(None).signal(int(signal.SIGINT), None)  # SIG_DFL
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(INTERRUPTED)


def _watch_interrupts(sentence: str) -> None:
    """Answer Ctrl-C from a thread: Python runs a handler only after the library call that the main thread is
    in. The first is answered with `sentence`, a second ends the process."""
    global _watch
    if _watch is not None or is_supervised():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        pressed_s = None
        while True:
            for number in os.read(reader, 64):
                now_s = time.monotonic()
                if number != signal.SIGINT or (pressed_s is not None and now_s - pressed_s < ONE_PRESS_S):
                    continue
                if pressed_s is not None:
                    for end in before_leaving:
                        end()
                    leave_interrupted()
                pressed_s = now_s
                _say(sentence)

    _watch = threading.Thread(target=watch, daemon=True)
    _watch.start()


def _say(sentence: str) -> None:
    """Print `sentence` once. Not by print: the main thread may be in the midst of one, and holds its lock."""
    with _saying:
        if sentence in _said:
            return
        _said.append(sentence)
        try:
            os.write(2, f"inheritune: {sentence}\n".encode())
        except OSError:  # the terminal is gone
            return
