"""The lock that keeps two jobs out of one folder, on any file system that the nodes share."""

import contextlib
import json
import math
import os
import random
import re
import stat
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from inheritune.config import environment
from inheritune.errors import Stopped, UserError
from inheritune.files.processes import birth, fate, machine, node
from inheritune.files.rundir import disk_error

NAME = re.compile(r"\.(.+)\.lock\.[0-9a-f]{12}", re.DOTALL)
MOST_BYTES = 1 << 16  # of a lock file that is read: ours have some hundred


class Lock:
    """Keeps two jobs out of what is written at `path`; use as a context manager.

    Every contender puts a file of its own, `.NAME.lock.<12 hex digits>`, beside `path` and looks for those of
    others: the later of two sees the earlier and withdraws. A holder touches its file every `BEAT` seconds
    from a thread, so that a crash frees the lock: at once where its process is certainly gone
    (processes.fate), after two silent beats where Slurm says that its job has ended, after `SILENCE` seconds
    otherwise. (flock would not do: Lustre is often mounted without it.)"""

    BEAT, SILENCE = 10.0, 180.0

    def __init__(
        self, path: Path, asked_to_stop: Callable[[], str | None] = lambda: None, wait: float | None = None
    ):
        """`asked_to_stop` says why this process is asked to leave, or None. `wait`: seconds until UserError
        while another holds the lock (None: $INHERITUNE_LOCK_WAIT, or 120)."""
        self.path, self.asked_to_stop = path, asked_to_stop
        self.wait = environment.number("INHERITUNE_LOCK_WAIT") if wait is None else wait
        self.file = path.with_name(f".{path.name}.lock.{uuid.uuid4().hex[:12]}")
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, waiting for another holder. Raises UserError naming it when the wait is over, and if
        the folder cannot be read or written; Stopped when this process is asked to leave while it waits."""
        deadline, told = time.monotonic() + self.wait, False
        while (who := self._try()) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path} is being written by {who}, still after {self.wait:.0f} s of waiting; let "
                    f"it finish, or stop "
                    f"it first; nothing was changed"
                )
            if why := self.asked_to_stop():
                raise Stopped(
                    f"stopped while waiting for {self.path}, which is being written by {who} ({why}); "
                    f"nothing was changed, and "
                    f"the same command tries again"
                )
            if not told:
                limit = f" up to {self.wait:.0f} s" if math.isfinite(self.wait) else ""
                print(f"{self.path} is being written by {who}: waiting{limit}", flush=True)
                told = True
            time.sleep(random.uniform(0.5, 1.5))  # two that meet do not go on meeting
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        self._released.set()
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def lost(self) -> bool:
        """Whether another job took this one for dead (after minutes without a beat) and may be writing
        here."""
        return not self.file.is_file()

    def _try(self) -> str | None:
        """Announce ourselves; None if nobody else is here, else who (and our file is withdrawn)."""
        held = False
        try:
            now = self._announce()
            others = [
                file
                for name, file in _lock_files(self.path.parent)
                if name == self.path.name and file != self.file
            ]
            who = next(filter(None, (self._look(file, now) for file in others)), None)
            held = who is None
        except OSError as error:
            raise disk_error(error, self.file) from error
        finally:
            if not held:  # an empty one, on a full disk, would look like another's for minutes
                with contextlib.suppress(OSError):
                    self.file.unlink(missing_ok=True)
        return who

    def _announce(self) -> float:
        """Write our file.  -> its time: the file server's clock, which the beats of others are measured by"""
        me = {"machine": machine(), "pid": os.getpid(), "born": birth(os.getpid()), "host": node()}
        if os.environ.get("SLURM_JOB_ID"):
            me["slurm"] = [os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT") or "0"]
            me["job"] = f"job {os.environ['SLURM_JOB_ID']}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        me["inode"] = self.file.stat().st_ino
        self.file.write_text(json.dumps(me), encoding="utf-8")
        return self.file.stat().st_mtime

    def _look(self, file: Path, now: float) -> str | None:
        """Who holds the lock by `file`; None if nobody does, and then the file is taken away."""
        try:
            silent = abs(now - file.stat().st_mtime)  # a time in the future is no beat either
            holder = _read_holder(file)
        except FileNotFoundError:
            return None
        if not self._is_over(holder, silent):
            return describe_holder(holder, file)
        if not file.is_dir():  # which is not of our making
            _take_away(file)
        return None

    def _is_over(self, holder: dict, silent: float) -> bool:
        state = _fate(holder)
        if state != "unknown":
            return state == "dead"
        if holder.get("slurm") and silent > 2 * self.BEAT and _job_ended(*holder["slurm"]):
            return True
        return silent > self.SILENCE

    def _beat(self) -> None:
        while not self._released.wait(self.BEAT):
            try:
                os.utime(self.file)
            except OSError:  # taken away, or the file server is: `lost` tells
                continue


def lock_holders(folder: Path) -> dict[str, dict]:
    """{name: {host, pid, slurm, job, copied, silent: seconds since its last beat}} of the locks that are held
    in `folder`. A holder that its file does not name has only `silent`.

    Only looks: Slurm is not asked, so a job that died on another machine passes for alive for `Lock.SILENCE`
    seconds."""
    found = {}
    for name, file in _lock_files(folder):
        try:
            silent = time.time() - file.stat().st_mtime
            holder = _read_holder(file)
        except FileNotFoundError:  # it was just released
            continue
        state = _fate(holder)
        if state == "alive" or state == "unknown" and silent <= Lock.SILENCE:
            found.setdefault(name, {**holder, "silent": silent})
    return found


def lock_holder(path: Path) -> dict | None:
    """Who holds the lock of `path`, or None; see `lock_holders`."""
    return lock_holders(path.parent).get(path.name)


def _lock_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name of what is locked, lock file) of all that lie in `folder`."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if match := NAME.fullmatch(name):
            yield match[1], folder / name


