"""Processes named in locks and temporary files: whether they are still alive.

A process number is only valid on its machine, since the machine's last start, and in its own namespace (a
container has one). Even there it may be hidden: /proc mounted with hidepid, or no /proc at all. So there are
three answers, and a hidden process is "unknown", not "dead".
"""

import os
import socket
from pathlib import Path
from typing import Literal

ProcessState = Literal["alive", "dead", "unknown"]


def get_node_name() -> str:
    """Return the name of this node: Slurm's, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def identify_machine() -> str | None:
    """Return a name of this machine since its last start, with the namespace of its process numbers.

    Returns None where /proc does not have them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def read_start_time(pid: int) -> str | None:
    """Return the start time of a process (field 22 of its stat, in clock ticks).

    Returns "" for a zombie, and None if the process cannot be seen."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None  # this /proc lists the numbers of another namespace
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = line.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def find_process_state(where: object, pid: object, born: object = None) -> ProcessState:
    """Return the state of process `pid` of the machine `where`, which started at `born` (None: not known).

    `where` is as `identify_machine` returns it, `born` as `read_start_time`. Dead: the number is free, or
    belongs to another process. Unknown: this process cannot tell for certain."""
    if where is None or where != identify_machine() or type(pid) is not int or pid < 1:
        return "unknown"
    now = read_start_time(pid)
    if now is None:
        return "dead" if _is_free(pid) else "unknown"
    if now == "":
        return "dead"
    if not isinstance(born, str) or not born:
        return "unknown"  # the number may be used again
    return "alive" if now == born else "dead"


def _is_free(pid: int) -> bool:
    """Return whether no process of this namespace has this number.

    Signal 0 is not delivered, and also finds processes that /proc hides."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's process; a number that no process can have
        pass
    return False
