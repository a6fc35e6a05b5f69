"""ADD: the order of its steps, each with its undoing. What a step does to the kernel is other modules' business."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from cni import (
    ctl,
    delegate,
    gateways,
    hostport,
    journal,
    masquerade,
    naming,
    netconf,
    removal,
    results,
    ruleset,
    shaping,
    spec,
    spoofcheck,
    vlan,
    wiring,
)  # fmt: skip
from cni.context import Context
from cni.ctl import step
from cni.ipam import verbs as ipam
from cni.netconf import NetConf
from cni.spec import CniError, Request
from pynet.kernel import netlink, netns, nftables, rtnl, sysctl


def add(request: Request, environment: Mapping[str, str], context: Context, given: int) -> str:
    """Wire the pod; on any failure undo what was done. Return the result as text."""
    conf = netconf.parse(request.config, request.args, request.version)
    with (
        ctl.turn(request, conf.state_dir),
        ctl.pod(request, given, needed=True) as pod_netns,
        ExitStack() as opened,
    ):
        host = opened.enter_context(netlink.Socket())
        pod = opened.enter_context(ctl.inside(pod_netns))
        if rtnl.link_named(pod, request.ifname) is not None:
            raise CniError(
                spec.FAILED, f"interface {request.ifname} already exists in the pod", f"CNI_NETNS={request.netns}"
            )
        adding = _Adding(request, conf, environment, context, host, pod, pod_netns)
        with adding.undo:
            answer = results.render(adding.run(), request.version)
            adding.undo.pop_all()
    return answer


class _Adding:
    """One ADD under way: what it was asked, what it has opened, what it will undo when a step fails."""

    def __init__(
        self, request: Request, conf: NetConf, environment: Mapping[str, str], context: Context,
        host: netlink.Socket, pod: netlink.Socket, pod_netns: int,
    ) -> None:  # fmt: skip
        self.request, self.conf, self.environment, self.context = request, conf, environment, context
        self.host, self.pod, self.pod_netns = host, pod, pod_netns
        self.undo = ExitStack()
        self.key = (request.container, request.ifname)
        self.tag = ruleset.owner(request.network, *self.key)
        self.book = context.journal(conf.state_dir)
        device, inode = netns.identity(pod_netns)
        self.record = journal.Record(
            *self.key, request.network, netns=request.netns, device=device, inode=inode, bridge=conf.bridge
        )
        self.written = self.record

    def run(self) -> results.Result:
        """Do all steps; each registers its undoing before it is done."""
        conf = self.conf
        step("add-start")
        delegated = conf.ipam_type not in ("", ipam.TYPE)
        if delegated:  # dhcp asks through the pod's interface
            self.write_down([], [])
            bridge, host_link = self.attach([])
        allotted = self.allot()
        ips, routes = gateways.plan(conf, allotted)
        addresses = [ipaddress.ip_interface(ip.address) for ip in ips]
        networks = [(str(address.ip), str(address.network)) for address in addresses]
        forwards = hostport.forwards(conf.port_mappings, networks, conf.port_masquerade)
        first = self.write_down(networks, forwards)
        if delegated:
            self.mark(host_link, networks)
        else:
            bridge, host_link = self.attach(networks)
        gateway_link = self.gateway(bridge, ips)
        pod_link = self.pod_side(addresses, ips, routes)
        self.rules(networks, forwards, host_link, first)
        ifb = self.shape(host_link)
        removal.flush(self.host, bridge.name, self.record.addresses, self.record.udp_ports)
        if not conf.disable_container_interface:
            host_link = wiring.wait_until_forwarding(self.host, host_link.ifindex)
        step("add-flush")
        self.write_end()
        self.confirm_reservation()
        step("add-end")
        links = [gateway_link] if gateway_link is not None and gateway_link.ifindex != bridge.ifindex else []
        return self.result(bridge, host_link, pod_link, links + ([ifb] if ifb else []), ips, routes, allotted.dns)

    def undoing(self, what: str, work: Callable[[], object]) -> None:
        """Register how the next step is undone; its own failure is told on stderr and hides no other error."""

        def undo() -> None:
            try:
                work()
            except Exception as error:
                print(f"pynet-cni: undoing a failed ADD: {what}: {ctl.said(error)}", file=sys.stderr)

        self.undo.callback(undo)

    def unless_shared(self, work: Callable[[], object]) -> Callable[[], None]:
        """Return `work` as it is to be done while no other pod of the network is there, which came to rely on it."""

        def undo() -> None:
            if all((one.container, one.ifname) == self.key for one in self.book.all(self.request.network)):
                work()

        return undo

    def allot(self) -> results.Result:
        """Get addresses, routes and resolver settings from the IPAM plugin; an L2-only network has none."""
        kind = self.conf.ipam_type
        if not kind:
            return results.Result()
        if kind == ipam.TYPE:
            result = ipam.add(self.request, self.context, self.pod_netns)
            self.undoing("IPAM", lambda: ipam.delete(self.request, self.context))
        else:
            self.undoing("IPAM", lambda: delegate.run("DEL", self.request, kind, self.environment))
            result = delegate.add(self.request, kind, self.environment)
        step("add-ipam")
        if not result.ips:
            raise CniError(spec.FAILED, f"IPAM plugin {kind} returned no IP address")
        return result

    def confirm_reservation(self) -> None:
        """Make sure that no repair of a damaged database has lost this reservation meanwhile."""
        if self.conf.ipam_type == ipam.TYPE and not ipam.confirmed(self.request, self.context):
            raise CniError(spec.TRY_LATER, "IPAM: the reservation was lost while the database was repaired")

    def write_down(self, networks: list[tuple[str, str]], forwards: list[hostport.Forward]) -> bool:
        """Write what is about to be made, and claim the host ports; return whether nobody else has elements."""
        conf = self.conf
        elements: list[str] = []
        if conf.ip_masq and conf.ip_masq_backend == "nftables":
            elements += [masquerade.key(address) for address, _ in networks]
        elements += [key for forward in forwards for key in hostport.keys(forward)]
        self.record = self.record._replace(
            addresses=tuple(address for address, _ in networks),
            elements=tuple(dict.fromkeys(elements)),
            made_bridge=self.record.made_bridge or not rtnl.index_of(conf.bridge),
            iptables=conf.ip_masq and conf.ip_masq_backend == "iptables",
            ifb=bool(conf.bandwidth.egress_rate),
            udp_ports=tuple((f.host_port, f.family) for f in forwards if f.protocol == "udp"),
        )
        if conf.mac_spoof_check:
            self.record = self.record._replace(elements=(*self.record.elements, *self.spoof_keys("00:00:00:00:00:00")))
        claims = tuple(journal.Claim(f.protocol, f.host_port, f.host) for f in forwards)
        first = self.claim(claims)
        self.written = self.record
        self.undoing("record", lambda: self.book.forget(*self.key, ruleset.remove_tables))
        step("add-journal")
        return first

    def write_end(self) -> None:
        """Write what the record did not know at first, most often nothing: the bridge stays from here on."""
        self.record = self.record._replace(made_bridge=False)
        if self.record != self.written:
            self.book.write(self.record)

    def claim(self, claims: tuple[journal.Claim, ...]) -> bool:
        """Write record and claims; what a pod that is no more holds of them is freed first. Raise `CniError`."""
        for _ in range(len(claims) + 2):
            try:
                return self.book.write(self.record, claims)
            except journal.Attached as attached:
                if not removal.gone(attached.holder, self.host):
                    raise CniError(spec.FAILED, f"{attached}: DEL there comes first") from None
                removal.purge(attached.holder, self.book, self.host, self.context)
            except journal.PortTaken as taken:
                if not removal.gone(taken.holder, self.host):
                    raise CniError(
                        spec.FAILED,
                        f"field runtimeConfig.portMappings: {taken} is already claimed by "
                        f"{taken.holder.container}/{taken.holder.ifname} of network {taken.holder.network}",
                    ) from None
                removal.purge(taken.holder, self.book, self.host, self.context)
        return self.book.write(self.record, claims)

    def bridge(self) -> rtnl.Link:
        """Return the bridge; one that this ADD made goes again if the ADD fails and nobody else uses it."""
        bridge, made = wiring.ensure_bridge(self.host, self.conf)
        if made:
            self.undoing("bridge", lambda: removal.remove_bridge(self.host, self.conf.bridge))
        if vlan.wanted(self.conf):
            vlan.enable(self.host, bridge)
        step("add-bridge")
        return bridge

    def attach(self, networks: list[tuple[str, str]]) -> tuple[rtnl.Link, rtnl.Link]:
        """Make the bridge, if need be, and the veth; return the bridge and the veth's host end."""
        bridge = self.bridge()
        host_link = self.veth(bridge, networks)
        if not self.record.made_bridge:
            bridge = wiring.keep_hardware_address(self.host, bridge, host_link)
        return bridge, host_link

    def alias(self, networks: list[tuple[str, str]]) -> str:
        """Return what the host's end of the veth says of the attachment."""
        addresses = tuple(address for address, _ in networks)
        return naming.alias(naming.Mark(*self.key, self.request.network, addresses))

    def mark(self, host_link: rtnl.Link, networks: list[tuple[str, str]]) -> None:
        """Tell the addresses by the alias of a veth that was made before they were known."""
        changed = rtnl.set_link(host_link.ifindex, alias=self.alias(networks))
        wiring.request(self.host, changed, f"alias of {host_link.name}")

    def veth(self, bridge: rtnl.Link, networks: list[tuple[str, str]]) -> rtnl.Link:
        """Make the veth and set up its port; return the host's end."""
        request = self.request
        name = naming.host_link(*self.key)
        self.undoing("veth", lambda: removal.delete_named(self.host, name, self.context))
        link = wiring.connect(self.host, self.pod_netns, self.conf, bridge, name, request.ifname, self.alias(networks))
        step("add-veth")
        if vlan.wanted(self.conf):
            vlan.set_port(self.host, link, self.conf)
            step("add-vlan")
        return link

    def gateway(self, bridge: rtnl.Link, ips: list[results.Ip]) -> rtnl.Link | None:
        """Put the gateways' addresses on the bridge, or on its link in the VLAN, and let the host forward."""
        conf = self.conf
        wanted = gateways.addresses(ips)
        if not conf.is_gateway or not wanted:
            return None
        link = bridge
        if conf.vlan:
            name = vlan.gateway_name(conf)
            if not rtnl.index_of(name):
                self.undoing("gateway's link", self.unless_shared(lambda: rtnl.delete_link(self.host, link.ifindex)))
            link = vlan.ensure_gateway_link(self.host, bridge, conf)
        made = wiring.ensure_gateway_addresses(self.host, link, wanted, force=conf.force_address, pin=not conf.vlan)
        undo = self.unless_shared(lambda: wiring.remove_addresses(self.host, link.ifindex, made))
        self.undoing("gateway address", undo)
        wiring.enable_forwarding({address.version for address in wanted})
        step("add-gateway")
        return link

    def pod_side(
        self, addresses: list[wiring.IpInterface], ips: list[results.Ip], routes: list[results.Route]
    ) -> rtnl.Link:
        """Give the pod's end its addresses and routes, unless it is to stay down."""
        ifname = self.request.ifname
        with netns.inside(self.pod_netns):
            if self.conf.disable_container_interface:
                link = wiring.pod_link(self.pod, ifname)
            else:
                kernel_routes = [gateways.kernel_route(route, ips) for route in routes]
                link = wiring.configure(
                    self.pod, ifname, addresses, kernel_routes,
                    dad=self.conf.enable_dad, routed=self.conf.is_gateway,
                )  # fmt: skip
        step("add-pod")
        return link

    def rules(
        self, networks: list[tuple[str, str]], forwards: list[hostport.Forward], host_link: rtnl.Link, first: bool
    ) -> None:
        """Masquerade, host ports and spoof check: one nftables transaction."""
        conf, exceptions = self.conf, self.conf.non_masquerade
        subnets = list(dict.fromkeys(subnet for _, subnet in networks))
        elements, base = [], ruleset.BASE
        if conf.ip_masq and conf.ip_masq_backend == "nftables":
            base += "".join(masquerade.chain(subnet, exceptions) for subnet in subnets)
            elements += [masquerade.element(*network, exceptions, self.tag) for network in networks]
        if forwards:
            base += hostport.chains(forwards)
            elements += [element for forward in forwards for element in hostport.elements(forward, self.tag)]
        if conf.mac_spoof_check:
            mac = rtnl.link_named(self.pod, self.request.ifname)
            assert mac is not None
            base += spoofcheck.BASE
            elements += spoofcheck.elements(host_link.name, mac.mac, self.tag)
            known = self.record.elements[:-2]
            self.record = self.record._replace(elements=(*known, *spoofcheck.keys(host_link.name, mac.mac)))
        if elements:
            self.undoing("nftables", lambda: ruleset.remove(list(self.record.elements), self.tag))
            try:
                ruleset.apply(base, list(dict.fromkeys(elements)), first=first)
            except (netlink.NetlinkError, nftables.NftError):
                for held in ruleset.others(self.record.elements, self.tag):
                    raise CniError(
                        spec.FAILED,
                        f"nftables: {held.table} {held.name}: {held.key} is already claimed by {held.owner}",
                    ) from None
                raise
        step("add-elements")
        if conf.ip_masq and conf.ip_masq_backend == "iptables":
            from cni import iptmasq  # only who asks for it waits for its imports

            self.undoing("iptables", lambda: iptmasq.remove(self.tag))
            iptmasq.apply(networks, exceptions, self.tag)
        if any(hostport.needs_localhost(forward) for forward in forwards):
            sysctl.write(f"net/ipv4/conf/{conf.bridge}/route_localnet", 1)
        step("add-rules")

    def spoof_keys(self, mac: str) -> list[str]:
        """Return the spoof check's elements; before the veth is made its hardware address is not known."""
        return spoofcheck.keys(naming.host_link(*self.key), mac)

    def shape(self, host_link: rtnl.Link) -> rtnl.Link | None:
        """Limit the pod's bandwidth; return the intermediate device, where there is one."""
        if self.conf.bandwidth == netconf.Bandwidth():
            return None
        name = naming.ifb_link(*self.key)
        if self.conf.bandwidth.egress_rate:
            self.undoing("intermediate device", lambda: removal.delete_named(self.host, name, self.context))
        alias = naming.alias(naming.Mark(*self.key, self.request.network, ()))
        ifb = shaping.shape(self.host, host_link, name, alias, self.conf.bandwidth)
        step("add-shaping")
        return ifb

    def result(
        self, bridge: rtnl.Link, host_link: rtnl.Link, pod_link: rtnl.Link, others: list[rtnl.Link],
        ips: list[results.Ip], routes: list[results.Route], dns: results.Dns,
    ) -> results.Result:  # fmt: skip
        """Return the result, after what a plugin before us in the chain returned."""
        before = self.conf.previous or results.Result()
        on_host = [results.Interface(link.name, link.mac, mtu=link.mtu) for link in (bridge, host_link, *others)]
        in_pod = results.Interface(pod_link.name, pod_link.mac, self.request.netns, pod_link.mtu)
        number = len(before.interfaces) + 2
        settings = [found for found in (self.conf.dns, dns, before.dns) if found != results.Dns()]
        return results.Result(
            interfaces=(*before.interfaces, *on_host[:2], in_pod, *on_host[2:]),
            ips=before.ips + tuple(ip._replace(interface=number) for ip in ips),
            routes=before.routes + tuple(routes),
            dns=settings[0] if settings else results.Dns(),
        )