def _read_holder(file: Path) -> dict:
    """What a lock file says of its holder: {machine, pid, born, host, job, slurm, copied}, each only if it
    has the right form. {} if the file is damaged, cannot be read, or is no file: nobody knows who holds it.
    Raises FileNotFoundError."""
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            return {}
        with open(file, "rb") as opened:
            said = json.loads(opened.read(MOST_BYTES))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    texts = {key: said[key] for key in ("machine", "born", "host", "job") if _is_text(said.get(key))}
    holder = texts | ({"pid": said["pid"]} if type(said.get("pid")) is int else {})
    slurm = said.get("slurm")
    if (
        isinstance(slurm, list)
        and len(slurm) == 2
        and all(_is_text(word) and re.fullmatch("[0-9]+", word) for word in slurm)
    ):
        holder["slurm"] = slurm
    if said.get("inode", facts.st_ino) != facts.st_ino:
        holder.pop("machine", None)  # a copy: that process, if it lives, holds the lock of another folder
        holder["copied"] = True
    return holder


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _fate(holder: dict) -> str:
    return fate(holder.get("machine"), holder.get("pid"), holder.get("born"))


def _take_away(file: Path) -> None:
    """Remove the lock of a process that is gone. Raises UserError if that is not allowed: its owner could
    still come back."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{file} is a lock left behind that cannot be removed ({error.strerror}); have its owner delete "
            f"it"
        ) from None


def describe_holder(holder: dict, file: Path | None = None) -> str:
    """Who holds a lock, in words, as far as its file tells; `file`: to be named where it does not, or is a
    copy."""
    if "pid" not in holder or "host" not in holder:
        return f"a process that its lock{f' file {file}' if file else ''} does not name"
    who = f"{holder.get('job') or 'process ' + str(holder['pid'])} on {holder['host']}"
    if file and holder.get("copied"):
        who += f" (so says {file}; delete that file if it came with a copy of the folder)"
    return who


def _job_ended(job: str, restarts: str) -> bool:
    """Whether Slurm says that this start of `job` is over; False where it cannot be asked."""
    if job == os.environ.get("SLURM_JOB_ID"):
        return restarts != (os.environ.get("SLURM_RESTART_COUNT") or "0")  # an earlier start of our own job
    try:
        said = subprocess.run(
            ["scontrol", "show", "job", "-o", job],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    shown = next(
        (line for line in said.stdout.splitlines() if line.startswith(f"JobId={job} ")), ""
    )  # not an array's others
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    if said.returncode or "JobState" not in fields:
        return "Invalid job id" in said.stderr  # forgotten since it ended
    alive = fields["JobState"] in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
    return not alive or fields.get("Restarts", "0") != restarts
