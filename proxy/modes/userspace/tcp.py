"""TCP through the proxy: accept, dial until an endpoint answers, copy both ways. Knows sockets, and no Service.

asyncio protocols joined in pairs: what one end reads is written to the other at once. A full write buffer stops the
reading at the other end (back-pressure), an end of file goes on as one (half-close), an error resets both.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from proxy.plan import Endpoint

# Seconds until the next endpoint is tried; kube-proxy's userspace mode had the same.
DIAL_SECONDS = (0.25, 0.5, 1.0, 2.0)
_BUFFER = 1 << 18
_BACKLOG = 4096  # the kernel has a limit of its own, net.core.somaxconn
_RESET = struct.pack("ii", 1, 0)


class Choose(Protocol):
    """Who decides for a client address."""

    def order(self, client: str) -> list[Endpoint]:
        """Return the endpoints in the order in which to try them; none: refuse."""

    def connected(self, client: str, endpoint: Endpoint) -> None:
        """Note which one answered."""

    def failed(self, client: str, endpoint: Endpoint) -> None:
        """Note which one did not."""


class Room:
    """What all doors of a loop share: a number of connections, for which doors wait, and the buffer to read into."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.buffer = memoryview(bytearray(_BUFFER))
        self.open = 0
        self.refused = 0
        self._waiting: list[Callable[[], None]] = []

    def take(self) -> bool:
        """Take one, if there is one."""
        if self.open >= self._most:
            return False
        self.open += 1
        return True

    def give(self) -> None:
        """Give one back, and let a waiting door accept again."""
        self.open -= 1
        self.pass_on()

    def pass_on(self) -> None:
        """Let the next waiting door accept."""
        if self._waiting:
            self._waiting.pop(0)()

    def wait(self, resume: Callable[[], None]) -> None:
        """Call `resume` when one is given back."""
        self._waiting.append(resume)


