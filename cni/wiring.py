"""Bridge, veth, addresses and routes of one pod, applied with a few netlink messages. It decides nothing about them."""

from __future__ import annotations

import _socket
import errno
import ipaddress
import os
import time
from typing import NamedTuple

from cni import naming, spec
from cni.netconf import NetConf
from pynet.kernel import netlink, netns, rtnl, sysctl
from pynet.kernel.rtnl import Link

EXFULL = 54
BRIDGE_PORTS = 1023
"""The most ports a Linux bridge has (BR_MAX_PORTS, 10 bits of port number)."""

FORWARDING = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
"""The sysctl of each family that makes the host forward."""

_SETTLE_SECONDS = 5.0
"""How long an address may stay tentative, or a port not forwarding, before ADD fails or gives up waiting."""

IpInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class PodLink(NamedTuple):
    """The two ends of a pod's link: the host's, and the pod's."""

    host: Link
    pod: Link


# --- bridge


def ensure_bridge(host: netlink.Socket, conf: NetConf) -> tuple[Link, bool]:
    """Return the network's bridge, up, and whether this call made it. Raise `CniError`."""
    made = False
    bridge = rtnl.link_named(host, conf.bridge)
    if bridge is None:
        mac = bytes(((os.urandom(1)[0] & 0xFE) | 0x02,)) + os.urandom(5)
        try:
            rtnl.add_bridge(host, conf.bridge, rtnl.mac_text(mac), conf.mtu)
            made = True
        except netlink.NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
        bridge = rtnl.link_named(host, conf.bridge)
    if bridge is None or bridge.kind != "bridge":
        raise spec.CniError(spec.BAD_CONFIG, f"field bridge: {conf.bridge} already exists but is not a bridge")
    if made and has_ipv6(conf.bridge):
        sysctl.write(f"net/ipv6/conf/{conf.bridge}/accept_ra", 0)
    changes: dict[str, int | str | bool] = {}
    if not bridge.up:
        changes["up"] = True
    if conf.promisc and not bridge.flags & rtnl.IFF_PROMISC:
        changes["promisc"] = True
    if changes:
        request(host, rtnl.set_link(bridge.ifindex, **changes), f"bridge {conf.bridge}")
    return bridge, made


def keep_hardware_address(host: netlink.Socket, bridge: Link, port: Link) -> Link:
    """Return a bridge as it is with a new port; if it took over that one's hardware address, it gets its own back.

    It does so while nobody has set its address, and would with every lower one of a later pod.
    """
    now = rtnl.link_at(host, bridge.ifindex)
    if now is None or now.mac == bridge.mac:
        return bridge
    if now.mac != port.mac:
        return now
    request(host, rtnl.set_link(bridge.ifindex, mac=bridge.mac), f"hardware address of {bridge.name}")
    return bridge


def ensure_gateway_addresses(
    host: netlink.Socket, link: Link, wanted: list[IpInterface], *, force: bool, pin: bool
) -> list[IpInterface]:
    """Give a bridge the gateways' addresses; return those that were not there before. Raise `CniError`.

    Setting its own hardware address (`pin`) keeps a bridge from taking the lowest of its ports'.
    """
    present = {
        _interface(a.packed, a.prefix): a
        for family in {_family(address.packed) for address in wanted}
        for a in rtnl.addresses(host, link.ifindex, family)
    }
    missing = [address for address in wanted if address not in present]
    for address in missing:
        for other in list(present):
            if other in wanted or not _excludes(other, address):
                continue
            if not force:
                raise spec.CniError(
                    spec.FAILED, f"{link.name} already has an IP address different from {address}: {other}",
                    "set forceAddress to replace it",
                )  # fmt: skip
            request(
                host, rtnl.address_request(link.ifindex, other.packed, other.network.prefixlen, add=False),
                f"address {other} of {link.name}", absent=(errno.EADDRNOTAVAIL,),
            )  # fmt: skip
            del present[other]
    if any(address.version == 6 for address in wanted):
        skip_dad(link.name)
    for address in missing:
        flags = rtnl.F_NODAD if address.version == 6 else 0
        request(
            host, rtnl.address_request(link.ifindex, address.packed, address.network.prefixlen, flags=flags),
            f"address {address} of {link.name}", absent=(errno.EEXIST,),
        )  # fmt: skip
    if missing and pin:
        request(host, rtnl.set_link(link.ifindex, mac=link.mac), f"hardware address of {link.name}")
    return missing


