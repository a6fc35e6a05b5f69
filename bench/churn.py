"""A thousand endpoint changes a second: how far the kernel lags behind, what is lost (nothing may be), what it costs.

The daemon's own engine and run loop, with the mode's real kernel, in a namespace of its own; a thread plays the source.
Lag is from the delivery of a change to the end of the write that holds it. CPU is this process's and its tools'.
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cluster import endpoint_slice, objects
from form import Table, in_own_namespace, in_process_of_its_own, median, percentile
from proxies import ENDPOINT_KINDS, MODES, POD_CIDR, mode_settings

from proxy.cluster import Cluster
from proxy.engine import Engine
from proxy.metrics import Metrics
from proxy.modes import registry
from proxy.plan import Family, PlanChange
from pynet.daemon.loop import BoundedRunner
from pynet.sources import Batch
from pynet.sources.events import NoEvents

ENDPOINTS = 10


class Lag:
    """Told of every write; knows what was delivered and when."""

    def __init__(self) -> None:
        self.waiting: deque[float] = deque()
        self.lags: list[float] = []
        self.writes = 0
        self.first = threading.Event()
        self.taken = 0

    def follow(self, _cluster: Cluster, _changes: Sequence[PlanChange], _touched: object) -> None:
        now = time.monotonic()
        taken, self.taken = self.taken, 0
        for _ in range(taken):
            self.lags.append(now - self.waiting.popleft())
        self.writes += 1
        self.first.set()

    def tick(self, now: float) -> None:
        pass

    def queued(self, now: float) -> None:
        pass

    written = queued


def measure(mode_name: str, services: int, rate: int, seconds: int) -> dict[str, float]:
    settings = mode_settings(mode_name)
    lag = Lag()
    mode = registry.made(settings)
    stop = threading.Event()
    runner = BoundedRunner(lambda: work(), min_interval=settings.min_sync_seconds, max_interval=1.0, retry=1.0)
    engine = Engine(
        settings, mode, (Family.V4,), ENDPOINT_KINDS, Metrics(),
        request=runner.request, events=NoEvents(), health=lag, followers=[lag],
    )  # fmt: skip

    def work() -> None:
        # all that is queued now is in the write that this run ends with
        with engine._lock:
            lag.taken = sum(1 for batch in engine._queue if not batch.replaced)
        engine.work()

    thread = threading.Thread(target=runner.run, args=(stop,))
    thread.start()
    engine.deliver(Batch(tuple(objects(services, ENDPOINTS)), replaced=ENDPOINT_KINDS))
    lag.first.wait(120)
    before = cpu_seconds()
    began = time.monotonic()
    total = rate * seconds
    for index in range(total):
        due = began + index / rate
        pause = due - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        changed = endpoint_slice(index * 7919 % services, ENDPOINTS, 1 + index // services)
        lag.waiting.append(time.monotonic())
        engine.deliver(Batch((changed,)))
    deadline = time.monotonic() + 60
    while len(lag.lags) < total and time.monotonic() < deadline:
        time.sleep(0.01)
    spent = cpu_seconds() - before
    took = time.monotonic() - began
    stop.set()
    runner.request()
    thread.join()
    shifts = last_shifts(services, total)
    wanted = {
        endpoint.addresses[0]
        for number in range(services)
        for endpoint in endpoint_slice(number, ENDPOINTS, shifts.get(number, 0)).endpoints or ()
    }
    (plan,) = engine.plans()
    held = {endpoint.address for server in plan.servers.values() for endpoint in server.cluster}
    drift = mode.audit().found
    return {
        "changes": total, "seconds": took, "writes": lag.writes,
        "p50": median(lag.lags), "p99": percentile(lag.lags, 0.99), "most": max(lag.lags),
        "lost": len(wanted ^ held) + len(drift) + total - len(lag.lags), "cpu": spent / total,
    }  # fmt: skip


def last_shifts(services: int, total: int) -> dict[int, int]:
    """Return the shift of the last change that touched each Service."""
    return {index * 7919 % services: 1 + index // services for index in range(total)}


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def point(mode: str, services: int, rate: int, seconds: int) -> dict[str, float]:
    return in_process_of_its_own(__file__, mode, services, rate, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--rate", type=int, default=1000, help="changes a second")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--point", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        mode, services, rate, seconds, answer = args.point
        in_own_namespace()
        Path(answer).write_text(json.dumps(measure(mode, int(services), int(rate), int(seconds))))
        return
    table = Table(
        "churn",
        f"{args.rate} endpoint changes a second for {args.seconds} s, {args.services} Services × {ENDPOINTS} endpoints",
        ["mode", "changes", "writes", "lag p50 ms", "lag p99 ms", "lag most ms", "lost", "CPU us a change"],
    )
    for mode in args.modes.split(","):
        found = point(mode, args.services, args.rate, args.seconds)
        table.add(
            mode, int(found["changes"]), int(found["writes"]), found["p50"] * 1e3, found["p99"] * 1e3,
            found["most"] * 1e3, int(found["lost"]), found["cpu"] * 1e6,
        )  # fmt: skip
    table.notes.append(f"pods in {POD_CIDR}; lost: endpoints that differ at the end, in the plan or in the kernel")
    table.finish()


if __name__ == "__main__":
    main()
