"""UDP through the proxy: a socket a client, to one endpoint, until it was idle for long. Knows sockets, no Service.

Replies leave from the address that the client wrote to (IP_PKTINFO): a host with many addresses would choose another.
An endpoint that refuses (ICMP port unreachable) is left, and the last datagram goes to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

from proxy.modes.userspace.tcp import Choose, Room
from proxy.plan import Endpoint

_SIZE = 65535
_BATCH = 64
_IP_PKTINFO = 8
_SWEEPS = 4  # looks for idle sessions in one idle time


class _Session:
    """One client: its socket to the endpoint, how to answer it, when it last had traffic."""

    def __init__(self, endpoint: Endpoint, link: socket.socket, reply_from: list[tuple[int, int, bytes]]) -> None:
        self.endpoint = endpoint
        self.link = link
        self.reply_from = reply_from
        self.last = b""
        self.tried = {endpoint}
        self.used = 0.0


class UdpDoor:
    """A bound socket: each client's datagrams go to one endpoint. Lives in one event loop."""

    def __init__(self, bound: socket.socket, choose: Choose, room: Room, idle_seconds: float) -> None:
        self._bound = bound
        self._choose = choose
        self._room = room
        self._idle_seconds = idle_seconds
        self._sessions: dict[Any, _Session] = {}
        self._loop = asyncio.get_running_loop()
        bound.setblocking(False)
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            bound.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._loop.add_reader(bound, self._from_clients)
        self._sweeper = self._loop.call_later(idle_seconds / _SWEEPS, self._sweep)

    def close(self) -> None:
        """End all sessions: UDP has no end of its own to wait for."""
        self._sweeper.cancel()
        self._loop.remove_reader(self._bound)
        self._bound.close()
        for client in list(self._sessions):
            self._end(client)

    abort = close
    is_busy = False  # once it is closed, and nobody asks before

    def reset_of(self, backends: frozenset[tuple[str, int]]) -> None:
        """End the sessions with these addresses and ports; the next datagram of each client chooses anew."""
        for client, session in list(self._sessions.items()):
            if (session.endpoint.address, session.endpoint.port) in backends:
                self._end(client)

    def _from_clients(self) -> None:
        for _ in range(_BATCH):
            try:
                data, ancillary, _, client = self._bound.recvmsg(_SIZE, socket.CMSG_SPACE(32))
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error for a reply of ours
                continue
            session = self._sessions.get(client) or self._begin(client, ancillary)
            if session is not None:
                session.used = self._loop.time()
                session.reply_from = _reply_from(ancillary)  # one socket may ask several addresses of the node
                session.last = data
                session.tried = {session.endpoint}
                self._send(client, session, data)

    def _begin(self, client: Any, ancillary: list[tuple[int, int, bytes]]) -> _Session | None:
        order = self._choose.order(client[0])
        if not order or not self._room.take():
            self._room.refused += bool(order)
            return None
        for endpoint in order:  # one without a route fails at once
            link = self._linked(client, endpoint)
            if link is not None:
                self._choose.connected(client[0], endpoint)
                session = self._sessions[client] = _Session(endpoint, link, _reply_from(ancillary))
                return session
        self._room.give()
        return None

    def _linked(self, client: Any, endpoint: Endpoint) -> socket.socket | None:
        family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
        try:
            link = socket.socket(family, socket.SOCK_DGRAM)
        except OSError:  # no descriptor is left
            return None
        link.setblocking(False)
        try:
            link.connect((endpoint.address, endpoint.port))
        except OSError:
            link.close()
            self._choose.failed(client[0], endpoint)
            return None
        self._loop.add_reader(link, self._from_endpoint, client)
        return link

    def _send(self, client: Any, session: _Session, data: bytes) -> None:
        try:
            session.link.send(data)
        except (BlockingIOError, InterruptedError):
            return  # a full buffer drops, as the network would
        except ConnectionRefusedError:  # of an earlier datagram
            self._go_on(client, session)
        except OSError:
            self._end(client)

    def _from_endpoint(self, client: Any) -> None:
        session = self._sessions.get(client)
        for _ in range(_BATCH):
            if session is None:
                return
            try:
                data = session.link.recv(_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionRefusedError:
                self._go_on(client, session)
                return
            except OSError:
                self._end(client)
                return
            session.used = self._loop.time()
            with contextlib.suppress(OSError):
                self._bound.sendmsg([data], session.reply_from, 0, client)

    def _go_on(self, client: Any, session: _Session) -> None:
        """Leave an endpoint that refuses for the next one that this datagram has not tried."""
        self._choose.failed(client[0], session.endpoint)
        left = [endpoint for endpoint in self._choose.order(client[0]) if endpoint not in session.tried]
        link = self._linked(client, left[0]) if left else None
        self._loop.remove_reader(session.link)
        session.link.close()
        if link is None:
            self._sessions.pop(client, None)
            self._room.give()
            return
        session.endpoint, session.link = left[0], link
        session.tried.add(left[0])
        self._choose.connected(client[0], left[0])
        with contextlib.suppress(OSError):
            link.send(session.last)

    def _end(self, client: Any) -> None:
        session = self._sessions.pop(client, None)
        if session is not None:
            self._loop.remove_reader(session.link)
            session.link.close()
            self._room.give()

    def _sweep(self) -> None:
        oldest = self._loop.time() - self._idle_seconds
        for client, session in list(self._sessions.items()):
            if session.used <= oldest:
                self._end(client)
        self._sweeper = self._loop.call_later(self._idle_seconds / _SWEEPS, self._sweep)


def _reply_from(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Return what makes a reply leave from the address that the datagram came to."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            _, local, _ = struct.unpack("=I4s4s", data[:12])
            return [(level, kind, struct.pack("=I4s4s", 0, local, bytes(4)))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return [(level, kind, data[:16] + struct.pack("=I", 0))]
    return []
