"""Links, bridges and their ports, addresses, routes, neighbours: rtnetlink messages and what the kernel answers.

Numbers are those of linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h. Every function takes the socket of the
namespace it is meant for.
"""

from __future__ import annotations

import _socket
import errno
import struct
from typing import NamedTuple

from pynet.kernel import netlink
from pynet.kernel.netlink import attr, nest, text, u8, u16, u32

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30

IFF_UP, IFF_PROMISC = 0x1, 0x100
OPER_UP = 6
AF_BRIDGE = 7
MAIN_TABLE = 254
PROTO_BOOT = 3
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
NUD_REACHABLE, NUD_PERMANENT = 0x02, 0x80
F_NODAD, F_DADFAILED, F_TENTATIVE = 0x02, 0x08, 0x40
_EXT_BRVLAN, _EXT_SKIP_STATS = 2, 8
_ARP_NOTIFY = 22  # IPV4_DEVCONF_ARP_NOTIFY
_ADDR_GEN_MODE, _EUI64, _NONE = 8, 0, 1  # IFLA_INET6_ADDR_GEN_MODE

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_NDMSG = struct.Struct("=BxxxiHBB")


class Link(NamedTuple):
    """One link as the kernel shows it. `peer` is the other end's index of a veth, in its own namespace.

    `vlan_filtering` is None for a bridge of a kernel without it.
    """

    ifindex: int
    name: str
    kind: str
    mac: str
    mtu: int
    flags: int
    master: int
    operstate: int
    alias: str
    peer: int
    hairpin: bool
    isolated: bool
    promiscuity: int
    group: int
    vlan_filtering: bool | None = None
    peer_netns: int | None = None
    """Our number for the namespace that a veth's other end is in, where that is not our own."""

    @property
    def up(self) -> bool:
        """Whether it is administratively up."""
        return bool(self.flags & IFF_UP)


class Address(NamedTuple):
    """One address of a link, packed, with its prefix length and IFA_F flags."""

    ifindex: int
    packed: bytes
    prefix: int
    flags: int
    scope: int


class Route(NamedTuple):
    """One route. Empty `dst` with prefix 0 is the default; zero metrics are unset."""

    dst: bytes
    prefix: int
    gateway: bytes
    oif: int
    table: int = MAIN_TABLE
    priority: int = 0
    scope: int = 0
    mtu: int = 0
    advmss: int = 0
    protocol: int = PROTO_BOOT
    onlink: bool = False


def mac_bytes(mac: str) -> bytes:
    """Return a hardware address's six bytes."""
    return bytes.fromhex(mac.replace(":", "").replace("-", ""))


def mac_text(packed: bytes) -> str:
    """Return a hardware address as pairs of digits."""
    return ":".join(f"{byte:02x}" for byte in packed)


def _family(packed: bytes) -> int:
    return _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6


# --- links


