"""Connection tracking over netlink (nfnetlink's ctnetlink): tracked flows out, deletions in.

Knows message layouts (linux/netfilter/nfnetlink_conntrack.h) and no policy. A dump is read with fixed offsets: the
kernel writes both tuples first and in one form; an entry in another form (a zone of its own) is passed over.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterable, Iterator

import msgspec

NETLINK_NETFILTER = 12
_GET, _DELETE = (1 << 8) | 1, (1 << 8) | 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 0x2, 0x3
_ENOENT = 2
_HEADER = struct.Struct("=IHHII")
_LENGTH = struct.Struct("=H")
_BUFFER = 1 << 20
_AT_ONCE = 200
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
# a tuple: its attribute header, {addresses {source, destination}, protocol {number, source port, destination port}}
_TUPLE = {
    socket.AF_INET: struct.Struct(">4x4x4x4s4x4s4x4xB3x4xH2x4xH2x"),
    socket.AF_INET6: struct.Struct(">4x4x4x16s4x16s4x4xB3x4xH2x4xH2x"),
}


class ConntrackError(OSError):
    """The kernel refused; the message says what was asked."""


class Flow(msgspec.Struct, frozen=True):
    """A tracked flow: what the client sent to, and who answers. `handle`: for `delete`."""

    protocol: str
    source: str
    source_port: int
    destination: str
    port: int
    answers: str
    answers_port: int
    handle: bytes = b""


def flows(protocols: Collection[str], version: int) -> Iterator[Flow]:
    """Yield the tracked flows of `protocols` (TCP, UDP, SCTP) in IP `version` 4 or 6. Raise `ConntrackError`."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    wanted = {PROTOCOLS[name]: name for name in protocols}
    layout = _TUPLE[family]
    size = layout.size
    with _socket() as sock:
        sock.send(_message(_GET, _REQUEST | _DUMP, family, b""))
        while True:
            data = memoryview(sock.recv(_BUFFER))
            at = 0
            while at < len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise _error("reading the flows", data, at)
                # the headers of a message and of nfnetlink are 20 bytes, and the protocol's number is 20 bytes before
                # the end of the first tuple
                if (
                    length >= 20 + 2 * size
                    and data[at + size] in wanted
                    and _LENGTH.unpack_from(data, at + 20)[0] == size
                    and _LENGTH.unpack_from(data, at + 20 + size)[0] == size
                ):
                    first = layout.unpack_from(data, at + 20)
                    second = layout.unpack_from(data, at + 20 + size)
                    yield Flow(
                        wanted[first[2]],
                        socket.inet_ntop(family, first[0]),
                        first[3],
                        socket.inet_ntop(family, first[1]),
                        first[4],
                        socket.inet_ntop(family, second[0]),
                        second[3],
                        bytes([family]) + bytes(data[at + 20 : at + 20 + size]),
                    )
                at += (length + 3) & ~3


def delete(gone: Iterable[Flow]) -> int:
    """Delete flows; return how many were still there. Raise `ConntrackError`."""
    handles = [flow.handle for flow in gone]
    count = 0
    with _socket() as sock:
        for start in range(0, len(handles), _AT_ONCE):
            group = handles[start : start + _AT_ONCE]
            sock.send(b"".join(_message(_DELETE, _REQUEST | _ACK, handle[0], handle[1:]) for handle in group))
            answered = 0
            while answered < len(group):
                data = memoryview(sock.recv(_BUFFER))
                at = 0
                while at < len(data):
                    length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                    if kind == _ERROR:
                        answered += 1
                        code = -struct.unpack_from("=i", data, at + 16)[0]
                        if code not in (0, _ENOENT):
                            raise _error("deleting a flow", data, at)
                        count += code == 0
                    at += (length + 3) & ~3
    return count


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    sock.bind((0, 0))
    sock.settimeout(30)
    return sock


def _message(kind: int, flags: int, family: int, attributes: bytes) -> bytes:
    body = struct.pack("=BBH", family, 0, 0) + attributes
    return _HEADER.pack(16 + len(body), kind, flags, 0, 0) + body


def _error(what: str, data: memoryview, at: int) -> ConntrackError:
    code = -struct.unpack_from("=i", data, at + 16)[0]
    return ConntrackError(code, f"conntrack: {what}: error {code}")
