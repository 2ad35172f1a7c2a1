"""Ranks that share the weights of one model (ZeRO 3) and have different numbers of forwards to run.

Each forward gathers weights, in which every rank must take part. A rank that has no more of its own runs
empty ones until no rank has any.
"""

from typing import Any

import torch

from inheritune.runtime import dist


class EvenForwards:
    """Announces each forward of a sharded model to the other ranks.

    Between two forwards a rank must call `wait` before any collective of its own."""

    def __init__(self, model: Any):
        self._model, self._is_waiting = model, False
        model.register_forward_pre_hook(self._announce, prepend=True)  # before ZeRO's gathers

    def _announce(self, *_: Any) -> None:
        if not self._is_waiting:
            self._count_active(1)

    def _count_active(self, mine: int) -> int:
        """Return how many ranks are about to run a forward of their own."""
        return int(dist.sum_over_ranks(torch.tensor([mine], device=dist.get_device())).item())

    @torch.no_grad()
    def wait(self) -> None:
        """Take part in the other ranks' forwards until every rank waits."""
        self._is_waiting = True
        while self._count_active(0):
            self._model(
                input_ids=torch.zeros((1, 1), dtype=torch.long, device=dist.get_device()), use_cache=False
            )
        self._is_waiting = False
