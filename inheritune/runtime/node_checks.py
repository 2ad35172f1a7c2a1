"""What the ranks compare before anything costs time."""

import os
import shutil
from pathlib import Path

from inheritune.config.units import format_bytes
from inheritune.errors import UserError
from inheritune.files.markers import is_prepared
from inheritune.files.processes import get_node_name
from inheritune.runtime.devices import get_device
from inheritune.runtime.dist import gather_objects
from inheritune.runtime.ranks import get_world_size


def compare_nodes(folder: Path) -> str:
    """Return one line for the log after comparing what the ranks see: room in /dev/shm, and `folder` (the
    prepared data), which every node must have.

    Raises UserError naming the nodes that are wrong."""
    cuda = get_device().type == "cuda"
    shm = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    seen = gather_objects({"node": get_node_name(), "shm": shm, "data": is_prepared(folder)})
    problems = []
    for facts in seen:
        # if no node sees it, the data is not prepared, which is reported later
        if not facts["data"] and any(other["data"] for other in seen):
            problems.append(
                f"{facts['node']} does not see {folder}: put INHERITUNE_ROOT on a disk that all nodes share"
            )
        if cuda and get_world_size() > 1 and facts["shm"] < 64 << 20:
            problems.append(
                f"{facts['node']} has {facts['shm'] >> 20} MB free in /dev/shm, NCCL needs 64 MB or more"
            )
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    nodes = len({facts["node"] for facts in seen})
    least = min(facts["shm"] for facts in seen)
    room = f"/dev/shm {format_bytes(least, 'GB')} free" if least else "no writable /dev/shm"
    return (
        f"preflight: {get_world_size()} rank(s) on {nodes} node(s), one device each, a sum over all ranks "
        f"works, {room}"
    )