def link_named(sock: netlink.Socket, name: str) -> Link | None:
    """Return the link of this name, or None."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + text(3, name) + u32(29, _EXT_SKIP_STATS)
    reply = sock.get(GETLINK, body, f"link {name}", absent=(errno.ENODEV,))
    return None if reply is None else _link(reply)


def index_of(name: str) -> int:
    """Return the index of a link of the calling thread's namespace, 0 without one; waits for nobody's changes.

    For names that most likely are there: over a missing one the kernel asks for a module (dev_load).
    """
    try:
        return _socket.if_nametoindex(name)
    except OSError:
        return 0


def is_listed(index: int) -> bool:
    """Say whether the calling thread's namespace has a link of this index; waits for nobody's changes."""
    try:
        _socket.if_indextoname(index)
    except OSError:
        return False
    return True


def link_at(sock: netlink.Socket, index: int) -> Link | None:
    """Return the link of this index, or None."""
    body = _IFINFO.pack(0, 0, index, 0, 0) + u32(29, _EXT_SKIP_STATS)
    reply = sock.get(GETLINK, body, f"link {index}", absent=(errno.ENODEV,))
    return None if reply is None else _link(reply)


def links(sock: netlink.Socket, *, master: int = 0, kind: str = "") -> list[Link]:
    """Return all links, or those of one master or one kind (filtered in the kernel)."""
    body = _IFINFO.pack(0, 0, 0, 0, 0) + u32(29, _EXT_SKIP_STATS)
    if master:
        body += u32(10, master)
    if kind:
        body += nest(18, text(1, kind))
    return [_link(reply) for reply in sock.dump(GETLINK, body, "list of links")]


def _link(reply: bytes) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(reply)
    found = netlink.attributes(reply[16:])
    info = netlink.attributes(found.get(18, b""))
    port = netlink.attributes(info.get(5, b"")) if netlink.as_text(info.get(4)) == "bridge" else {}
    data = netlink.attributes(info.get(2, b"")) if netlink.as_text(info.get(1)) == "bridge" else {}
    return Link(
        ifindex=index,
        name=netlink.as_text(found.get(3)),
        kind=netlink.as_text(info.get(1)),
        mac=mac_text(found.get(1, b"")),
        mtu=netlink.as_int(found.get(4)),
        flags=flags,
        master=netlink.as_int(found.get(10)),
        operstate=netlink.as_int(found.get(16)),
        alias=netlink.as_text(found.get(20)),
        peer=netlink.as_int(found.get(5)),
        hairpin=bool(netlink.as_int(port.get(4))),
        isolated=bool(netlink.as_int(port.get(33))),
        promiscuity=netlink.as_int(found.get(30)),
        group=netlink.as_int(found.get(27)),
        vlan_filtering=bool(netlink.as_int(data[7])) if 7 in data else None,
        peer_netns=netlink.as_int(found[37]) if 37 in found else None,
    )


def add_bridge(sock: netlink.Socket, name: str, mac: str, mtu: int = 0, *, vlan_filtering: bool = False) -> None:
    """Make a bridge that is up; its address, once set, no longer follows its ports. Raise `NetlinkError`."""
    body = _IFINFO.pack(0, 0, 0, IFF_UP, IFF_UP) + text(3, name) + attr(1, mac_bytes(mac))
    if mtu:
        body += u32(4, mtu)
    data = [nest(2, u8(7, 1))] if vlan_filtering else []
    body += nest(18, text(1, "bridge"), *data)
    sock.request(NEWLINK, netlink.CREATE | netlink.EXCL, body, f"bridge {name}")


def add_veth(
    sock: netlink.Socket, host: str, peer: str, peer_netns: int, *,
    master: int = 0, mtu: int = 0, mac: str = "", alias: str = "", hairpin: bool = False, isolated: bool = False,
    host_mac: str = "",
) -> None:  # fmt: skip
    """Make a veth pair with both ends where they belong: `host` here, up, under `master`; `peer`, down, there.

    One datagram, so that no kill comes between: the kernel takes neither alias nor port settings at creation. The peer
    cannot be made up: the kernel answers ENOTCONN (veth_open). A port needs no IPv6 address, and gets none.
    """
    end = _IFINFO.pack(0, 0, 0, 0, 0) + text(3, peer) + u32(28, peer_netns)
    body = _IFINFO.pack(0, 0, 0, IFF_UP, IFF_UP) + text(3, host)
    if mtu:
        end += u32(4, mtu)
        body += u32(4, mtu)
    if mac:
        end += attr(1, mac_bytes(mac))
    if host_mac:
        body += attr(1, mac_bytes(host_mac))
    if master:
        body += u32(10, master)
    body += nest(18, text(1, "veth"), nest(2, attr(1, end)))
    settings = _IFINFO.pack(0, 0, 0, 0, 0) + text(3, host) + attr(20, alias.encode()[:255])
    port = [u8(kind, 1) for kind, wanted in ((4, hairpin), (33, isolated)) if wanted]
    if port:
        settings += nest(18, text(4, "bridge"), nest(5, *port))
    local = _IFINFO.pack(0, 0, 0, 0, 0) + text(3, host) + _generation(_NONE)
    make = (NEWLINK, netlink.CREATE | netlink.EXCL, body)
    made, set_up, _ = sock.batch([make, (NEWLINK, 0, settings), (NEWLINK, 0, local)])  # the last fails without IPv6
    for error in (made, set_up):
        if error is not None:
            raise netlink.NetlinkError(error.errno, f"veth {host}: {error.strerror}")


def add_link(
    sock: netlink.Socket, name: str, kind: str, *, alias: str = "", up: bool = True, mtu: int = 0, link: int = 0,
    mac: str = "",
) -> None:  # fmt: skip
    """Make a link that needs nothing but its kind, such as an ifb or a dummy."""
    body = _IFINFO.pack(0, 0, 0, IFF_UP if up else 0, IFF_UP if up else 0) + text(3, name)
    if mtu:
        body += u32(4, mtu)
    if link:
        body += u32(5, link)
    if mac:
        body += attr(1, mac_bytes(mac))
    settings = _IFINFO.pack(0, 0, 0, 0, 0) + text(3, name) + attr(20, alias.encode()[:255])
    made, set_up = sock.batch(
        [(NEWLINK, netlink.CREATE | netlink.EXCL, body + nest(18, text(1, kind))), (NEWLINK, 0, settings)]
    )
    for error in (made, set_up):
        if error is not None:
            raise netlink.NetlinkError(error.errno, f"{kind} {name}: {error.strerror}")


def set_link(index: int, **changes: int | str | bool) -> netlink.Message:
    """Return the request that changes a link: up, promisc, mtu, mac, master, group, alias, name, hairpin, isolated.

    `arp_notify`: whether it announces its IPv4 addresses when it goes up; `link_local`: whether the kernel gives it an
    IPv6 one, then (EAFNOSUPPORT where it has no IPv6).
    """
    flags = mask = 0
    for key, bit in (("up", IFF_UP), ("promisc", IFF_PROMISC)):
        if key in changes:
            mask |= bit
            flags |= bit if changes[key] else 0
    body = _IFINFO.pack(0, 0, index, flags, mask)
    for key, kind in (("mtu", 4), ("master", 10), ("group", 27)):
        if key in changes:
            body += u32(kind, int(changes[key]))
    if "mac" in changes:
        body += attr(1, mac_bytes(str(changes["mac"])))
    if "alias" in changes:
        body += attr(20, str(changes["alias"]).encode()[:255])
    if "name" in changes:
        body += text(3, str(changes["name"]))
    port = [u8(kind, int(changes[key])) for key, kind in (("hairpin", 4), ("isolated", 33)) if key in changes]
    if port:
        body += nest(18, text(4, "bridge"), nest(5, *port))
    if "arp_notify" in changes:
        body += nest(26, nest(_socket.AF_INET, nest(1, u32(_ARP_NOTIFY, int(changes["arp_notify"])))))
    if "link_local" in changes:
        body += _generation(_EUI64 if changes["link_local"] else _NONE)
    return NEWLINK, 0, body


def _generation(mode: int) -> bytes:
    """Return the attribute that says how the kernel makes a link's IPv6 link-local address."""
    return nest(26, nest(_socket.AF_INET6, u8(_ADDR_GEN_MODE, mode)))


