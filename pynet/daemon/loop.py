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
        """Work until `stop` is set, which is noticed at once."""
        threading.Thread(target=self._wake, args=(stop,), name="wake", daemon=True).start()
        ended = -float("inf")
        failures = 0
        while not stop.is_set():
            now = time.monotonic()
            due = self.due(ended, failures, self._wanted.is_set())
            if now < due:
                # a request can only bring the next run nearer where none is waiting yet
                pause = None if due == float("inf") else due - now
                (stop if failures or self._wanted.is_set() else self._wanted).wait(pause)
                continue
            self._wanted.clear()
            try:
                self._work()
                failures = 0
            except Exception:
                failures += 1
                log.exception("work failed; will be retried", extra=logs.fields(retry_seconds=self._pause(failures)))
            ended = time.monotonic()

    def _wake(self, stop: threading.Event) -> None:
        stop.wait()
        self._wanted.set()

    def due(self, ended: float, failures: int, wanted: bool) -> float:
        """Return when the next run is due: `ended` is when the last one did, `failures` how many failed in a row."""
        if failures:
            return ended + self._pause(failures)
        if wanted:
            return ended + self._min_interval
        return float("inf") if self._max_interval is None else ended + max(self._max_interval, self._min_interval)

    def _pause(self, failures: int) -> float:
        return float(min(self._retry * _RETRY_GROWTH ** (failures - 1), _RETRY_LIMIT))
