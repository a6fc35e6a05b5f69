"""`--hold-node-ports`: every node port is bound by the daemon as well, so that nothing else on the node takes it by
accident, and `ss -l` shows whose it is. The sockets never get traffic: the kernel sends it on before it comes to them.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Sequence

from proxy.cluster import Cluster
from proxy.plan import FrontendKind, Plan, PlanChange
from pynet.daemon import logs
from pynet.sources.events import Events

log = logs.get(__name__)
Port = tuple[str, int]
_KINDS = {
    "TCP": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "UDP": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "SCTP": (socket.SOCK_STREAM, 132),
}


def node_ports(plans: Sequence[Plan]) -> set[Port]:
    """Return the node ports of all Services, with their protocols."""
    return {
        (server.key.protocol, frontend.port)
        for plan in plans
        for server in plan.servers.values()
        for frontend in server.frontends
        if frontend.kind is FrontendKind.NODE_PORT
    }


class Holder:
    """The sockets, kept as the plans want them."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._held: dict[Port, socket.socket] = {}
        self._refused: set[Port] = set()

    def follow(self, cluster: Cluster, changes: Sequence[PlanChange], services: Collection[str]) -> None:  # noqa: ARG002
        """Bind and release as `changes` want it."""
        touched = any(
            {f.port for f in (old.frontends if old else ()) if not f.address}
            != {f.port for f in (new.frontends if new else ()) if not f.address}
            for change in changes
            for key in change.keys
            for old, new in [(change.old.servers.get(key), change.new.servers.get(key))]
        )
        if not touched and not self._refused:
            return
        wanted = node_ports([change.new for change in changes])
        for port in self._held.keys() - wanted:
            self._held.pop(port).close()
        self._refused &= wanted
        for port in sorted(wanted - self._held.keys()):
            self._hold(port)

    def tick(self, now: float) -> None:
        """Nothing is due by time."""

    def close(self) -> None:
        """Release all ports."""
        for held in self._held.values():
            held.close()
        self._held.clear()

    def _hold(self, port: Port) -> None:
        protocol, number = port
        try:
            self._held[port] = _bound(protocol, number)
        except OSError as error:
            if port not in self._refused:
                log.warning(
                    "node port is in use by another process; its clients reach the Service all the same",
                    extra=logs.fields(port=number, protocol=protocol, reason=error.strerror),
                )
                self._events.emit("NodePortInUse", f"node port {number}/{protocol}: {error.strerror}")
            self._refused.add(port)
        else:
            self._refused.discard(port)


def _bound(protocol: str, number: int) -> socket.socket:
    """Return a socket on every address of the node. Raise `OSError`."""
    kind, proto = _KINDS[protocol]
    try:
        held = socket.socket(socket.AF_INET6, kind | socket.SOCK_CLOEXEC, proto)
        host = "::"
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except OSError:
        held = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC, proto)
        host = "0.0.0.0"
    try:
        if kind == socket.SOCK_STREAM:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        held.bind((host, number))
        if kind == socket.SOCK_STREAM:
            held.listen(0)
    except OSError:
        with contextlib.suppress(OSError):
            held.close()
        raise
    return held
