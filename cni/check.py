"""CHECK: is everything that ADD made still there and unchanged? The first difference found is the error's message."""

from __future__ import annotations

import _socket
import ipaddress
from collections.abc import Callable

from cni import naming, spec, wiring
from cni.netconf import NetConf
from cni.spec import CniError, Request
from pynet.kernel import netlink, rtnl, sysctl


def fail(message: str) -> CniError:
    """Return the error of a check that failed."""
    return CniError(spec.FAILED, f"CHECK: {message}")


def links(request: Request, conf: NetConf, host: netlink.Socket, pod: netlink.Socket) -> tuple[rtnl.Link, rtnl.Link]:
    """Check bridge, both ends of the veth and the port's settings; return host's and pod's end. Raise `CniError`."""
    bridge = rtnl.link_named(host, conf.bridge)
    if bridge is None:
        raise fail(f"bridge {conf.bridge} is missing")
    if bridge.kind != "bridge":
        raise fail(f"{conf.bridge} is not a bridge")
    if not bridge.up:
        raise fail(f"bridge {conf.bridge} is down")
    if conf.promisc and not bridge.flags & rtnl.IFF_PROMISC:
        raise fail(f"bridge {conf.bridge} is not promiscuous")
    name = naming.host_link(request.container, request.ifname)
    veth = rtnl.link_named(host, name)
    if veth is None:
        raise fail(f"host veth {name} is missing")
    end = rtnl.link_named(pod, request.ifname)
    if end is None:
        raise fail(f"interface {request.ifname} is missing in the pod")
    if end.kind != "veth" or end.peer != veth.ifindex or veth.peer != end.ifindex:
        raise fail(f"interface {request.ifname} is not the peer of host veth {name}")
    for link, where in ((veth, "host veth"), (end, "interface")):
        if not link.up and not (link is end and conf.disable_container_interface):
            raise fail(f"{where} {link.name} is down")
    if veth.master != bridge.ifindex:
        raise fail(f"host veth {name} is not attached to its master, bridge {conf.bridge}")
    if veth.hairpin != conf.hairpin:
        raise fail(f"hairpin mode of host veth {name} is {_onoff(veth.hairpin)}, expected {_onoff(conf.hairpin)}")
    if veth.isolated != conf.port_isolation:
        raise fail(f"isolation of host veth {name} is {_onoff(veth.isolated)}, expected {_onoff(conf.port_isolation)}")
    if conf.mtu:
        for link in (veth, end):
            if link.mtu != conf.mtu:
                raise fail(f"MTU of {link.name} is {link.mtu}, expected {conf.mtu}")
    return veth, end


def previous(request: Request, conf: NetConf, end: rtnl.Link, host: netlink.Socket) -> spec.Interface | None:
    """Check the interfaces that prevResult lists against the kernel; return the pod's. Raise `CniError`."""
    if conf.previous is None:
        return None
    ours = None
    for interface in conf.previous.interfaces:
        if interface.sandbox and interface.name == request.ifname:
            ours = interface
            found: rtnl.Link | None = end
        elif not interface.sandbox:
            found = rtnl.link_named(host, interface.name)
            if found is None:
                raise fail(f"interface {interface.name} of prevResult is missing on the host")
        else:
            continue
        assert found is not None
        if interface.mac and found.mac != interface.mac.lower():
            raise fail(f"hardware address of {interface.name} is {found.mac}, expected {interface.mac}")
        if interface.mtu and found.mtu != interface.mtu:
            raise fail(f"MTU of {interface.name} is {found.mtu}, expected {interface.mtu}")
    if ours is None:
        raise fail(f"prevResult has no interface {request.ifname} in the pod")
    return ours


def addresses(conf: NetConf, end: rtnl.Link, pod: netlink.Socket) -> list[wiring.IpInterface]:
    """Check the pod's addresses against prevResult; return them. Raise `CniError`."""
    if conf.previous is None:
        return []
    wanted = []
    present = {ipaddress.ip_interface((a.packed, a.prefix)) for a in rtnl.addresses(pod, end.ifindex)}
    count = len(conf.previous.interfaces)
    for ip in conf.previous.ips:
        inside = ip.interface is not None and 0 <= ip.interface < count
        if inside and conf.previous.interfaces[ip.interface or 0].name != end.name:
            continue
        address = ipaddress.ip_interface(ip.address)
        if address not in present:
            raise fail(f"address {address} is missing on {end.name}")
        wanted.append(address)
    return wanted


def routes(conf: NetConf, end: rtnl.Link, pod: netlink.Socket, wanted: Callable[[spec.Route], rtnl.Route]) -> None:
    """Check the pod's routes against prevResult. Raise `CniError`."""
    if conf.previous is None or not conf.previous.routes:
        return
    present: dict[int, list[rtnl.Route]] = {}
    for route in conf.previous.routes:
        want = wanted(route)
        family = _socket.AF_INET if len(want.dst) == 4 else _socket.AF_INET6
        if family not in present:
            present[family] = rtnl.routes(pod, family)
        if not any(_serves(found, want) for found in present[family] if found.oif == end.ifindex):
            raise fail(f"route {route.dst} via {route.gw or 'link'} is missing in the pod")


def _serves(found: rtnl.Route, want: rtnl.Route) -> bool:
    """Say whether the kernel's route is the wanted one; what is not asked for may be as the kernel chose."""
    same = found.dst == want.dst and found.prefix == want.prefix and found.table == want.table
    asked = ("gateway", "priority", "mtu", "advmss")
    return same and all(not getattr(want, key) or getattr(found, key) == getattr(want, key) for key in asked)


def gateways(conf: NetConf, host: netlink.Socket, wanted: list[wiring.IpInterface], on: str) -> None:
    """Check the gateways' addresses on the bridge, and that the host forwards. Raise `CniError`."""
    if not conf.is_gateway or not wanted:
        return
    link = rtnl.link_named(host, on)
    if link is None:
        raise fail(f"gateway interface {on} is missing")
    present = {ipaddress.ip_interface((a.packed, a.prefix)) for a in rtnl.addresses(host, link.ifindex)}
    for address in wanted:
        if address not in present:
            raise fail(f"gateway address {address} is missing on bridge {on}")
    for version, name in ((4, "net/ipv4/ip_forward"), (6, "net/ipv6/conf/all/forwarding")):
        if any(address.version == version for address in wanted) and sysctl.read(name) != "1":
            raise fail(f"the host does not forward IPv{version}: sysctl {name.replace('/', '.')} is not 1")


def _onoff(value: bool) -> str:
    return "on" if value else "off"
