"""CHECK: is all that ADD made still there and unchanged? The first difference found is the error's message."""

from __future__ import annotations

import _socket
import ipaddress
from collections.abc import Mapping

from cni import (
    ctl,
    delegate,
    gateways,
    hostport,
    masquerade,
    naming,
    netconf,
    results,
    ruleset,
    shaping,
    spec,
    spoofcheck,
    vlan,
    wiring,
)  # fmt: skip
from cni.context import Context
from cni.ipam import verbs as ipam
from cni.netconf import NetConf
from cni.spec import CniError, Request
from pynet.kernel import netlink, rtnl, sysctl


def check(request: Request, environment: Mapping[str, str], context: Context, given: int) -> str:
    """Compare what the attachment should have with what it has; raise `CniError` for the first difference."""
    conf = netconf.parse(request.config, request.args, request.version)
    before = conf.previous
    if before is None:
        raise CniError(spec.BAD_CONFIG, "field prevResult is missing: CHECK compares with what ADD returned")
    with (
        ctl.pod(request, given, needed=True) as pod_netns,
        netlink.Socket() as host,
        ctl.inside(pod_netns) as pod,
    ):
        veth, end = links(request, conf, host, pod)
        _refuse(shaping.difference(host, veth, naming.ifb_link(request.container, request.ifname), conf.bandwidth))
        interfaces(request, before, end, host)
        found = addresses(before, end, pod)
        routes(request, before, end, pod)
        _gateways(conf, host, gateways.addresses(_of(before, end.name)))
        if vlan.wanted(conf):
            _refuse(vlan.difference(host, veth, conf))
    _rules(request, conf, [(str(address.ip), str(address.network)) for address in found], veth, end)
    if conf.ipam_type == ipam.TYPE:
        ipam.check(request, context)
    elif conf.ipam_type:
        delegate.run("CHECK", request, conf.ipam_type, environment)
    return ""


def _refuse(message: str) -> None:
    if message:
        raise fail(message)


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
    if veth.hairpin != conf.port_hairpin:
        raise fail(f"hairpin mode of host veth {name} is {_onoff(veth.hairpin)}, expected {_onoff(conf.port_hairpin)}")
    if veth.isolated != conf.port_isolation:
        raise fail(f"isolation of host veth {name} is {_onoff(veth.isolated)}, expected {_onoff(conf.port_isolation)}")
    if conf.mtu:
        for link in (veth, end):
            if link.mtu != conf.mtu:
                raise fail(f"MTU of {link.name} is {link.mtu}, expected {conf.mtu}")
    return veth, end


def interfaces(request: Request, before: results.Result, end: rtnl.Link, host: netlink.Socket) -> None:
    """Check the interfaces that prevResult lists against the kernel. Raise `CniError`."""
    ours = False
    for interface in before.interfaces:
        if interface.sandbox and interface.name == request.ifname:
            ours = True
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
    if not ours:
        raise fail(f"prevResult has no interface {request.ifname} in the pod")


def addresses(before: results.Result, end: rtnl.Link, pod: netlink.Socket) -> list[wiring.IpInterface]:
    """Check the pod's addresses against prevResult; return them. Raise `CniError`."""
    wanted = []
    present = {ipaddress.ip_interface((a.packed, a.prefix)) for a in rtnl.addresses(pod, end.ifindex)}
    for ip in _of(before, end.name):
        address = ipaddress.ip_interface(ip.address)
        if address not in present:
            raise fail(f"address {address} is missing on {end.name}")
        wanted.append(address)
    return wanted


def _of(before: results.Result, name: str) -> list[results.Ip]:
    """Return the addresses that a result gives one interface; those without an interface are everybody's."""
    names = dict(enumerate(interface.name for interface in before.interfaces))
    return [ip for ip in before.ips if ip.interface is None or names.get(ip.interface, name) == name]


def routes(request: Request, before: results.Result, end: rtnl.Link, pod: netlink.Socket) -> None:
    """Check the pod's routes against prevResult. Raise `CniError`.

    Which interface a route is on, a result does not say: another plugin of the chain may have made it for its own.
    """
    others = any(interface.sandbox and interface.name != end.name for interface in before.interfaces)
    tells_all = spec.at_least(request.version, "1.1.0")
    present: dict[int, list[rtnl.Route]] = {}
    for route in before.routes:
        want = gateways.kernel_route(route, list(before.ips))
        family = _socket.AF_INET if len(want.dst) == 4 else _socket.AF_INET6
        if family not in present:
            present[family] = [found for found in rtnl.routes(pod, family) if others or found.oif == end.ifindex]
        there = [found for found in present[family] if (found.dst, found.prefix) == (want.dst, want.prefix)]
        _refuse(_difference(route, want, there, tells_all=tells_all))


