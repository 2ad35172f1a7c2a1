"""Locks: only one job at a time writes into a folder, on any file system that the nodes share.

The lock is our own, because filelock 4.3.1 cannot free the folder of a dead job as soon. Its
SoftReadWriteLock does not look whether the holder's process is alive, and always waits for a whole
`stale_threshold`. Its SoftFileLease looks on its own host only: from another node it watches for a whole
lease, even if the last beat is an hour old, and it cannot ask Slurm whether the job has ended. Neither
records the job, which `status` names.
"""

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
from typing import Any

from inheritune.config import environment
from inheritune.errors import Stopped, UserError
from inheritune.files.processes import (
    ProcessState,
    find_process_state,
    get_node_name,
    identify_machine,
    read_start_time,
)
from inheritune.files.storage import explain_disk_error

LOCK_NAME = re.compile(r"\.(.+)\.lock\.[0-9a-f]{12}", re.DOTALL)
MAX_LOCK_BYTES = 1 << 16  # of a lock file that is read; real ones have a few hundred


class Lock:
    """A lock on what is written at `path`; use it as a context manager.

    Each contender creates its own file, `.NAME.lock.<12 hex digits>`, alongside `path` and looks for other
    such files: the later of two sees the earlier and withdraws. A holder touches its file every `BEAT`
    seconds from a thread, so that a crash frees the lock. It is free at once if the holder's process is known
    to be dead (processes.py), after two missed beats if Slurm reports that its job has ended, and after
    `SILENCE` seconds otherwise. flock is not an option: Lustre is often mounted without it."""

    BEAT, SILENCE = 10.0, 180.0

    def __init__(
        self, path: Path, asked_to_stop: Callable[[], str | None] = lambda: None, wait: float | None = None
    ):
        """`asked_to_stop` returns why this process should stop, or None.

        `wait`: seconds until UserError while another process holds the lock (None: $INHERITUNE_LOCK_WAIT, or
        120)."""
        self.path, self.asked_to_stop = path, asked_to_stop
        limit = environment.read_number("INHERITUNE_LOCK_WAIT") if wait is None else wait
        assert limit is not None, "INHERITUNE_LOCK_WAIT has a default"
        self.wait = limit
        self.file = path.with_name(f".{path.name}.lock.{uuid.uuid4().hex[:12]}")
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, waiting for another holder.

        Raises UserError naming the holder when the wait is over, and if the folder cannot be read or written.
        Raises Stopped if this process is asked to stop while it waits."""
        deadline, reported = time.monotonic() + self.wait, False
        while (who := self._try()) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path} is being written by {who}, still after {self.wait:.0f} s of waiting; let "
                    f"it finish, or stop it first; nothing was changed"
                )
            if why := self.asked_to_stop():
                raise Stopped(
                    f"stopped while waiting for {self.path}, which is being written by {who} ({why}); "
                    f"nothing was changed, and the same command tries again"
                )
            if not reported:
                limit = f" up to {self.wait:.0f} s" if math.isfinite(self.wait) else ""
                print(f"{self.path} is being written by {who}: waiting{limit}", flush=True)
                reported = True
            time.sleep(random.uniform(0.5, 1.5))  # random, so that two contenders do not keep colliding
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Free the lock."""
        self._released.set()
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def lost(self) -> bool:
        """Return whether another job removed this lock, after minutes without a beat, and may be writing."""
        return not self.file.is_file()

    def _try(self) -> str | None:
        """Create the lock file; return None if no other process holds the lock.

        Otherwise remove the file again, and return a description of the holder."""
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
            raise explain_disk_error(error, self.file) from error
        finally:
            if not held:  # an empty file, on a full disk, would block others for minutes
                with contextlib.suppress(OSError):
                    self.file.unlink(missing_ok=True)
        return who

    def _announce(self) -> float:
        """Write the lock file and return its time, on the clock of the file server.

        The beats of other holders are compared with that time."""
        me: dict[str, Any] = {
            "machine": identify_machine(),
            "pid": os.getpid(),
            "born": read_start_time(os.getpid()),
            "host": get_node_name(),
        }
        if os.environ.get("SLURM_JOB_ID"):
            me["slurm"] = [os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT") or "0"]
            me["job"] = f"job {os.environ['SLURM_JOB_ID']}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        me["inode"] = self.file.stat().st_ino
        self.file.write_text(json.dumps(me), encoding="utf-8")
        return self.file.stat().st_mtime

    def _look(self, file: Path, now: float) -> str | None:
        """Return who holds the lock by `file`; None if nobody does, and then remove the file."""
        try:
            silent = abs(now - file.stat().st_mtime)  # a time in the future is not a beat either
            holder = _read_holder(file)
        except FileNotFoundError:
            return None
        if not self._is_over(holder, silent):
            return describe_holder(holder, file)
        if not file.is_dir():  # no lock is a folder
            _remove_dead_lock(file)
        return None

    def _is_over(self, holder: dict, silent: float) -> bool:
        state = _find_holder_state(holder)
        if state != "unknown":
            return state == "dead"
        if holder.get("slurm") and silent > 2 * self.BEAT and _job_ended(*holder["slurm"]):
            return True
        return silent > self.SILENCE

    def _beat(self) -> None:
        while not self._released.wait(self.BEAT):
            try:
                os.utime(self.file)
            except OSError:  # the file was removed (see `lost`), or the file server is down
                continue


def find_lock_holders(folder: Path) -> dict[str, dict]:
    """Return {name: holder} of the locks that are held in `folder`.

    A holder is {host, pid, slurm, job, copied, silent: seconds since its last beat}; one that its file does
    not name has only `silent`. Slurm is not asked, so a job that died on another machine counts as alive for
    `Lock.SILENCE` seconds."""
    found: dict[str, dict] = {}
    for name, file in _lock_files(folder):
        try:
            silent = time.time() - file.stat().st_mtime
            holder = _read_holder(file)
        except FileNotFoundError:  # it was just released
            continue
        state = _find_holder_state(holder)
        if state == "alive" or state == "unknown" and silent <= Lock.SILENCE:
            found.setdefault(name, {**holder, "silent": silent})
    return found


def find_lock_holder(path: Path) -> dict | None:
    """Return the holder of the lock of `path`, as `find_lock_holders` does, or None."""
    return find_lock_holders(path.parent).get(path.name)


def _lock_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name of what is locked, lock file) of each lock file in `folder`."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if match := LOCK_NAME.fullmatch(name):
            yield match[1], folder / name


