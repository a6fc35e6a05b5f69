"""Kubernetes Events told through the API server: an Event once, a repetition of it as its count.

An Event is a courtesy: sending it never delays, fails or fills the memory of a daemon. What the server does not want,
or cannot be asked for ten minutes, is dropped.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from pynet.daemon import logs
from pynet.objects import API_VERSIONS, Object, Ref, ref_of
from pynet.sources.events import Severity
from pynet.sources.transport import Refused, Transport, Unreachable

log = logs.get(__name__)
REPEAT_AFTER = 600.0  # the same reason on the same object is told again after so many seconds, with its count
BURST = 25  # Events at once, as client-go's recorder allows per object
REFILL = 1 / 30  # further Events a second
_WAITING = 100
_LONGEST = 1024  # of a message, as the API has it
_PAUSES = (1, 2, 4, 8, 15, *(30,) * 20, None)  # seconds between attempts while the server is away: ten minutes
_REMEMBERED = 1000


class _Told(msgspec.Struct):
    """What is remembered of an Event: the object, which says how often it happened, and when it was last sent."""

    event: dict[str, Any]
    sent: float
    is_there: bool = False  # the server has it


class ApiEvents:
    """Events as v1 Event objects, sent from a thread of their own."""

    def __init__(
        self, transport: Transport, component: str, node: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transport = transport
        self._component = component
        self._node = node
        self._clock = clock
        self._told: dict[tuple[str, str, Ref], _Told] = {}
        self._tokens = float(BURST)
        self._filled = clock()
        self._lock = threading.Lock()
        self._queue: queue.Queue[_Told | None] = queue.Queue(_WAITING)
        self._closing = threading.Event()
        self._is_refused = False
        self._thread = threading.Thread(target=self._send_all, name="events", daemon=True)
        self._thread.start()
        self.dropped = 0

    def emit(
        self, reason: str, message: str, about: Object | Ref | None = None, severity: Severity = "Warning"
    ) -> None:
        """Queue one Event; a repetition within `REPEAT_AFTER` is only counted."""
        ref = self._ref(about)
        message = message[:_LONGEST]
        with self._lock:
            now = self._clock()
            told = self._told.get((reason, message, ref))
            if told is not None:
                told.event["count"] += 1
                if now - told.sent < REPEAT_AFTER:
                    return
            if not self._allowed(now):
                self.dropped += 1
                return
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if told is None:
                event = self._first(reason, message, ref, about, severity, stamp)
                told = self._told[reason, message, ref] = _Told(event, now)
            told.event["lastTimestamp"] = stamp
            told.sent = now
            while len(self._told) > _REMEMBERED:
                del self._told[next(iter(self._told))]
        try:
            self._queue.put_nowait(told)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Send what is waiting, for two seconds at most."""
        self._closing.set()
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
                "name": f"{ref.name[:200].rstrip('-.')}.{time.time_ns():x}",
                "namespace": ref.namespace or "default",
            },
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "type": severity,
            "count": 1,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "source": {"component": self._component, "host": self._node},
            "reportingComponent": self._component,
            "reportingInstance": self._node,
        }

    def _send_all(self) -> None:
        while (told := self._queue.get()) is not None:
            for pause in _PAUSES:
                try:
                    self._send(told)
                    break
                except Exception as error:
                    if pause is None or self._closing.is_set() or not _may_pass(error):
                        self._drop(told, error)
                        break
                self._closing.wait(pause * random.uniform(0.5, 1.5))

    def _send(self, told: _Told) -> None:
        """Write an Event anew, or what changed of it; the server forgets Events after an hour."""
        with self._lock:
            event = _json(told.event)
            change = _json({field: told.event[field] for field in ("count", "lastTimestamp")})
            meta = told.event["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/events"
        if told.is_there:
            try:
                self._transport.send("PATCH", f"{path}/{meta['name']}", change, "application/merge-patch+json")
                return
            except Refused as error:
                if error.status.code != 404:
                    raise
        self._transport.send("POST", path, event, "application/json")
        told.is_there = True

    def _drop(self, told: _Told, error: Exception) -> None:
        self.dropped += 1
        level = logging.DEBUG if self._is_refused else logging.WARNING
        self._is_refused = True
        log.log(level, "Event not sent", extra=logs.fields(reason=told.event["reason"], error=error))


def _may_pass(error: Exception) -> bool:
    """Whether the same Event may be taken later: the server is away or busy."""
    if isinstance(error, Refused):
        return error.status.code in (401, 429) or error.status.code >= 500
    return isinstance(error, Unreachable)


def _json(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value)