def delete_link(sock: netlink.Socket, index: int) -> bool:
    """Delete a link; return whether it was there. A veth end takes its peer along; the kernel takes 16 ms for it."""
    error = sock.batch([(DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0))])[0]
    if error is not None and error.errno != errno.ENODEV:
        raise error
    return error is None


def delete_group(sock: netlink.Socket, group: int) -> None:
    """Delete all links of one group together: the kernel waits once, not once a link."""
    error = sock.batch([(DELLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + u32(27, group))])[0]
    if error is not None and error.errno != errno.ENODEV:
        raise error


# --- bridge VLANs


def set_vlan_filtering(sock: netlink.Socket, index: int) -> None:
    """Switch a bridge's VLAN filtering on; a kernel built without it passes over the request."""
    body = _IFINFO.pack(0, 0, index, 0, 0) + nest(18, text(1, "bridge"), nest(2, u8(7, 1)))
    sock.request(NEWLINK, 0, body, "bridge VLAN filtering")


def vlan_request(
    index: int, first: int, last: int, *, add: bool, pvid: bool = False, own: bool = False
) -> netlink.Message:
    """Return the request that adds or removes VLANs of a bridge port, or of the bridge itself (`own`)."""
    flags = (2 | 4 if pvid else 0) | (1 if own else 0)
    if first == last:
        infos = [attr(2, struct.pack("=HH", flags, first))]
    else:
        infos = [attr(2, struct.pack("=HH", flags | 8, first)), attr(2, struct.pack("=HH", flags | 16, last))]
    spec = nest(26, *([u16(0, 1)] if own else []), *infos)
    return (SETLINK if add else DELLINK), 0, _IFINFO.pack(AF_BRIDGE, 0, index, 0, 0) + spec


