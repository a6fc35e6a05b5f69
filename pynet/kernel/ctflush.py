"""Deletes conntrack entries of an address or UDP port that changes hands. Standard library only, unlike `conntrack`.

Constants: linux/netfilter/nfnetlink_conntrack.h. The kernel filters the dump (5.8); what it returns is compared again.
"""

from __future__ import annotations

import _socket
import errno
import struct
from collections.abc import Callable
from functools import partial

from pynet.kernel import netlink, sysctl
from pynet.kernel.netlink import attr, nest, u8, u32

_NEW, _GET, _DELETE = 0x100, 0x101, 0x102  # subsystem 1, messages 0, 1, 2
_ORIGINAL, _REPLY, _FILTER, _ZONE = 1, 2, 25, 18
_FILTER_SOURCE, _FILTER_PROTOCOL, _FILTER_DPORT = 1 << 0, 1 << 3, 1 << 5
UDP = 17


def address(packed: bytes) -> int:
    """Delete the flows that an address takes part in, translated or not; return how many there were."""
    if not _any():
        return 0
    family = _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6
    source = nest(1, attr(1 if len(packed) == 4 else 3, packed))
    deleted = 0
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        for side, flags in ((_ORIGINAL, 1), (_REPLY, 2)):
            body = _header(family) + nest(side, source) + nest(_FILTER, u32(flags, _FILTER_SOURCE))
            deleted += _delete(sock, family, body, partial(_from, side, packed))
    return deleted


def udp_port(port: int, family: int) -> int:
    """Delete the UDP flows towards a port of this host, of one address family (AF_INET, AF_INET6); return how many."""
    if not _any():
        return 0
    tuple_ = nest(2, u8(1, UDP), attr(3, struct.pack("!H", port)))
    flags = nest(_FILTER, u32(1, _FILTER_PROTOCOL | _FILTER_DPORT))
    with netlink.Socket(netlink.NETLINK_NETFILTER) as sock:
        return _delete(
            sock,
            family,
            _header(family) + nest(_ORIGINAL, tuple_) + flags,
            lambda flow: _destination(flow) == (UDP, port),
        )


def _any() -> bool:
    """Say whether this namespace tracks anything at all."""
    return sysctl.read("net/netfilter/nf_conntrack_count") not in (None, "0")


def _header(family: int) -> bytes:
    return struct.pack("!BBH", family, 0, 0)


def _delete(sock: netlink.Socket, family: int, body: bytes, wanted: Callable[[dict[int, bytes]], bool]) -> int:
    found = [netlink.attributes(reply[4:]) for reply in sock.dump(_GET, body, "list of connections")]
    messages = []
    for flow in found:
        if wanted(flow):
            zone = attr(_ZONE, flow[_ZONE]) if _ZONE in flow else b""
            messages.append((_DELETE, 0, _header(family) + attr(_ORIGINAL | 0x8000, flow[_ORIGINAL]) + zone))
    for at in range(0, len(messages), 100):
        for error in sock.batch(messages[at : at + 100]):
            if error is not None and error.errno != errno.ENOENT:
                raise error
    return len(messages)


def _from(side: int, packed: bytes, flow: dict[int, bytes]) -> bool:
    inner = netlink.attributes(netlink.attributes(flow.get(side, b"")).get(1, b""))
    return packed in (inner.get(1), inner.get(3))


def _destination(flow: dict[int, bytes]) -> tuple[int, int]:
    inner = netlink.attributes(netlink.attributes(flow.get(_ORIGINAL, b"")).get(2, b""))
    return netlink.as_int(inner.get(1)), int.from_bytes(inner.get(3, b""), "big")
