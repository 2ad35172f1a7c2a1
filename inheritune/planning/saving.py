"""How long a save takes, and how long training waits for it. The two rates are assumed, not measured."""

DISK_RATE = 1e9
"""Bytes a second that all ranks together write to a shared disk which many nodes use."""
COPY_RATE = 10e9
"""Bytes a second from a GPU to pinned memory of its host: less than half of what PCIe 5 has."""


def estimate_saving(planned: dict, in_background: bool, interval_s: float) -> dict[str, float]:
    """Return {save_s, wait_s, wait_share}: the seconds of one save, those for which training waits, and their
    share of the time, for saves every `interval_s` seconds of training.

    `planned`: what estimate_memory returns. A save in the background holds training up while rank 0, which
    writes most, copies its part, and while the save before is still being written."""
    save_s = planned["checkpoint"] / DISK_RATE
    wait_s = save_s
    if in_background:
        wait_s = planned["rank0"] / COPY_RATE + max(0.0, save_s - interval_s)
    return {"save_s": save_s, "wait_s": wait_s, "wait_share": wait_s / (wait_s + interval_s)}
