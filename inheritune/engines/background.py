"""Saves that are written while training continues: a copy of a rank's states in host memory, and a thread
that writes it.

DeepSpeed 0.19.8 has a writer for this, `checkpoint.writer.decoupled`. It is not used: it copies nothing, so
the next update of the weights waits for its files; it flushes nothing; and its errors stay in another
process.

The threads of the ranks take part in no collective, because training needs them meanwhile. They learn of each
other through the store by which the ranks met.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from inheritune.engines.failures import Gather
from inheritune.engines.host_copies import HostCopies
from inheritune.errors import UserError
from inheritune.runtime.dist import gather_objects
from inheritune.runtime.ranks import get_rank, get_world_size
from inheritune.runtime.rendezvous import get_store

POLL_S = 0.05
GRACE_S = 60.0
"""How long a thread waits for the other ranks once its own rank leaves because of an error."""

_numbers = itertools.count()  # of saves, in the same order on all ranks


class Saves:
    """Runs the end of each save, in a thread or while training waits. At most one is being written.

    Every rank must call `run`, `check` and `wait` at the same points."""

    def __init__(self, in_background: bool):
        self.in_background = in_background
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._deadline = math.inf

    def copy(self, content: Any) -> Any | None:
        """Return a copy of `content` that `run` may write later; None if it must be written now."""
        return self._copies.make(content) if self.in_background else None

    def run(self, finish: Callable[[Gather], None]) -> None:
        """Call finish(gather), where `gather` is gather_objects or does the same without a collective."""
        if not self.in_background:
            finish(gather_objects)
            return
        assert self._thread is None, "the save before is still being written"
        self._thread = threading.Thread(target=self._run, args=(finish, next(_numbers)), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise on every rank what made the last save fail, and forget a save that is complete."""
        if self._thread is None:
            return
        is_alive, problem = self._thread.is_alive(), self._problem  # in this order
        states = gather_objects((is_alive, None if problem is None else str(problem) or repr(problem)))
        if failed := next((said for _, said in states if said), None):
            raise problem or UserError(failed)
        if not any(is_alive for is_alive, _ in states):
            self._thread = None
            self._copies.reuse()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what `check` does, which notices a rank that died."""
        while self._thread is not None:
            self._thread.join(POLL_S)
            self.check()

    def close(self) -> None:
        """Let the last save come to its end, also where this rank leaves because of an error."""
        if self._thread is not None:
            self._deadline = time.monotonic() + GRACE_S
            self._thread.join()

    def _run(self, finish: Callable[[Gather], None], number: int) -> None:
        exchanges = itertools.count()
        try:
            finish(lambda value: self._exchange(f"save {number}.{next(exchanges)}", value))
        except Exception as error:
            self._problem = error

    def _exchange(self, name: str, value: Any) -> list[Any]:
        """Return every rank's `value`, which JSON can hold, in rank order, on every rank."""
        if get_world_size() == 1:
            return [value]
        store = get_store()
        store.set(f"{name} of {get_rank()}", json.dumps(value))
        if get_rank() == 0:
            keys = [f"{name} of {rank}" for rank in range(get_world_size())]
            self._await_keys(keys)
            store.set(name, json.dumps([json.loads(store.get(key)) for key in keys]))
            for key in keys:
                store.delete_key(key)
        self._await_keys([name])
        return json.loads(store.get(name))

    def _await_keys(self, keys: list[str]) -> None:
        """Wait until the store has `keys`. Raises RuntimeError if they do not come and this rank leaves."""
        while not get_store().check(keys):
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"the other ranks have left before '{keys[0]}'")
            time.sleep(POLL_S)
