"""Processes that files of ours name: whether the one that left a lock or a temporary file still works.

A process number means something only on its machine, since that machine's last start, and in its own
namespace (a container has one). Even there it may be hidden: /proc mounted with hidepid, or no /proc at all.
So there are three answers, and "cannot be seen" is not "dead".
"""

import os
import socket
from pathlib import Path
from typing import Literal

Fate = Literal["alive", "dead", "unknown"]


def node() -> str:
    """Name of this node, as Slurm calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def machine() -> str | None:
    """Name this machine since its last start, and the namespace of its process numbers; None where /proc does
    not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def birth(pid: int) -> str | None:
    """Start time of a process (field 22 of its stat, in clock ticks): "" if it has ended but is still listed
    (a zombie), None if it cannot be seen."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None  # this /proc lists the numbers of another namespace
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def fate(where: object, pid: object, born: object = None) -> Fate:
    """What has become of the process `pid` of `machine()` `where`, which was born at `born` (None: not
    known).

    Dead: the number is free, or another process's. Unknown: anything that this process cannot see for
    certain."""
    if where is None or where != machine() or type(pid) is not int or pid < 1:
        return "unknown"
    now = birth(pid)
    if now is None:
        return "dead" if _is_free(pid) else "unknown"
    if now == "":
        return "dead"
    if not isinstance(born, str) or not born:
        return "unknown"  # the number may be used again
    return "alive" if now == born else "dead"


def _is_free(pid: int) -> bool:
    """Whether no process of this namespace has this number. Signal 0 is not delivered, and finds those that
    /proc hides."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return False
