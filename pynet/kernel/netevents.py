"""Word of changes to links, addresses, routes and neighbours, as the kernel sends it. Knows no consumer.

Says what kind of thing changed and where; what it is now is asked through `routes`.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import msgspec

from pynet.kernel import netlink
from pynet.netstate import MAIN_TABLE

_NEWLINK, _DELLINK, _NEWADDR, _DELADDR = 16, 17, 20, 21
_NEWROUTE, _DELROUTE, _NEWNEIGH, _DELNEIGH = 24, 25, 28, 29
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port of the cause
_RTA_DST, _RTA_TABLE = 1, 15
_NDA_DST, _NDA_LLADDR = 1, 2
_AF_BRIDGE = 7
_RTM_F_CLONED = 0x200
_SCOPE_LINK = 253
_SO_RCVBUFFORCE = 33
_PAUSE = 1.0  # seconds after an error that is no overrun


class Event(msgspec.Struct, frozen=True):
    """Something changed. `what`: link, address, route, neighbour, or lost (events were dropped: look at all of it).

    `gone`: it was deleted. `index`: the link. `protocol`, `dst`: of a route of the main table. `mac`, `remote`: of a
    VXLAN device's forwarding entry.
    """

    what: str
    gone: bool = False
    index: int = 0
    protocol: int = 0
    dst: str = ""
    mac: str = ""
    remote: str = ""


_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400  # link, neighbour, IPv4 address and route, IPv6 address and route
_EVENTS = {
    _NEWLINK: "link", _DELLINK: "link", _NEWADDR: "address", _DELADDR: "address",
    _NEWROUTE: "route", _DELROUTE: "route", _NEWNEIGH: "neighbour", _DELNEIGH: "neighbour",
}  # fmt: skip


class Watch:
    """Listens to the kernel's word of changes, from its making on."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        self._socket.bind((0, _GROUPS))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def run(self, deliver: Callable[[Event], None], own_port: int, stop: threading.Event) -> None:
        """Deliver changes that others than `own_port` made, until `stop` is set. Never ends for an error."""
        self._socket.settimeout(0.5)
        while not stop.is_set():
            try:
                data = self._socket.recv(1 << 18)
            except TimeoutError:
                continue
            except OSError as error:
                deliver(Event("lost"))
                if error.errno != errno.ENOBUFS:
                    stop.wait(_PAUSE)
                continue
            for event in _events(data, own_port):
                deliver(event)


def _events(data: bytes, own_port: int) -> Iterator[Event]:
    at = 0
    while at + 16 <= len(data):
        length, kind, _, _, port = _HEADER.unpack_from(data, at)
        if length < 16:
            return
        if kind in _EVENTS and port != own_port:
            event = _event(kind, data[at + 16 : at + length])
            if event is not None:
                yield event
        at += (length + 3) & ~3


def _event(kind: int, body: bytes) -> Event | None:
    what = _EVENTS[kind]
    gone = kind in (_DELLINK, _DELADDR, _DELROUTE, _DELNEIGH)
    if what == "link":
        return Event(what, gone, struct.unpack_from("=4xi", body)[0])
    if what == "neighbour":
        family, index = struct.unpack_from("=B3xi", body)
        if family != _AF_BRIDGE:
            return Event(what, gone, index)
        attributes = netlink.attributes(body[12:])
        remote = attributes.get(_NDA_DST, b"")
        remote_family = socket.AF_INET if len(remote) == 4 else socket.AF_INET6
        shown = socket.inet_ntop(remote_family, remote) if remote else ""
        return Event(what, gone, index, mac=attributes.get(_NDA_LLADDR, b"").hex(":"), remote=shown)
    if what == "address":
        family, scope, index = struct.unpack_from("=BxxBI", body)
        return None if family == socket.AF_INET6 and scope == _SCOPE_LINK else Event(what, gone, index)
    family, length, table, protocol, flags = struct.unpack_from("=BBxxBBxxI", body)
    attributes = netlink.attributes(body[12:])
    if netlink.as_int(attributes.get(_RTA_TABLE), table) != MAIN_TABLE or flags & _RTM_F_CLONED:
        return None
    dst = attributes.get(_RTA_DST, b"\0" * (4 if family == socket.AF_INET else 16))
    return Event(what, gone, 0, protocol, f"{socket.inet_ntop(family, dst)}/{length}")