def skip_dad(name: str) -> None:
    """Let a link that is a gateway have IPv6 addresses at once. To be called before it carries traffic.

    The kernel makes its link-local address itself, asks for neighbours under it, and asks nobody while it is tentative:
    for up to two seconds after the first pod of a bridge nobody could reach it.
    """
    _require_ipv6(name)
    sysctl.write(f"net/ipv6/conf/{name}/accept_dad", 0)
    sysctl.write(f"net/ipv6/conf/{name}/disable_ipv6", 0)


def has_ipv6(name: str) -> bool:
    """Say whether a link here has IPv6: not in every kernel, and not with an MTU below 1280."""
    return sysctl.read(f"net/ipv6/conf/{name}/disable_ipv6") is not None


def _require_ipv6(name: str) -> None:
    if not has_ipv6(name):
        raise spec.CniError(
            spec.FAILED, f"{name} cannot have IPv6 addresses",
            "that takes an MTU of 1280 or more (field mtu), and a kernel with IPv6",
        )  # fmt: skip


def remove_addresses(host: netlink.Socket, ifindex: int, addresses: list[IpInterface]) -> None:
    """Take addresses off a link; those that are gone already do not matter."""
    for address in addresses:
        request(
            host, rtnl.address_request(ifindex, address.packed, address.network.prefixlen, add=False),
            f"address {address}", absent=(errno.EADDRNOTAVAIL, errno.ENODEV),
        )  # fmt: skip


def enable_forwarding(families: set[int]) -> None:
    """Make the host forward packets of these families (4, 6)."""
    for family in families:
        sysctl.write(FORWARDING[family], 1)


def _excludes(other: IpInterface, address: IpInterface) -> bool:
    """Say whether a bridge that has one address may not have the other: two of IPv4, or overlapping ones of IPv6."""
    if other.version != address.version:
        return False
    return address.version == 4 or other.ip in address.network or address.ip in other.network


def _interface(packed: bytes, prefix: int) -> IpInterface:
    return ipaddress.ip_interface((packed, prefix))


# --- the pod's link


def connect(
    host: netlink.Socket, pod_netns: int, conf: NetConf, bridge: Link, host_name: str, ifname: str, alias: str
) -> Link:
    """Make the pod's veth, the host's end up under the bridge; return the host's end. Raise `CniError`."""
    for last in (False, True):
        try:
            rtnl.add_veth(
                host, host_name, ifname, pod_netns,
                master=bridge.ifindex, mtu=conf.mtu, mac=conf.mac, alias=alias,
                hairpin=conf.port_hairpin, isolated=conf.port_isolation, host_mac=naming.mac(host_name),
            )  # fmt: skip
            break
        except netlink.NetlinkError as error:
            if error.errno == EXFULL:
                raise spec.CniError(
                    spec.TRY_LATER, f"bridge {conf.bridge} is full: a Linux bridge has at most {BRIDGE_PORTS} ports",
                    "a port is free after the next DEL",
                ) from None  # fmt: skip
            if error.errno != errno.EEXIST or last:
                raise
            stale = rtnl.link_named(host, host_name)
            if stale is not None:
                rtnl.delete_link(host, stale.ifindex)  # left by an earlier attempt for the same attachment
    link = rtnl.link_named(host, host_name)
    if link is None:
        raise spec.CniError(spec.FAILED, f"veth {host_name} vanished while it was set up")
    return link


def configure(
    pod: netlink.Socket, ifname: str, addresses: list[IpInterface], routes: list[rtnl.Route], *, dad: bool, routed: bool
) -> Link:
    """Give the pod's end its addresses and routes and put it up. To be called inside the pod's namespace.

    Where its only way out is the host's (`routed`), a pod without an IPv6 address gets no link-local one either: it
    would be announced to every pod of the bridge, for as long as which nobody's link can be changed.
    """
    link = pod_link(pod, ifname)
    ipv6 = [address for address in addresses if address.version == 6]
    if ipv6:
        _require_ipv6(ifname)
        if not dad:
            sysctl.write(f"net/ipv6/conf/{ifname}/accept_dad", 0)
        sysctl.write(f"net/ipv6/conf/{ifname}/disable_ipv6", 0)
        sysctl.write(f"net/ipv6/conf/{ifname}/keep_addr_on_down", 1)
    flags = 0 if dad else rtnl.F_NODAD
    messages, names = [rtnl.set_link(link.ifindex, arp_notify=True)], ["arp_notify"]
    if routed and not ipv6:
        messages.append(rtnl.set_link(link.ifindex, link_local=False))
        names.append("")  # it fails without IPv6
    for address in addresses:  # IPv4 before the link is up: then the kernel announces it (arp_notify)
        if address.version == 4:
            messages.append(rtnl.address_request(link.ifindex, address.packed, address.network.prefixlen))
            names.append(f"address {address}")
    messages.append(rtnl.set_link(link.ifindex, up=True))
    names.append("up")
    for address in ipv6:
        messages.append(rtnl.address_request(link.ifindex, address.packed, address.network.prefixlen, flags=flags))
        names.append(f"address {address}")
    for error, name in zip(pod.batch(messages), names, strict=True):
        if error is not None and name:
            raise netlink.NetlinkError(error.errno, f"{ifname}: {name}: {error.strerror}")
    if ipv6 and dad:
        _wait_for_dad(pod, link)
    add_routes(pod, ifname, [route._replace(oif=link.ifindex) for route in routes])
    return link