def _difference(route: results.Route, want: rtnl.Route, there: list[rtnl.Route], *, tells_all: bool) -> str:
    """Return what is missing or changed of a route, by the kernel's nearest one of its destination. Pure.

    What prevResult does not say may be as the kernel chose; before 1.1 it says neither table nor scope.
    """
    said = f"route {route.dst} via {route.gw or 'link'}"
    asked = [key for key in ("gateway", "priority", "mtu", "advmss") if getattr(want, key)]
    if tells_all:
        asked.append("table")
        if route.scope is not None and len(want.dst) == 4:  # IPv6 knows no scope of routes
            asked.append("scope")
    elif not route.gw:
        asked = [key for key in asked if key != "gateway"]
    changed = [[key for key in asked if getattr(found, key) != getattr(want, key)] for found in there]
    if not changed:
        return f"{said} is missing in the pod"
    nearest = min(range(len(there)), key=lambda at: len(changed[at]))
    if not changed[nearest]:
        return ""
    shown = [
        f"{key} is {_shown(getattr(there[nearest], key))}, expected {_shown(getattr(want, key))}"
        for key in changed[nearest]
    ]
    return f"{said} is missing or changed in the pod: {', '.join(shown)}"


def _shown(value: int | bytes) -> str:
    if isinstance(value, bytes):
        return str(ipaddress.ip_address(value)) if value else "none"
    return str(value)


def _gateways(conf: NetConf, host: netlink.Socket, wanted: list[wiring.IpInterface]) -> None:
    """Check the gateways' addresses on the bridge, and that the host forwards. Raise `CniError`."""
    if not conf.is_gateway or not wanted:
        return
    on = vlan.gateway_name(conf) if conf.vlan else conf.bridge
    link = rtnl.link_named(host, on)
    if link is None:
        raise fail(f"gateway interface {on} is missing")
    present = {ipaddress.ip_interface((a.packed, a.prefix)) for a in rtnl.addresses(host, link.ifindex)}
    for address in wanted:
        if address not in present:
            raise fail(f"gateway address {address} is missing on bridge {on}")
    for version, name in wiring.FORWARDING.items():
        if any(address.version == version for address in wanted) and sysctl.read(name) != "1":
            raise fail(f"the host does not forward IPv{version}: sysctl {name.replace('/', '.')} is not 1")


def _rules(request: Request, conf: NetConf, networks: list[tuple[str, str]], veth: rtnl.Link, end: rtnl.Link) -> None:
    """Check masquerade, host ports and spoof check. Raise `CniError`."""
    tag = ruleset.owner(request.network, request.container, request.ifname)
    if conf.ip_masq and conf.ip_masq_backend == "iptables":
        from cni import iptmasq  # only who asked for it waits for its imports

        missing = iptmasq.missing(networks, conf.non_masquerade, tag)
        _refuse(f"masquerade of {missing} is missing" if missing else "")
    wanted: list[tuple[str, str]] = []
    scripts: list[tuple[str, str]] = []
    if conf.ip_masq and conf.ip_masq_backend == "nftables":
        for address, subnet in networks:
            element = masquerade.element(address, subnet, conf.non_masquerade, tag)
            wanted.append((f"masquerade of {address}", element))
            scripts.append((f"masquerade of {address}", masquerade.chain(subnet, conf.non_masquerade)))
    for forward in hostport.forwards(conf.port_mappings, networks, conf.port_masquerade):
        what = f"host port {forward.protocol} {forward.host}:{forward.host_port}"
        wanted += [(what, element) for element in hostport.elements(forward, tag)]
        scripts.append((what, hostport.chains([forward])))
    if wanted:
        scripts.append((wanted[0][0], ruleset.BASE))
    if conf.mac_spoof_check:
        wanted += [("spoof check", element) for element in spoofcheck.elements(veth.name, end.mac, tag)]
        scripts.append(("spoof check", spoofcheck.BASE))
    if not wanted:
        return
    elements, rules = ruleset.snapshot()
    present = {(element.table, element.name, element.key): element for element in elements}
    for what, text in wanted:
        want = ruleset.wanted(text)
        found = present.get((want.table, want.name, want.key))
        shown = f"nftables element {want.table} {want.name} {{ {want.key} }}"
        if found is None:
            raise fail(f"{what} is missing: no {shown}")
        if found.owner != tag and not want.name.startswith("hairpin"):
            raise fail(f"{what} belongs to {found.owner}: {shown}")
        if found.value != want.value:
            raise fail(f"{what} is changed: {shown} is {found.value}, expected {want.value}")
    for what, script in dict.fromkeys(scripts):
        for (table, name), count in ruleset.rules(script).items():
            if not rules[table, name]:
                raise fail(f"{what} is missing: nftables chain {table} {name} has no rules")
            if rules[table, name] < count:
                raise fail(
                    f"{what} is changed: nftables chain {table} {name} has {rules[table, name]} of {count} rules"
                )


def _onoff(value: bool) -> str:
    return "on" if value else "off"
