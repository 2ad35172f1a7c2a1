"""This process's rank, the number of ranks, and the error that names both rank and node.

What needs a process group is in dist.py.
"""

import os

from inheritune.errors import UserError
from inheritune.files.processes import get_node_name
from inheritune.runtime.launcher import find_launch


class NodeError(UserError):
    """Something is wrong with this rank's node: printed by this rank, with the node's name."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{get_node_name()} (rank {get_rank()}): {message}")


def get_rank() -> int:
    """Return this process's rank, also before the group exists; 0 if the environment names no complete
    launch."""
    return find_launch(os.environ).rank


def get_world_size() -> int:
    """Return the number of processes of the launch."""
    return find_launch(os.environ).world