def vlans(sock: netlink.Socket, index: int) -> dict[int, int]:
    """Return the VLANs of a bridge port with their flags (2 PVID, 4 untagged)."""
    body = _IFINFO.pack(AF_BRIDGE, 0, 0, 0, 0) + u32(29, _EXT_BRVLAN)
    found: dict[int, int] = {}
    for reply in sock.dump(GETLINK, body, "bridge VLANs"):
        if _IFINFO.unpack_from(reply)[2] != index:
            continue
        for kind, payload in netlink.each(netlink.attributes(reply[16:]).get(26, b"")):
            if kind == 2:
                flags, vid = struct.unpack("=HH", payload[:4])
                found[vid] = flags
    return found


# --- addresses


def address_request(
    index: int, packed: bytes, prefix: int, *, flags: int = 0, add: bool = True, broadcast: bool = True
) -> netlink.Message:
    """Return the request that adds or removes one address; adding one that is there is an error (EEXIST)."""
    body = _IFADDR.pack(_family(packed), prefix, flags & 0xFF, 0, index) + attr(2, packed)
    if len(packed) == 4:
        body += attr(1, packed)
        if add and broadcast and prefix < 31:
            last = int.from_bytes(packed, "big") | ((1 << (32 - prefix)) - 1)
            body += attr(4, last.to_bytes(4, "big"))
    else:
        body += attr(1, packed)
    if flags:
        body += u32(8, flags)
    return (NEWADDR, netlink.CREATE | netlink.EXCL, body) if add else (DELADDR, 0, body)


def addresses(sock: netlink.Socket, index: int, family: int = 0) -> list[Address]:
    """Return the addresses of one link, of one family or both."""
    found = []
    for one in (family,) if family else (_socket.AF_INET, _socket.AF_INET6):
        for reply in sock.dump(GETADDR, _IFADDR.pack(one, 0, 0, 0, index), "list of addresses"):
            _, prefix, flags, scope, at = _IFADDR.unpack_from(reply)
            found_here = netlink.attributes(reply[8:])
            packed = found_here.get(2) or found_here.get(1) or b""
            if at == index and packed:
                found.append(Address(at, packed, prefix, netlink.as_int(found_here.get(8), flags), scope))
    return found


def peer_addresses(sock: netlink.Socket, link: Link) -> list[Address]:
    """Return the addresses of a veth's other end, in whatever namespace that is (IFA_TARGET_NETNSID, kernel 4.20)."""
    found = []
    if link.peer_netns is None:
        return []
    for family in (_socket.AF_INET, _socket.AF_INET6):
        body = _IFADDR.pack(family, 0, 0, 0, link.peer) + u32(10, link.peer_netns)
        for reply in sock.dump(GETADDR, body, f"addresses at the other end of {link.name}"):
            _, prefix, flags, scope, at = _IFADDR.unpack_from(reply)
            here = netlink.attributes(reply[8:])
            if at == link.peer and (packed := here.get(2) or here.get(1)):
                found.append(Address(at, packed, prefix, netlink.as_int(here.get(8), flags), scope))
    return found


def all_addresses(sock: netlink.Socket, family: int) -> list[Address]:
    """Return the addresses of all links, in one family."""
    found = []
    for reply in sock.dump(GETADDR, _IFADDR.pack(family, 0, 0, 0, 0), "list of addresses"):
        _, prefix, flags, scope, at = _IFADDR.unpack_from(reply)
        found_here = netlink.attributes(reply[8:])
        if packed := found_here.get(2) or found_here.get(1):
            found.append(Address(at, packed, prefix, netlink.as_int(found_here.get(8), flags), scope))
    return found


