"""Netlink's wire format and one socket that speaks it: attributes, requests with acknowledgement, dumps.

Standard library only and few imports: the CNI executable loads this on every call. It knows no message's meaning;
those are in `rtnl`, `tc` and `conntrack`.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
from collections.abc import Iterator, Sequence

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

REQUEST, ACK = 0x1, 0x4
DUMP = 0x300
REPLACE, EXCL, CREATE, APPEND = 0x100, 0x200, 0x400, 0x800

_DUMP_INTR = 0x10
_ACK_TLVS = 0x200
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SNDBUFFORCE, _RCVBUFFORCE = 32, 33
_BUFFER_BYTES, _ANSWER_BYTES = 1 << 16, 1024
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12
_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_DUMP_TRIES = 20
_PATIENCE = struct.pack("=qq", 30, 0)  # seconds; the kernel's own timer: `settimeout` would poll before each call

Message = tuple[int, int, bytes]
"""Type, flags (REQUEST and ACK are added) and body of one request."""


class NetlinkError(OSError):
    """The kernel refused a request; the text holds its own explanation (extended acknowledgement) where it gave one."""


def attr(kind: int, payload: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    length = len(payload) + 4
    return _ATTR.pack(length, kind) + payload + b"\0" * (-length & 3)


def nest(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds attributes."""
    return attr(kind | _NESTED, b"".join(attributes))


def u8(kind: int, value: int) -> bytes:
    """Return an attribute of one byte."""
    return attr(kind, bytes((value,)))


def u16(kind: int, value: int) -> bytes:
    """Return a 16-bit attribute in the machine's order."""
    return attr(kind, struct.pack("=H", value))


