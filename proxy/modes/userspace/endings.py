"""What becomes of the connections of endpoints that are gone: kept, reset, or reset later, as their Service declares.

Knows the doors that still have connections, closed ones too. Lives in the event loop of the doors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from proxy.flows import Backend, backends_of
from proxy.modes.userspace.tcp import TcpDoor
from proxy.modes.userspace.udp import UdpDoor
from proxy.plan import Family, ServerKey, VirtualServer

AnyDoor = TcpDoor | UdpDoor
Port = tuple[Family, ServerKey]


class Endings:
    """Ends connections by Service port; `open_doors` names a port's doors that are open."""

    def __init__(self, open_doors: Callable[[Port], Iterable[AnyDoor]]) -> None:
        self._open_doors = open_doors
        self._closed: dict[Port, list[AnyDoor]] = {}
        self._timers: dict[tuple[Port, Backend], asyncio.TimerHandle] = {}

    def closed(self, port: Port, doors: Iterable[AnyDoor]) -> None:
        """Note doors that will accept no more: what they have accepted goes on."""
        self._closed.setdefault(port, []).extend(doors)

    def follow(self, port: Port, before: VirtualServer | None, new: VirtualServer | None) -> None:
        """End what the Service wants ended of endpoints that answer no more: UDP at once, TCP as it declares."""
        now = backends_of(new)
        for backend in now:
            self._cancel(port, backend)
        self._forget_idle()
        gone = backends_of(before) - now
        declared = new or before
        if not gone or declared is None:
            return
        word, _, seconds = declared.removal.partition(":")
        if declared.key.protocol == "UDP" or word == "reset":
            self._reset(port, gone)
        elif word == "drain":
            loop = asyncio.get_running_loop()
            for backend in gone:
                self._cancel(port, backend)
                self._timers[port, backend] = loop.call_later(float(seconds), self._drained, port, backend)

    def abort(self) -> None:
        """End all connections of closed doors."""
        for doors in self._closed.values():
            for each in doors:
                each.abort()
        self._closed.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _cancel(self, port: Port, backend: Backend) -> None:
        timer = self._timers.pop((port, backend), None)
        if timer is not None:
            timer.cancel()

    def _drained(self, port: Port, backend: Backend) -> None:
        self._timers.pop((port, backend), None)
        self._reset(port, frozenset({backend}))

    def _reset(self, port: Port, backends: frozenset[Backend]) -> None:
        for each in (*self._open_doors(port), *self._closed.get(port, ())):
            each.reset_of(backends)

    def _forget_idle(self) -> None:
        for port, doors in list(self._closed.items()):
            if not any(each.is_busy for each in doors):
                del self._closed[port]
