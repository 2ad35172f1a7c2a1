"""The watchdog, which ends a job that makes no progress and reports which rank lags."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback

from inheritune.files.processes import get_node_name
from inheritune.runtime.job_reports import report_failure
from inheritune.runtime.ranks import get_rank, get_world_size
from inheritune.runtime.rendezvous import get_store


class Watchdog:
    """End a job that makes no progress, with the stack of every rank in the log and a sentence that names the
    rank that lags; a context manager.

    The training code calls `at` at each place that it reaches; all ranks reach the same places in the same
    order. A rank that stays at one for `limit_s` seconds prints the stacks of its threads, asks how far the
    others are, and exits with code 1. The thread counts its own looks instead of reading the clock: a job
    that Slurm suspended for an hour has not hung for an hour."""

    LOOKS = 10

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.passed, self.place = limit_s, 0, "the start"
        self._over = threading.Event()

    def at(self, place: str) -> None:
        """Record that this rank has reached `place`."""
        self.passed, self.place = self.passed + 1, place

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """End the job once LOOKS looks in a row have found no new place."""
        seen, unchanged = -1, 0
        while not self._over.wait(self.limit_s / self.LOOKS):
            # if something holds the interpreter's lock, this thread does not run, but faulthandler's C
            # thread does
            faulthandler.dump_traceback_later(self.limit_s)
            unchanged, seen = unchanged + 1 if self.passed == seen else 0, self.passed
            if unchanged == self.LOOKS:
                self._end()

    def _end(self) -> None:
        """Print what this rank is doing; the lowest rank that still answers reports who lags. Never
        returns."""
        frames = sys._current_frames().items()
        stacks = [traceback.format_stack(f) for t, f in frames if t != threading.get_ident()]
        said = (
            f"{get_node_name()} (rank {get_rank()}) has been at '{self.place}' for {self.limit_s:.0f} s; the "
            f"stacks "
            f"of its threads:"
        )
        lines = [f"inheritune: {said}", *("".join(stack) for stack in stacks)]
        print("\n".join(lines), file=sys.stderr, flush=True)
        try:
            reports = self._gather_reports()
            if get_rank() == min(reports):
                store = get_store()
                nodes = {r: store.get(f"here {r}").decode() for r in range(get_world_size())}
                sentence = describe_lag(reports, nodes)
                print(f"inheritune: {sentence}", file=sys.stderr, flush=True)
                report_failure(sentence)
            else:
                time.sleep(3)  # srun --kill-on-bad-exit would end the reporting rank before it has printed
        finally:
            os._exit(1)

    def _gather_reports(self) -> dict[int, tuple[int, str]]:
        """Return {rank: (places passed, the last of them)} of the ranks that hang too, after a short wait for
        all of them to report."""
        store = get_store()
        store.set(f"hangs {get_rank()}", json.dumps([self.passed, self.place]))
        keys = {r: f"hangs {r}" for r in range(get_world_size())}
        deadline = time.monotonic() + self.limit_s / 5
        while time.monotonic() < deadline and not store.check(list(keys.values())):
            time.sleep(0.1)
        return {r: tuple(json.loads(store.get(key))) for r, key in keys.items() if store.check([key])}


def describe_lag(reports: dict[int, tuple[int, str]], nodes: dict[int, str]) -> str:
    """Return a sentence that names the ranks that lag: those that do not answer, or else those that have
    passed fewer places than the others.

    `reports` is {rank: (places passed, the last of them)} of the ranks that hang and still answer, `nodes` is
    {rank: node} of all."""
    silent, least = [r for r in nodes if r not in reports], min(reports.values())
    late = silent or [r for r, report in reports.items() if report[0] == least[0]]
    if len(late) == len(nodes):
        return (
            f"no progress: all ranks are at '{least[1]}' (their stacks are above): a collective, a GPU or a "
            f"disk hangs"
        )
    whose = f"rank {', '.join(map(str, late))} on {', '.join(sorted({nodes[r] for r in late}))}"
    how = "does not answer" if silent else f"is still at '{least[1]}'"
    return f"no progress: {whose} {how}, the others wait at '{max(reports.values())[1]}' (stacks above)"