def u32(kind: int, value: int) -> bytes:
    """Return a 32-bit attribute in the machine's order."""
    return attr(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    """Return a string attribute, closed by a zero byte."""
    return attr(kind, value.encode() + b"\0")


def each(buffer: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and payload of every attribute in `buffer`."""
    at, end = 0, len(buffer)
    while at + 4 <= end:
        length, kind = _ATTR.unpack_from(buffer, at)
        if length < 4:
            return
        yield kind & _TYPE_MASK, buffer[at + 4 : at + length]
        at += (length + 3) & ~3


def attributes(buffer: bytes) -> dict[int, bytes]:
    """Return the attributes in `buffer` by kind; of a repeated kind, the last. A hot path, so not by `each`."""
    found = {}
    at, end = 0, len(buffer) - 3
    unpack = _ATTR.unpack_from
    while at < end:
        length, kind = unpack(buffer, at)
        if length < 4:
            break
        found[kind & _TYPE_MASK] = buffer[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def as_int(payload: bytes | None, default: int = 0) -> int:
    """Return an unsigned attribute of any width in the machine's order."""
    return int.from_bytes(payload, "little" if struct.pack("=H", 1)[0] else "big") if payload else default


def as_text(payload: bytes | None) -> str:
    """Return a string attribute without its closing zero; an absent one is empty."""
    return payload.rstrip(b"\0").decode(errors="replace") if payload else ""


class Socket:
    """One netlink socket of the network namespace the calling thread is in. Not for two threads at once."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, protocol)
        self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, _PATIENCE)
        for option in (_CAP_ACK, _EXT_ACK, _STRICT) if protocol == NETLINK_ROUTE else (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The port that the kernel gave this socket: events name it as the cause of what its requests did."""
        if not self._socket.getsockname()[0]:
            self._socket.bind((0, 0))
        return int(self._socket.getsockname()[0])

    def request(self, kind: int, flags: int, body: bytes, what: str = "") -> None:
        """Send one request and wait for its acknowledgement. Raise `NetlinkError`; `what` says what was tried."""
        error = self.batch([(kind, flags, body)])[0]
        if error is not None:
            raise _named(error, what)

    def batch(self, messages: Sequence[Message]) -> list[NetlinkError | None]:
        """Send all requests in one datagram; return each one's error or None. One's failure does not stop the rest."""
        first = self._sequence + 1
        self._socket.send(b"".join(self._frame(kind, flags | ACK, body) for kind, flags, body in messages))
        return self._answers(first, messages)

    def transaction(self, subsystem: int, messages: Sequence[Message]) -> list[NetlinkError | None]:
        """Send requests to a part of netfilter that does all of them or none; return each one's error or None."""
        around = struct.pack("!BBH", 0, 0, subsystem)
        begin = self._frame(_BATCH_BEGIN, 0, around)
        first = self._sequence + 1
        framed = b"".join(self._frame(kind, flags | ACK, body) for kind, flags, body in messages)
        datagram = begin + framed + self._frame(_BATCH_END, 0, around)
        for option, size in ((_SNDBUFFORCE, len(datagram)), (_RCVBUFFORCE, len(messages) * _ANSWER_BYTES)):
            if size > _BUFFER_BYTES:
                self._socket.setsockopt(_socket.SOL_SOCKET, option, size)  # the kernel doubles it for its own needs
        self._socket.send(datagram)
        return self._answers(first, messages)

    def _answers(self, first: int, messages: Sequence[Message]) -> list[NetlinkError | None]:
        answers: list[NetlinkError | None] = [None] * len(messages)
        waiting = len(messages)
        while waiting:
            for kind, flags, sequence, body in self._receive():
                if kind == _NLMSG_ERROR and 0 <= sequence - first < len(messages):
                    answers[sequence - first] = _error(flags, body)
                    waiting -= 1
        return answers

    def get(self, kind: int, body: bytes, what: str = "", absent: Sequence[int] = ()) -> bytes | None:
        """Send a request that has one answer, and return the answer's body; None for the error numbers in `absent`."""
        self._socket.send(self._frame(kind, 0, body))
        while True:
            for answer, flags, sequence, reply in self._receive():
                if sequence != self._sequence:
                    continue
                if answer != _NLMSG_ERROR:
                    return reply
                error = _error(flags, reply)
                if error is None or (error.errno or 0) in absent:
                    return None
                raise _named(error, what)

    def dump(self, kind: int, body: bytes, what: str = "", flags: int = 0) -> list[bytes]:
        """Return the bodies of a dump. An interrupted one, whose content may be inconsistent, is asked for again."""
        for _ in range(_DUMP_TRIES):
            bodies, interrupted = self._dump_once(kind, body, what, flags)
            if not interrupted:
                return bodies
        raise NetlinkError(errno.EINTR, f"{what or 'netlink dump'}: interrupted {_DUMP_TRIES} times by changes")

    def _dump_once(self, kind: int, body: bytes, what: str, flags: int) -> tuple[list[bytes], bool]:
        self._socket.send(self._frame(kind, DUMP | flags, body))
        bodies: list[bytes] = []
        interrupted = False
        while True:
            for answer, answer_flags, sequence, reply in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(answer_flags & _DUMP_INTR)
                if answer == _NLMSG_DONE:
                    code = struct.unpack_from("=i", reply)[0] if len(reply) >= 4 else 0
                    if code < 0 and not interrupted:
                        raise _named(NetlinkError(-code, os.strerror(-code)), what)
                    return bodies, interrupted
                if answer == _NLMSG_ERROR:
                    error = _error(answer_flags, reply)
                    if error is None:
                        return bodies, interrupted
                    if error.errno in (errno.EINTR, errno.EAGAIN):
                        return bodies, True
                    raise _named(error, what)
                bodies.append(reply)

    def _frame(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return _HEADER.pack(16 + len(body), kind, flags | REQUEST, self._sequence, 0) + body + b"\0" * (-len(body) & 3)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(1 << 16)
        at = 0
        while at + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            if length < 16:
                return
            yield kind, flags, sequence, data[at + 16 : at + length]
            at += (length + 3) & ~3


def _error(flags: int, body: bytes) -> NetlinkError | None:
    """Return what an NLMSG_ERROR says; None is an acknowledgement."""
    (code,) = struct.unpack_from("=i", body)
    if code == 0:
        return None
    said = ""
    if flags & _ACK_TLVS:
        offset = 4 + 16
        if not flags & 0x100:  # NLM_F_CAPPED: else the whole request is quoted
            (quoted,) = struct.unpack_from("=I", body, 4)
            offset = 4 + ((quoted + 3) & ~3)
        said = as_text(attributes(body[offset:]).get(1))
    return NetlinkError(-code, os.strerror(-code) + (f" ({said})" if said else ""))


def _named(error: NetlinkError, what: str) -> NetlinkError:
    return NetlinkError(error.errno, f"{what}: {error.strerror}") if what else error
