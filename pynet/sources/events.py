"""Kubernetes Events: what an operator must know, told through the API server; once, and never as noise.

An Event is a courtesy: sending it never delays, fails or fills the memory of a daemon. What cannot be sent is dropped.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from pynet.daemon import logs
from pynet.objects import API_VERSIONS, Object, Ref, ref_of

if TYPE_CHECKING:
    from pynet.sources.transport import Transport

log = logs.get(__name__)
REPEAT_AFTER = 600.0  # the same reason on the same object is told again after so many seconds, with its count
BURST = 25  # Events at once, as client-go's recorder allows per object
REFILL = 1 / 30  # further Events a second
_WAITING = 100
_REMEMBERED = 1000
Severity = Literal["Normal", "Warning"]


class Events(Protocol):
    """Where Events go."""

    def emit(
        self, reason: str, message: str, about: Object | Ref | None = None, severity: Severity = "Warning"
    ) -> None:
        """Tell `message` about an object (None: this node); `reason` is one CamelCase word. Never blocks or raises."""

    def close(self) -> None:
        """Send what is waiting, for two seconds at most."""


class NoEvents:
    """Where no API server is: Events go nowhere; what they say is in the log."""

    def emit(
        self, reason: str, message: str, about: Object | Ref | None = None, severity: Severity = "Warning"
    ) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Told(msgspec.Struct):
    """What is remembered of an Event that was sent: its name, how often it happened, and when it was last sent."""

    namespace: str
    name: str
    count: int
    sent: float
    waiting: bool = False


class ApiEvents:
    """Events as v1 Event objects, sent from a thread of their own."""

    def __init__(
        self, transport: Transport, component: str, node: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transport = transport
        self._component = component
        self._node = node
        self._clock = clock
        self._told: dict[tuple[str, Ref], _Told] = {}
        self._tokens = float(BURST)
        self._filled = clock()
        self._lock = threading.Lock()
        self._queue: queue.Queue[tuple[str, str, bytes, str] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._send_all, name="events", daemon=True)
        self._thread.start()
        self.dropped = 0

    def emit(
        self, reason: str, message: str, about: Object | Ref | None = None, severity: Severity = "Warning"
    ) -> None:
        """Queue one Event; a repetition within `REPEAT_AFTER` is only counted."""
        ref = self._ref(about)
        with self._lock:
            now = self._clock()
            told = self._told.get((reason, ref))
            if told is not None:
                told.count += 1
                if now - told.sent < REPEAT_AFTER:
                    return
            if not self._allowed(now):
                self.dropped += 1
                return
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if told is None:
                request = self._first(reason, message, ref, about, severity, stamp)
                namespace = ref.namespace or "default"
                name = str(request["metadata"]["name"])
                told = self._told[reason, ref] = _Told(namespace, name, 1, now)
                order = ("POST", f"/api/v1/namespaces/{namespace}/events", _json(request), "application/json")
            else:
                change = {"count": told.count, "lastTimestamp": stamp, "message": message}
                path = f"/api/v1/namespaces/{told.namespace}/events/{told.name}"
                order = ("PATCH", path, _json(change), "application/merge-patch+json")
            told.sent = now
            while len(self._told) > _REMEMBERED:
                del self._told[next(iter(self._told))]
        try:
            self._queue.put_nowait(order)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Send what is waiting, for two seconds at most."""
        try:
            self._queue.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(2)

    def _ref(self, about: Object | Ref | None) -> Ref:
        if about is None:
            return Ref("Node", "", self._node)
        return about if isinstance(about, Ref) else ref_of(about)

    def _allowed(self, now: float) -> bool:
        self._tokens = min(float(BURST), self._tokens + (now - self._filled) * REFILL)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _first(
        self, reason: str, message: str, ref: Ref, about: Object | Ref | None, severity: Severity, stamp: str
    ) -> dict[str, Any]:
        involved = {"kind": ref.kind, "name": ref.name, "apiVersion": API_VERSIONS.get(ref.kind, "v1")}
        if ref.namespace:
            involved["namespace"] = ref.namespace
        # The kubelet's own Events name a Node by its name in place of the uid; `kubectl describe node` looks for that.
        uid = about.metadata.uid if about is not None and not isinstance(about, Ref) else ""
        if uid or ref.kind == "Node":
            involved["uid"] = uid or ref.name
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{ref.name}.{time.time_ns():x}",
                "namespace": ref.namespace or "default",
            },
            "involvedObject": involved,
            "reason": reason,
            "message": message[:1024],
            "type": severity,
            "count": 1,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "source": {"component": self._component, "host": self._node},
            "reportingComponent": self._component,
            "reportingInstance": self._node,
        }

    def _send_all(self) -> None:
        while (order := self._queue.get()) is not None:
            method, path, body, content_type = order
            try:
                self._transport.send(method, path, body, content_type)
            except Exception as error:
                self.dropped += 1
                log.debug("Event not sent", extra=logs.fields(path=path, error=error))


def _json(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value)
