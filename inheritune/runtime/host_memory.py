"""How much host memory this process may still take."""

from pathlib import Path

import psutil

LIMITS = ("memory.max", "memory.current", ("inactive_file", "active_file"))
LIMITS_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
"""By version of control groups: the files of a group's limit and use, and the rows of memory.stat that are
page cache, which the kernel gives back."""


def find_available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that the kernel calls available, and no more than the limits of this process's control
    groups leave. Slurm's --mem and a container's memory are such limits.

    `root` holds proc/self/cgroup and sys/fs/cgroup."""
    left = [psutil.virtual_memory().available]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return left[0]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            mount, names = root / "sys/fs/cgroup", LIMITS
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", LIMITS_V1
        else:
            continue
        group = mount / path.strip("/")
        places = (place for place in (group, *group.parents) if place.is_relative_to(mount))
        left += [n for place in places if (n := _read_left(place, *names)) is not None]
    return max(0, min(left))


def _read_left(group: Path, limit: str, use: str, caches: tuple[str, ...]) -> int | None:
    """Return the bytes that are left in a control group, None if it has no limit that can be read."""
    try:
        rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = sum(int(row[1]) for row in rows if row[0] in caches)
        return int((group / limit).read_text()) - int((group / use).read_text()) + cache
    except (OSError, ValueError):  # "max", or a group that this container does not see
        return None