class _End(asyncio.BufferedProtocol):
    """One end of a connection; `other` is the one that gets what this one reads."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.early = bytearray()
        self.is_ended = False
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # what the other end has read before this one was there; its reading cannot be held back that early
        if self.other is not None and self.other.early:
            transport.write(bytes(self.other.early))
            self.other.early.clear()
        if self.other is not None and self.other.is_lost:
            transport.abort()
        elif self.other is not None and self.other.is_ended:
            transport.write_eof()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._pair.buffer

    def buffer_updated(self, nbytes: int) -> None:
        other = self.other
        if other is not None and other.transport is None:
            self.early += self._pair.buffer[:nbytes]
        elif other is not None and other.transport is not None and not other.transport.is_closing():
            # bytes(): what the transport cannot write at once it keeps, and the buffer is everybody's
            other.transport.write(bytes(self._pair.buffer[:nbytes]))

    def eof_received(self) -> bool:
        if self.is_ended:
            return True
        self.is_ended = True
        other = self.other
        if other is not None and other.transport is not None and not other.transport.is_closing():
            with contextlib.suppress(OSError):
                other.transport.write_eof()
        self._pair.ended()
        return True  # the other direction goes on

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self.other
        if other is not None and other.transport is not None and not other.transport.is_closing():
            other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._pair.lost(self, error)


class Pair:
    """A client and its endpoint."""

    def __init__(self, endpoint: Endpoint, buffer: memoryview, done: Callable[[Pair], None]) -> None:
        self.endpoint = endpoint
        self.buffer = buffer
        self._done = done
        self._ends: list[_End] = [_End(self), _End(self)]
        self._at_eof = 0
        self._left = 2
        self._ends[0].other, self._ends[1].other = self._ends[1], self._ends[0]

    async def join(self, client: socket.socket, server: socket.socket) -> None:
        """Begin to copy."""
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: self._ends[0], client)
            await loop.connect_accepted_socket(lambda: self._ends[1], server)
        except BaseException:
            self._done = lambda _: None
            self.reset()
            raise

    def ended(self) -> None:
        """One direction has ended; with both, the connection has."""
        self._at_eof += 1
        if self._at_eof == 2:
            for each in self._ends:
                if each.transport is not None:
                    each.transport.close()

    def lost(self, end: _End, error: Exception | None) -> None:
        """One end is gone; the other follows: reset where it was an error."""
        self._left -= 1
        other = end.other
        if other is not None and other.transport is not None and not other.transport.is_closing():
            if error is not None:
                _will_reset(other.transport.get_extra_info("socket"))
                other.transport.abort()
            else:
                other.transport.close()
        if self._left == 0:
            self._done(self)

    def reset(self) -> None:
        """End the connection at once, for both."""
        for each in self._ends:
            if each.transport is not None:
                _will_reset(each.transport.get_extra_info("socket"))
                each.transport.abort()


class TcpDoor:
    """A listening socket: each connection goes to an endpoint that `choose` names. Lives in one event loop."""

    def __init__(self, listener: socket.socket, choose: Choose, room: Room) -> None:
        self._listener = listener
        self._choose = choose
        self._room = room
        self._pairs: set[Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._loop.add_reader(listener, self._accept)
        self._is_open = True

    def close(self) -> None:
        """Accept no more; connections go on."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def abort(self) -> None:
        """Accept no more, and end all connections."""
        self.close()
        for task in self._tasks:
            task.cancel()
        for pair in list(self._pairs):
            pair.reset()

    @property
    def is_busy(self) -> bool:
        """Whether it is open, or has connections still."""
        return self._is_open or bool(self._pairs or self._tasks)

    def reset_of(self, backends: frozenset[tuple[str, int]]) -> None:
        """End the connections to these addresses and ports."""
        for pair in list(self._pairs):
            if (pair.endpoint.address, pair.endpoint.port) in backends:
                pair.reset()

    def _accept(self) -> None:
        for _ in range(64):
            if not self._room.take():
                # the kernel's queue holds the next ones until a connection ends
                self._room.refused += 1
                self._loop.remove_reader(self._listener)
                self._room.wait(self._resume)
                return
            try:
                client, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                self._room.give()
                return
            except OSError:
                self._room.give()
                return
            task = self._loop.create_task(self._serve(client, address[0]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _resume(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._listener, self._accept)
        else:
            self._room.pass_on()

    async def _serve(self, client: socket.socket, address: str) -> None:
        client.setblocking(False)
        is_joined = False
        try:
            found = await dial(self._choose, address)
            if found is None:
                return
            endpoint, server = found
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            pair = Pair(endpoint, self._room.buffer, self._ended)
            self._pairs.add(pair)
            try:
                await pair.join(client, server)
            except BaseException:
                self._pairs.discard(pair)
                raise
            is_joined = True
        finally:
            if not is_joined:
                _will_reset(client)
                client.close()
                self._room.give()

    def _ended(self, pair: Pair) -> None:
        self._pairs.discard(pair)
        self._room.give()


async def dial(choose: Choose, client: str) -> tuple[Endpoint, socket.socket] | None:
    """Return a connection to the first endpoint that answers in its time, and it; None when none does."""
    loop = asyncio.get_running_loop()
    order = choose.order(client)
    for attempt in range(max(len(order), len(DIAL_SECONDS)) if order else 0):
        endpoint = order[attempt % len(order)]
        seconds = DIAL_SECONDS[min(attempt, len(DIAL_SECONDS) - 1)]
        family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
        try:
            made = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no descriptor is left: no fault of the endpoint's
            return None
        made.setblocking(False)
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_connect(made, (endpoint.address, endpoint.port))
        except (OSError, TimeoutError):
            made.close()
            choose.failed(client, endpoint)
            continue
        except BaseException:
            made.close()
            raise
        choose.connected(client, endpoint)
        return endpoint, made
    return None


def _will_reset(each: socket.socket) -> None:
    """Make closing a reset (RST), as a kernel's refusal would be."""
    with contextlib.suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
