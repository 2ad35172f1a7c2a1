"""The progress of `prepare`, as the user sees it."""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 30


class ProgressMeter:
    """Shows tokens per second and an estimate of the rest: as a bar on a terminal, as a log line every half
    minute elsewhere."""

    def __init__(self, tokens: int):
        """`tokens` are those that an earlier process has written."""
        self.started, self.shown, self.before = time.monotonic(), time.monotonic(), tokens
        self.bar = tqdm(
            unit="tok", unit_scale=True, initial=tokens, disable=not sys.stderr.isatty(), mininterval=0.5
        )

    def show(self, tokens: int, expected: int | None) -> None:
        """Show `tokens` of the `expected` ones, if that number is known."""
        if not self.bar.disable:
            self.bar.total = expected
            self.bar.update(tokens - self.bar.n)
        elif time.monotonic() - self.shown > LOG_EVERY_S:
            self.shown = time.monotonic()
            spent = self.shown - self.started
            line = tqdm.format_meter(
                tokens, expected or 0, spent, unit="tok", unit_scale=True, initial=self.before
            )
            log.info("%s", line)

    def close(self) -> None:
        self.bar.close()