def _read_holder(file: Path) -> dict:
    """Return what a lock file records of its holder: {machine, pid, born, host, job, slurm, copied}.

    Each key is present only if it has the right form. {} if the file is damaged, cannot be read, or is not a
    file: the holder is unknown. Raises FileNotFoundError."""
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            return {}
        with open(file, "rb") as opened:
            said = json.loads(opened.read(MAX_LOCK_BYTES))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    texts = {key: said[key] for key in ("machine", "born", "host", "job") if _is_text(said.get(key))}
    holder = texts | ({"pid": said["pid"]} if type(said.get("pid")) is int else {})
    slurm = said.get("slurm")
    if isinstance(slurm, list) and len(slurm) == 2 and all(_is_number(word) for word in slurm):
        holder["slurm"] = slurm
    if said.get("inode", facts.st_ino) != facts.st_ino:
        holder.pop("machine", None)  # a copy: that process, if alive, holds another folder's lock
        holder["copied"] = True
    return holder


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_number(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9]+", value) is not None


def _find_holder_state(holder: dict) -> ProcessState:
    return find_process_state(holder.get("machine"), holder.get("pid"), holder.get("born"))


def _remove_dead_lock(file: Path) -> None:
    """Remove the lock of a process that has died. Raises UserError if that is not permitted."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{file} is a lock left behind that cannot be removed ({error.strerror}); have its owner "
            f"delete it"
        ) from None


def describe_holder(holder: dict, file: Path | None = None) -> str:
    """Describe the holder of a lock, as far as the lock file records it.

    `file` is named if it does not name the holder, or if it is a copy."""
    if "pid" not in holder or "host" not in holder:
        return f"a process that its lock{f' file {file}' if file else ''} does not name"
    who = f"{holder.get('job') or 'process ' + str(holder['pid'])} on {holder['host']}"
    if file and holder.get("copied"):
        who += f" (according to {file}; delete that file if it came with a copy of the folder)"
    return who


def _job_ended(job: str, restarts: str) -> bool:
    """Return whether Slurm reports that this start of `job` is over; False where Slurm cannot be asked."""
    if job == os.environ.get("SLURM_JOB_ID"):
        return restarts != (os.environ.get("SLURM_RESTART_COUNT") or "0")  # an earlier start of this job
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
    own = f"JobId={job} "  # the answer may list other jobs of an array
    listed = next((line for line in said.stdout.splitlines() if line.startswith(own)), "")
    fields = dict(word.split("=", 1) for word in listed.split() if "=" in word)
    if said.returncode or "JobState" not in fields:
        return "Invalid job id" in said.stderr  # Slurm forgets jobs some time after they end
    alive = fields["JobState"] in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
    return not alive or fields.get("Restarts", "0") != restarts
