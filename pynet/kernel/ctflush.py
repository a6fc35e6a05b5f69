"""Deletes conntrack entries of an address or UDP port that changes hands. Standard library only, unlike `conntrack`.

Constants: linux/netfilter/nfnetlink_conntrack.h. The kernel filters the dump (5.8); what it returns is compared again.
"""

from __future__ import annotations

import _socket
import errno
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pynet.kernel import netlink, sysctl
from pynet.kernel.netlink import attr, nest, u8, u32

_NEW, _GET, _DELETE = 0x100, 0x101, 0x102  # subsystem 1, messages 0, 1, 2
_ORIGINAL, _REPLY, _FILTER, _ZONE = 1, 2, 25, 18
_FILTER_SOURCE, _FILTER_PROTOCOL, _FILTER_DPORT = 1 << 0, 1 << 3, 1 << 5
UDP = 17
_FEW = 4096
"""Flows of which all are looked at: the kernel takes 6 ms to walk its table, however little it is asked for."""


def flush(addresses: Sequence[bytes], udp_ports: Sequence[tuple[int, int]] = ()) -> int:
    """Delete the flows of addresses (packed), translated or not, and those towards UDP ports of this host.

    A port comes with its address family. Return how many flows there were.
    """
    tracked = int(sysctl.read("net/netfilter/nf_conntrack_count") or 0)
    wishes = [*map(_of_address, addresses), *(_of_port(*each) for each in udp_ports)]
    if not tracked or not wishes:
        return 0
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        if tracked <= _FEW:
            replies = sock.dump(_GET, _header(0), "list of connections")
            return _delete(sock, [reply for wish in wishes for reply in replies if wish.concerns(reply)])
        found = [
            reply
            for wish in wishes
            for question in wish.questions
            for reply in sock.dump(_GET, question, "list of connections")
            if wish.concerns(reply)
        ]
        return _delete(sock, found)


class _Wish(NamedTuple):
    """Which flows are to go: how the kernel is asked for them, bytes that they hold, and what decides."""

    questions: tuple[bytes, ...]
    holds: bytes
    decides: Callable[[dict[int, bytes]], bool]

    def concerns(self, reply: bytes) -> bool:
        """Say whether a flow is meant; most are ruled out without being parsed."""
        return self.holds in reply and self.decides(netlink.attributes(reply[4:]))


def _of_address(packed: bytes) -> _Wish:
    family = _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6
    source = nest(1, attr(1 if len(packed) == 4 else 3, packed))
    questions = tuple(
        _header(family) + nest(side, source) + nest(_FILTER, u32(flags, _FILTER_SOURCE))
        for side, flags in ((_ORIGINAL, 1), (_REPLY, 2))
    )
    return _Wish(questions, packed, lambda flow: any(_source(flow, side) == packed for side in (_ORIGINAL, _REPLY)))


def _of_port(port: int, family: int) -> _Wish:
    destination = attr(3, struct.pack("!H", port))
    flags = nest(_FILTER, u32(1, _FILTER_PROTOCOL | _FILTER_DPORT))
    question = _header(family) + nest(_ORIGINAL, nest(2, u8(1, UDP), destination)) + flags
    length = 4 if family == _socket.AF_INET else 16
    return _Wish(
        (question,), destination,
        lambda flow: _destination(flow) == (UDP, port) and len(_source(flow, _ORIGINAL)) == length,
    )  # fmt: skip


def _header(family: int) -> bytes:
    return struct.pack("!BBH", family, 0, 0)


def _delete(sock: netlink.Socket, replies: Sequence[bytes]) -> int:
    messages = []
    for reply in dict.fromkeys(replies):
        flow = netlink.attributes(reply[4:])
        zone = attr(_ZONE, flow[_ZONE]) if _ZONE in flow else b""
        messages.append((_DELETE, 0, _header(reply[0]) + attr(_ORIGINAL | 0x8000, flow[_ORIGINAL]) + zone))
    for at in range(0, len(messages), 100):
        for error in sock.batch(messages[at : at + 100]):
            if error is not None and error.errno != errno.ENOENT:
                raise error
    return len(messages)


def _source(flow: dict[int, bytes], side: int) -> bytes:
    inner = netlink.attributes(netlink.attributes(flow.get(side, b"")).get(1, b""))
    return inner.get(1) or inner.get(3) or b""


def _destination(flow: dict[int, bytes]) -> tuple[int, int]:
    inner = netlink.attributes(netlink.attributes(flow.get(_ORIGINAL, b"")).get(2, b""))
    return netlink.as_int(inner.get(1)), int.from_bytes(inner.get(3, b""), "big")
