"""The bounded runner: when the next run is due, as a table; and that it runs, retries and ends."""

from __future__ import annotations

import math
import threading

import pytest

from pynet.daemon.loop import BoundedRunner


@pytest.mark.parametrize(
    ("failures", "wanted", "max_interval", "expected"),
    [
        pytest.param(0, True, 30.0, 101.0, id="a request waits for the shortest interval since the last run's end"),
        pytest.param(0, False, 30.0, 130.0, id="without a request the longest interval counts"),
        pytest.param(0, False, None, math.inf, id="without either nothing is due"),
        pytest.param(0, False, 0.2, 101.0, id="the longest interval is never below the shortest"),
        pytest.param(1, True, 30.0, 102.0, id="after a failure a request brings nothing forward"),
        pytest.param(1, False, None, 102.0, id="a failure is retried without a request"),
        pytest.param(3, False, None, 108.0, id="pauses double"),
        pytest.param(50, False, None, 160.0, id="pauses end at a minute"),
    ],
)
def test_due(failures: int, wanted: bool, max_interval: float | None, expected: float) -> None:
    runner = BoundedRunner(lambda: None, min_interval=1.0, max_interval=max_interval, retry=2.0)
    assert runner.due(100.0, failures, wanted) == expected


def test_many_requests_are_one_run_and_a_failure_is_repeated() -> None:
    runs: list[str] = []
    stop = threading.Event()

    def work() -> None:
        runs.append("run")
        if len(runs) == 1:
            raise RuntimeError("refused")
        if len(runs) == 3:
            stop.set()
        else:
            for _ in range(5):
                runner.request()

    runner = BoundedRunner(work, min_interval=0.0, max_interval=None, retry=0.001)
    runner.request()
    thread = threading.Thread(target=runner.run, args=(stop,))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert len(runs) == 3
