"""Clocks of a run: the parts of a start, and the time of a step."""

import contextlib
import time
from collections.abc import Iterator

import psutil

from inheritune.files.json_files import write_json
from inheritune.files.rundir import RunDir
from inheritune.runtime.log import logger


class StartClock:
    """Seconds of a start by part: from the beginning of the process, or of a later job in it, to the end of
    the first step."""

    def __init__(self, first: bool):
        self.parts: dict[str, float] = {}
        self._last = time.time()
        if first:
            with contextlib.suppress(psutil.Error):  # where /proc is not mounted
                self._last = psutil.Process().create_time()

    def end(self, part: str) -> None:
        """Note that `part` ends now."""
        now = time.time()
        self.parts[part], self._last = round(now - self._last, 2), now

    def record(self, run_dir: RunDir) -> None:
        """Log the parts, and add them to this start in provenance.json."""
        shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        logger.info("the first step ended %.1f s after the start: %s", sum(self.parts.values()), shown)
        starts = run_dir.read_starts()
        starts[-1]["start_s"] = self.parts
        write_json(run_dir.provenance, {"starts": starts})


class StepTimer:
    """Mean time of the steps since the last `restart`, without validation and saving."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._t0, self._n_steps = time.perf_counter(), 0

    def count_step(self) -> None:
        self._n_steps += 1

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._t0) / self._n_steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out."""
        begun = time.perf_counter()
        yield
        self._t0 += time.perf_counter() - begun
