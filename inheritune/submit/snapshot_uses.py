"""Which jobs run which snapshot of the checkout, and the removal of snapshots that no job can run any more.

    runs/code/<hash>                      a snapshot (submit/snapshot.py)
    runs/code/<hash>.used-CLUSTER.JOB     job JOB of this Slurm cluster runs it
    runs/code/<hash>.used-NODE+PID        a submission that has not asked sbatch yet

A snapshot stays while one of its marks does. A mark goes when Slurm no longer knows its job, so that it can
neither run nor be requeued, or its submission has ended without one. Marks of another cluster, node or user
stay: their queue or process cannot be seen here."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from inheritune.config import names
from inheritune.files.processes import find_process_state, get_node_name, identify_machine
from inheritune.files.storage import find_root, list_names
from inheritune.submit.slurm_commands import ask_slurm, read_cluster

USED = ".used-"


def announce_use(code: Path) -> None:
    """Mark snapshot `code` as used by this process, before it is looked for. Raises OSError."""
    code.parent.mkdir(parents=True, exist_ok=True)
    _find_own_mark(code).touch()


def mark_use(code: str, job: str, cluster: str = "") -> None:
    """Mark snapshot `code` as used by `job`, and no longer by this process. Without a snapshot, do nothing.

    `cluster` is the one that has the job, if it is not this one. Raises OSError."""
    if code:
        announce_use(Path(code))
        name = f"{Path(code).name}{USED}{cluster or read_cluster()}.{job}"
        _find_own_mark(Path(code)).rename(Path(code).with_name(name))


def drop_use(code: str | Path) -> None:
    """Take the mark of this process from snapshot `code`, of a submission that was refused."""
    if code:
        with suppress(OSError):
            _find_own_mark(Path(code)).unlink()


def _find_own_mark(code: Path) -> Path:
    return code.with_name(f"{code.name}{USED}{get_node_name()}+{os.getpid()}")


def remove_unused(kept: str) -> int:
    """Remove the user's snapshots that no job can run any more, without `kept`. Returns how many.

    One that cannot be removed stays; where Slurm does not answer, all do."""
    folder = find_root() / "runs" / names.CODE
    marks: dict[str, list[str]] = {}
    for name in list_names(folder):
        code, used, _ = name.partition(USED)
        if used and code != Path(kept).name:
            marks.setdefault(code, []).append(name)
    # after the marks were listed; those that have finished a moment ago can be requeued
    known = ask_slurm("squeue", "-h", "-a", "-t", "all", "-o", "%F", tries=1) if marks else None
    cluster, removed = read_cluster() if marks else "", 0
    if known is None or not cluster:
        return 0
    queued = {f"{cluster}.{job}" for job in known.split()}
    for code, own in marks.items():
        stale = [name for name in own if _is_stale(folder / name, cluster, queued)]
        if len(stale) < len(own):
            with suppress(OSError):
                for name in stale:
                    (folder / name).unlink()
        elif _remove(folder / code, set(own)):
            removed += 1
    return removed


def _is_stale(mark: Path, cluster: str, queued: set[str]) -> bool:
    """Return whether a mark is this user's, and its job is one of this cluster that Slurm has forgotten, or
    its submission ended before it had one."""
    user = mark.name.partition(USED)[2]
    with suppress(OSError):
        return (
            user not in queued
            and (user.rpartition(".")[0] == cluster if "+" not in user else _has_ended(user))
            and mark.stat().st_uid == os.getuid()
        )
    return False


def _has_ended(process: str) -> bool:
    """Return whether NODE+PID was a process of this node, and is none now."""
    node, _, pid = process.rpartition("+")
    if node != get_node_name() or not pid.isdecimal():
        return False
    return find_process_state(identify_machine(), int(pid)) == "dead"


def _remove(code: Path, marks: set[str]) -> bool:
    """Remove snapshot `code` and its `marks`, unless it gets another meanwhile. Returns whether it did."""
    away = code.with_name(f"{code.name}{names.TEMPORARY}-{os.getpid()}")
    with suppress(OSError):
        if code.exists():
            if code.stat().st_uid != os.getuid():
                return False
            code.rename(away)
        if {name for name in list_names(code.parent) if name.startswith(code.name + USED)} - marks:
            with suppress(OSError):  # its new user may have made it again by now
                away.rename(code)
            shutil.rmtree(away, ignore_errors=True)
            return False
        for name in marks:
            (code.parent / name).unlink(missing_ok=True)  # another submission may remove the same
        shutil.rmtree(away)
        return True
    return False
