"""Whether this proxy is healthy, in kube-proxy's terms, and the answers of its HTTP paths.

Healthy: no change has waited for longer than twice the sync period. /healthz also asks whether the node is to get new
traffic (it is not, once deleted or marked by the cluster autoscaler); /livez does not.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from proxy.metrics import Metrics
from proxy.plan import Family
from pynet.daemon.http import Reply, metrics_reply
from pynet.objects import Node

NO_SNIFF = ("X-Content-Type-Options", "nosniff")
AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"


class Health:
    """How it goes: told by the engine, asked by HTTP."""

    def __init__(
        self,
        families: Sequence[Family],
        sync_seconds: float,
        node: Callable[[], Node | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._families = families
        self._limit = 2 * sync_seconds
        self._node = node
        self._clock = clock
        self._lock = threading.Lock()
        self._queued_at: float | None = clock()
        self._written_at: float | None = None
        self._written_time: float = 0.0

    def queued(self, now: float) -> None:
        """A change is waiting since `now`, unless an earlier one is."""
        with self._lock:
            if self._queued_at is None:
                self._queued_at = now

    def written(self, now: float) -> None:
        """Everything known is in the kernel."""
        with self._lock:
            self._queued_at, self._written_at, self._written_time = None, now, time.time()

    def is_live(self) -> bool:
        """Whether a first sync was done and no change has waited for too long."""
        with self._lock:
            if self._written_at is None:
                return False
            return self._queued_at is None or self._clock() - self._queued_at <= self._limit

    def is_node_eligible(self) -> bool:
        """Whether the node is to get new traffic from load balancers."""
        node = self._node()
        if node is None:
            return True
        return not node.metadata.deletion_timestamp and not any(
            taint.key == AUTOSCALER_TAINT for taint in node.spec.taints or ()
        )

    def healthz(self) -> Reply:
        """Answer /healthz."""
        return self._reply(with_node=True)

    def livez(self) -> Reply:
        """Answer /livez."""
        return self._reply(with_node=False)

    def is_healthy(self) -> bool:
        """What /healthz says."""
        return self.is_live() and self.is_node_eligible()

    def _reply(self, with_node: bool) -> Reply:
        live = self.is_live()
        eligible = self.is_node_eligible()
        is_well = live and (eligible or not with_node)
        now, written = _stamp(time.time()), _stamp(self._written_time)
        body: dict[str, object] = {
            "lastUpdated": now if is_well else written,  # as kube-proxy: always fresh while all is well
            "currentTime": now,
        }
        if with_node:
            body["nodeEligible"] = eligible
        body["status"] = {family.value: {"lastUpdated": written, "healthy": live} for family in self._families}
        return Reply(200 if is_well else 503, "application/json", json.dumps(body).encode(), (NO_SNIFF,))


def health_routes(health: Health, metrics: Metrics) -> dict[str, Callable[[], Reply]]:
    """Return what is served on the health address."""

    def healthz() -> Reply:
        reply = health.healthz()
        metrics.healthz.labels(str(reply.status)).inc()
        return reply

    def livez() -> Reply:
        reply = health.livez()
        metrics.livez.labels(str(reply.status)).inc()
        return reply

    return {"/healthz": healthz, "/livez": livez}


def metrics_routes(
    metrics: Metrics, mode: Callable[[], str], configuration: Callable[[], bytes]
) -> dict[str, Callable[[], Reply]]:
    """Return what is served on the metrics address; its /healthz and /livez say only that somebody answers."""

    def ok() -> Reply:
        return Reply(200, body=b"ok", headers=(NO_SNIFF,))

    return {
        "/metrics": lambda: metrics_reply(metrics.registry),
        "/healthz": ok,
        "/livez": ok,
        "/proxyMode": lambda: Reply(200, body=mode().encode(), headers=(NO_SNIFF,)),
        "/configz": lambda: Reply(200, "application/json", configuration()),
    }


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ") if seconds else "0001-01-01T00:00:00Z"
