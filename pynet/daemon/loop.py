"""The run loop of a daemon: work is asked for often and done with bounded frequency. Knows no work by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pynet.daemon import logs

log = logs.get(__name__)
_RETRY_GROWTH = 2.0
_RETRY_LIMIT = 60.0


class BoundedRunner:
    """Runs `work` when it was requested, at most once every `min_interval` seconds, at least every `max_interval`.

    The interval counts from the end of the last run (kubernetes#138073: counted from the start, slow work leaves no
    rest). A run that raises is logged and repeated after `retry` seconds, doubled at each failure in a row up to 60.
    """

    def __init__(
        self, work: Callable[[], None], *, min_interval: float, max_interval: float | None, retry: float
    ) -> None:
        self._work = work
        self._min_interval = min_interval
        self._max_interval = max_interval
        self._retry = retry
        self._wanted = threading.Event()

    def request(self) -> None:
        """Ask for a run; from any thread; many requests before the run are one."""
        self._wanted.set()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, which is noticed within half a second (at once, with a `request` after it)."""
        ended = -float("inf")
        failures = 0
        while not stop.is_set():
            self._wait(ended, failures, stop)
            if stop.is_set():
                return
            self._wanted.clear()
            try:
                self._work()
                failures = 0
            except Exception:
                failures += 1
                log.exception("work failed; will be retried", extra=logs.fields(retry_seconds=self._delay(failures)))
            ended = time.monotonic()

    def _delay(self, failures: int) -> float:
        return float(min(self._retry * _RETRY_GROWTH ** (failures - 1), _RETRY_LIMIT))

    def _wait(self, ended: float, failures: int, stop: threading.Event) -> None:
        """Return when the next run is due."""
        earliest = ended + (self._delay(failures) if failures else self._min_interval)
        latest = ended + self._max_interval if self._max_interval is not None else float("inf")
        while not stop.is_set():
            now = time.monotonic()
            if failures or self._wanted.is_set():
                due = earliest
            else:
                due = max(latest, earliest)
            if now >= due:
                return
            pause = min(due - now, 0.5)
            if failures or self._wanted.is_set():
                stop.wait(pause)
            else:
                self._wanted.wait(pause)
