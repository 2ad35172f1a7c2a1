"""Why a training stops before its last step, and how all ranks come to know of it at the same moment."""

import os
import time
from dataclasses import dataclass
from enum import Enum

from inheritune.runs.job import Job
from inheritune.runtime import dist, signals, watchdog

STOP_FILE_INTERVAL_S = 1
"""A shared disk need not be asked at every step."""


class StopReason(Enum):
    SIGNAL = "signal"
    """The time limit is near, preemption, or Ctrl-C: a later start continues the work."""
    STOP_FILE = "STOP file"
    """The user put a STOP file into the run's folder: nothing continues until the user deletes it."""


@dataclass(frozen=True)
class StopRequest:
    reason: StopReason
    source: str
    """Name of the signal, or path of the STOP file."""

    def __str__(self) -> str:
        if self.reason is StopReason.STOP_FILE:
            return f"{self.source} exists; delete it to continue"
        return self.source

    @property
    def may_restart(self) -> bool:
        """Whether a job's script may start the run again by itself."""
        return self.reason is not StopReason.STOP_FILE


class StopRequests:
    """Asks for requests to stop; the answer is the same on every rank."""

    def __init__(self, job: Job, watch: watchdog.Watchdog):
        self.job, self.watch = job, watch
        self.latest: StopRequest | None = None
        """The last answer of `ask`."""
        self._next_look_s = 0.0

    def ask(self) -> StopRequest | None:
        """Return the request to stop that any rank has: a signal, or a STOP file that rank 0 sees; None
        without one. Every rank must call."""
        self.watch.at("between two steps or two batches of validation")
        request = None
        if signal_name := signals.get_stop_signal():
            request = StopRequest(StopReason.SIGNAL, signal_name)
        elif dist.get_rank() == 0 and time.monotonic() > self._next_look_s:
            self._next_look_s = time.monotonic() + STOP_FILE_INTERVAL_S
            request = self._find_stop_file()
        self.latest = dist.agree_on_stop(request)
        return self.latest

    def _find_stop_file(self) -> StopRequest | None:
        """Look for a STOP file of this run, and for that of a growth that needs this run."""
        for path in (str(self.job.root.stop), os.environ.get("INHERITUNE_STOP", "")):
            if os.path.isfile(path):
                return StopRequest(StopReason.STOP_FILE, path)
        return None