def add_routes(pod: netlink.Socket, ifname: str, routes: list[rtnl.Route]) -> None:
    """Add routes, several of one destination side by side; an equal one may be there."""
    unique = list(dict.fromkeys(routes))
    if not unique:
        return
    for error, route in zip(pod.batch([rtnl.route_request(r, append=True) for r in unique]), unique, strict=True):
        if error is not None and error.errno != errno.EEXIST:
            destination = f"{_socket.inet_ntop(_family(route.dst), route.dst)}/{route.prefix}"
            via = f" via {_socket.inet_ntop(_family(route.gateway), route.gateway)}" if route.gateway else ""
            raise netlink.NetlinkError(error.errno, f"{ifname}: route {destination}{via}: {error.strerror}")


def pod_link(pod: netlink.Socket, ifname: str) -> Link:
    """Return the pod's end. Raise `CniError` when it is not there."""
    link = rtnl.link_named(pod, ifname)
    if link is None:
        raise spec.CniError(spec.FAILED, f"interface {ifname} is missing in the pod")
    return link


def _wait_for_dad(pod: netlink.Socket, link: Link) -> None:
    deadline = time.monotonic() + 2 * _SETTLE_SECONDS
    while True:
        found = [a for a in rtnl.addresses(pod, link.ifindex, _socket.AF_INET6) if a.scope == 0]
        failed = next((a for a in found if a.flags & rtnl.F_DADFAILED), None)
        if failed is not None:
            raise spec.CniError(
                spec.FAILED, f"address {_socket.inet_ntop(_socket.AF_INET6, failed.packed)}: in use by another (DAD)"
            )
        if not any(a.flags & rtnl.F_TENTATIVE for a in found):
            return
        if time.monotonic() > deadline:
            raise spec.CniError(spec.FAILED, f"{link.name}: duplicate address detection did not end")
        time.sleep(0.02)


def wait_until_forwarding(host: netlink.Socket, ifindex: int) -> Link:
    """Return the host's end once it carries traffic: the kernel's link watch runs a moment after both ends are up."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    pause = 0.0005
    while True:
        link = rtnl.link_at(host, ifindex)
        if link is None:
            raise spec.CniError(spec.FAILED, "the pod's link vanished while it was set up")
        if link.operstate == rtnl.OPER_UP or time.monotonic() > deadline:
            return link
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def delete_in_pod(host: netlink.Socket, pod_netns: int, container: str, ifname: str) -> None:
    """Delete the pod's end of a veth from inside: of an attachment that another plugin made, or under another name.

    Not that of another container: runtimes name namespaces by process ids too, which are used again (cri-o#2849).
    """
    with netns.inside(pod_netns):
        pod = netlink.Socket()
    with pod:
        end = rtnl.link_named(pod, ifname)
        if end is None or end.kind != "veth":
            return
        peer = rtnl.link_at(host, end.peer)
        mark = naming.mark(peer.alias) if peer is not None and peer.peer == end.ifindex else None
        if mark is None or (mark.container, mark.ifname) == (container, ifname):
            rtnl.delete_link(pod, end.ifindex)


def _family(packed: bytes) -> int:
    return _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6


def request(sock: netlink.Socket, message: netlink.Message, what: str, absent: tuple[int, ...] = ()) -> None:
    """Send one request. Raise `NetlinkError` saying `what` failed, unless its error number is in `absent`."""
    error = sock.batch([message])[0]
    if error is not None and error.errno not in absent:
        raise netlink.NetlinkError(error.errno, f"{what}: {error.strerror}")
