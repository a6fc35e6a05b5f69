"""Traffic control as pod bandwidth needs it: a token bucket on a link, redirection of what enters one to another.

Constants: linux/rtnetlink.h, pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from pynet.kernel import netlink
from pynet.kernel.netlink import attr, nest, text, u32

NEWQDISC, DELQDISC, GETQDISC = 36, 37, 38
NEWFILTER, GETFILTER = 44, 46
ROOT, INGRESS = 0xFFFFFFFF, 0xFFFFFFF1
LATENCY_MS = 25
_ETH_ALL = 0x0300  # ETH_P_ALL in network order, as tcm_info holds it
_TCMSG = struct.Struct("=BxxxiIII")
_TICKS = "/proc/net/psched"


class Bucket(NamedTuple):
    """A token bucket: rate in bytes a second, burst and queue limit in bytes."""

    rate: int
    burst: int
    limit: int


def bucket(rate: int, burst: int) -> Bucket:
    """Return the bucket for a rate and burst in bits: what waits is sent within 25 ms. Pure."""
    rate_bytes, burst_bytes = max(rate // 8, 1), max(burst // 8, 1)
    return Bucket(rate_bytes, burst_bytes, min(rate_bytes * LATENCY_MS // 1000 + burst_bytes, (1 << 32) - 1))


def grain(rate: int) -> int:
    """Return the bytes in one tick, to which the kernel rounds a bucket's depth, for a rate in bytes a second."""
    return _nanoseconds_per_tick() * rate // 1_000_000_000


def deepest(rate: int) -> int:
    """Return the deepest bucket, in bytes, whose depth the kernel can tell for a rate in bytes a second."""
    return 0xFFFFFFFF * _nanoseconds_per_tick() * rate // 1_000_000_000


def set_bucket(sock: netlink.Socket, ifindex: int, shape: Bucket) -> None:
    """Put a token bucket at a link's root, in place of what was there. Raise `NetlinkError`."""
    rate = struct.pack("=BBHhHI", 0, 1, 0, 0, 0, min(shape.rate, 0xFFFFFFFF))
    buffer = min(int(shape.burst * 1_000_000_000 / shape.rate) // _nanoseconds_per_tick(), 0xFFFFFFFF)
    parameters = rate + bytes(12) + struct.pack("=III", shape.limit, buffer, 0)
    options = [attr(1, parameters), u32(6, min(shape.burst, 0xFFFFFFFF))]
    if shape.rate > 0xFFFFFFFF:
        options.append(attr(4, struct.pack("=Q", shape.rate)))
    body = _TCMSG.pack(0, ifindex, 0x00010000, ROOT, 0) + text(1, "tbf") + nest(2, *options)
    sock.request(NEWQDISC, netlink.CREATE | netlink.REPLACE, body, "token bucket")


def redirect_ingress(sock: netlink.Socket, ifindex: int, target: int) -> None:
    """Send all that enters a link through another link first (an ifb, which then shapes it). Raise `NetlinkError`."""
    body = _TCMSG.pack(0, ifindex, 0xFFFF0000, INGRESS, 0) + text(1, "ingress")
    sock.request(NEWQDISC, netlink.CREATE | netlink.EXCL, body, "ingress queue")
    mirred = struct.pack("=IIiiiiI", 0, 0, 4, 0, 0, 1, target)  # action stolen; egress redirect
    action = nest(1, text(1, "mirred"), nest(2, attr(2, mirred)))
    # u32 with one key that always matches: every kernel with tc has it, matchall not
    selector = struct.pack("=BBBxHHhhI", 1, 0, 1, 0, 0, 0, 0, 0) + struct.pack("=IIii", 0, 0, 0, 0)
    options = nest(2, nest(7, action), attr(5, selector))
    body = _TCMSG.pack(0, ifindex, 0, 0xFFFF0000, (1 << 16) | _ETH_ALL) + text(1, "u32") + options
    sock.request(NEWFILTER, netlink.CREATE | netlink.EXCL, body, "redirection to the intermediate device")


def buckets(sock: netlink.Socket, ifindex: int) -> list[Bucket]:
    """Return the token buckets at a link's root."""
    found = []
    for reply in sock.dump(GETQDISC, _TCMSG.pack(0, ifindex, 0, 0, 0), "list of queues"):
        _, index, _, parent, _ = _TCMSG.unpack_from(reply)
        here = netlink.attributes(reply[20:])
        if index != ifindex or parent != ROOT or netlink.as_text(here.get(1)) != "tbf":
            continue
        options = netlink.attributes(here.get(2, b""))
        (rate,) = struct.unpack_from("=I", options[1], 8)
        limit, buffer = struct.unpack_from("=II", options[1], 24)
        rate = netlink.as_int(options.get(4), rate)
        found.append(Bucket(rate, round(buffer * _nanoseconds_per_tick() * rate / 1_000_000_000), limit))
    return found


def redirects(sock: netlink.Socket, ifindex: int) -> bool:
    """Say whether a link has a filter on what enters it."""
    try:
        return bool(sock.dump(GETFILTER, _TCMSG.pack(0, ifindex, 0, 0xFFFF0000, 0), "list of filters"))
    except netlink.NetlinkError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        raise


def _nanoseconds_per_tick() -> int:
    """Return the length of the unit in which the kernel tells a bucket's depth."""
    with open(_TICKS) as file:
        return max(int(file.read().split()[1], 16), 1)