# --- routes


def route_request(route: Route, *, add: bool = True, replace: bool = False, append: bool = False) -> netlink.Message:
    """Return the request that adds (EEXIST when there), appends, replaces or removes a route."""
    family = _family(route.dst or route.gateway)
    table = route.table or MAIN_TABLE
    flags = 4 if route.onlink else 0
    body = _RTMSG.pack(
        family, route.prefix, 0, 0, table if table < 256 else 0, route.protocol, route.scope, 1 if add else 0, flags
    )
    if route.prefix:
        body += attr(1, route.dst)
    if route.gateway:
        body += attr(5, route.gateway)
    if route.oif:
        body += u32(4, route.oif)
    body += u32(15, table)
    if route.priority:
        body += u32(6, route.priority)
    metrics = [u32(kind, value) for kind, value in ((2, route.mtu), (8, route.advmss)) if value]
    if metrics:
        body += nest(8, *metrics)
    if not add:
        return DELROUTE, 0, body
    how = netlink.REPLACE if replace else netlink.APPEND if append else netlink.EXCL
    return NEWROUTE, netlink.CREATE | how, body


def routes(sock: netlink.Socket, family: int) -> list[Route]:
    """Return the unicast routes of one family, those of multipath routes one by one."""
    found = []
    for reply in sock.dump(GETROUTE, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), "list of routes"):
        _, prefix, _, _, table, protocol, scope, kind, flags = _RTMSG.unpack_from(reply)
        here = netlink.attributes(reply[12:])
        if kind != 1 or flags & 0x200:  # RTM_F_CLONED
            continue
        metrics = netlink.attributes(here.get(8, b""))
        empty = bytes(4 if family == _socket.AF_INET else 16)
        base = Route(
            dst=here.get(1, empty),
            prefix=prefix,
            gateway=here.get(5, b""),
            oif=netlink.as_int(here.get(4)),
            table=netlink.as_int(here.get(15), table),
            priority=netlink.as_int(here.get(6)),
            scope=scope,
            mtu=netlink.as_int(metrics.get(2)),
            advmss=netlink.as_int(metrics.get(8)),
            protocol=protocol,
            onlink=bool(flags & 4),
        )
        hops = list(_hops(here.get(9, b"")))
        found += [base._replace(gateway=gateway, oif=oif) for gateway, oif in hops] or [base]
    return found


def _hops(multipath: bytes) -> list[tuple[bytes, int]]:
    hops = []
    at = 0
    while at + 8 <= len(multipath):
        length, _, _, index = struct.unpack_from("=HBBi", multipath, at)
        if length < 8:
            break
        hops.append((netlink.attributes(multipath[at + 8 : at + length]).get(5, b""), index))
        at += (length + 3) & ~3
    return hops


# --- neighbours


def neighbour_request(index: int, packed: bytes, mac: str = "", *, add: bool = True) -> netlink.Message:
    """Return the request that sets the hardware address of a neighbour (to be confirmed anew), or forgets it."""
    state = NUD_REACHABLE if add else 0
    body = _NDMSG.pack(_family(packed), index, state, 0, 0) + attr(1, packed)
    if add:
        return NEWNEIGH, netlink.CREATE | netlink.REPLACE, body + attr(2, mac_bytes(mac))
    return DELNEIGH, 0, body


def neighbours(sock: netlink.Socket, index: int, family: int) -> dict[bytes, bytes]:
    """Return a link's neighbours: address to hardware address."""
    found = {}
    body = _NDMSG.pack(family, 0, 0, 0, 0) + u32(8, index)
    for reply in sock.dump(GETNEIGH, body, "list of neighbours"):
        here = netlink.attributes(reply[12:])
        if _NDMSG.unpack_from(reply)[1] == index and 1 in here:
            found[here[1]] = here.get(2, b"")
    return found


def fdb_delete(index: int, mac: str) -> netlink.Message:
    """Return the request that forgets a hardware address learnt on a bridge port."""
    return DELNEIGH, 0, _NDMSG.pack(AF_BRIDGE, index, 0, 4, 0) + attr(2, mac_bytes(mac))
