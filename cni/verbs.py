"""ADD, DEL and the other verbs: the order of steps, and their undoing. What a step does is other modules' business."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from cni import check as checks
from cni import delegate, journal, masquerade, naming, netconf, ruleset, spec, wiring
from cni.context import Context
from cni.ipam import verbs as ipam
from cni.netconf import NetConf
from cni.spec import CniError, Request
from pynet.kernel import netlink, netns, nftables, rtnl


class Answer(NamedTuple):
    """Exit code and standard output; standard error is written where the work is done."""

    code: int
    output: str


def serve(
    environment: Mapping[str, str], stdin: bytes, context: Context, *, only_ipam: bool = False, pod_netns: int = -1
) -> Answer:
    """Serve one call. Whatever happens, the answer is the specification's: a result, nothing, or an error object."""
    version = spec.NEWEST
    try:
        if spec.command_of(environment) == "VERSION":
            return Answer(0, spec.version_answer())
        version = _version_for_errors(stdin)
        request = spec.request(environment, stdin)
        if only_ipam:
            return Answer(0, _serve_ipam(request, context))
        return Answer(0, _VERBS[request.command](request, environment, context, pod_netns))
    except CniError as error:
        return Answer(1, error.render(version))
    except netlink.NetlinkError as error:
        return Answer(1, CniError(spec.FAILED, str(error.strerror), _details(environment)).render(version))
    except nftables.NftError as error:
        return Answer(1, CniError(spec.FAILED, f"nftables: {error}", _details(environment)).render(version))
    except OSError as error:
        return Answer(1, CniError(spec.IO_FAILURE, str(error), _details(environment)).render(version))
    except Exception as error:  # the runtime must get an answer it can read, whatever is wrong with us
        import traceback

        traceback.print_exc()
        said = f"internal error: {type(error).__name__}: {error}"
        return Answer(1, CniError(spec.FAILED, said, _details(environment)).render(version))


def _details(environment: Mapping[str, str]) -> str:
    keys = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME")
    return " ".join(f"{key}={environment[key]}" for key in keys if environment.get(key))


def _version_for_errors(stdin: bytes) -> str:
    try:
        return spec.version_of(spec.decode(stdin))
    except CniError:
        return spec.NEWEST


def _serve_ipam(request: Request, context: Context) -> str:
    if request.command == "ADD":
        return spec.render(ipam.add(request, context), request.version)
    if request.command == "DEL":
        ipam.delete(request, context)
    elif request.command == "CHECK":
        ipam.check(request, context)
    elif request.command == "STATUS":
        ipam.status(request, context)
    elif request.command == "GC":
        ipam.collect(request, context, valid_attachments(request.config))
    return ""


def step(name: str) -> None:
    """Mark a point at which a kill must do no lasting harm; the kill tests stop the process at one by its name."""
    if _STOP_AT and name == _STOP_AT:
        os.kill(os.getpid(), 9)


_STOP_AT = os.environ.get("PYNET_CNI_KILL_AT", "")


# --- ADD


def add(request: Request, environment: Mapping[str, str], context: Context, pod_netns: int) -> str:
    """Wire the pod; on any failure undo what was done. Return the result as text."""
    conf = netconf.parse(request.config, request.args, request.version)
    with ExitStack() as opened, ExitStack() as undo:
        if pod_netns < 0:
            pod_netns = open_netns(request.netns)
            opened.callback(os.close, pod_netns)
        host = opened.enter_context(netlink.Socket())
        pod = opened.enter_context(open_inside(pod_netns, request))
        if rtnl.link_named(pod, request.ifname) is not None:
            raise CniError(
                spec.FAILED, f"interface {request.ifname} already exists in the pod", f"CNI_NETNS={request.netns}"
            )
        result = _Adding(request, conf, environment, context, undo, host, pod, pod_netns).run()
        undo.pop_all()
    return spec.render(result, request.version)


class _Adding:
    """One ADD under way: what it was asked, what it has opened, what it will undo when a step fails."""

    def __init__(
        self, request: Request, conf: NetConf, environment: Mapping[str, str], context: Context,
        undo: ExitStack, host: netlink.Socket, pod: netlink.Socket, pod_netns: int,
    ) -> None:  # fmt: skip
        self.request, self.conf, self.environment, self.context = request, conf, environment, context
        self.undo, self.host, self.pod, self.pod_netns = undo, host, pod, pod_netns
        self.key = (request.container, request.ifname)
        self.host_name = naming.host_link(*self.key)
        self.journal = context.journal(conf.state_dir)
        device, inode = netns.identity(pod_netns)
        self.record = journal.Record(
            *self.key, request.network, netns=request.netns, device=device, inode=inode, bridge=conf.bridge
        )

    def run(self) -> spec.Result:
        """Do all steps; each says how it is undone before it is done."""
        conf = self.conf
        step("add-start")
        self.undo.callback(_quietly, self.journal.forget, *self.key)
        allotted = self.allot()
        addresses = [ipaddress.ip_interface(ip.address) for ip in allotted.ips]
        tag = ruleset.owner(*self.key)
        exceptions = conf.non_masquerade
        elements = []
        if conf.ip_masq and conf.ip_masq_backend == "nftables":
            elements = [masquerade.element(str(a.ip), str(a.network), exceptions, tag) for a in addresses]
        bridge_there = rtnl.link_named(self.host, conf.bridge) is not None
        self.note(
            addresses=tuple(str(a.ip) for a in addresses),
            elements=tuple(masquerade.key(str(a.ip)) for a in addresses) if elements else (),
            made_bridge=not bridge_there,
        )
        bridge = self.ensure_bridge()
        ips, routes = plan_gateways(conf, allotted)
        host_link, pod_link = self.wire(bridge, ips, addresses, routes)
        bridge = self.give_gateways(bridge, ips)
        if elements:
            chains = "".join(
                masquerade.chain(net, exceptions) for net in dict.fromkeys(str(a.network) for a in addresses)
            )
            self.undo.callback(_quietly, ruleset.remove_owned, tag)
            ruleset.apply(chains, elements)
            step("add-rules")
        host_link = wiring.wait_until_forwarding(self.host, host_link.ifindex)
        self.forget_neighbours(bridge, addresses)
        self.note(ready=True, made_bridge=False)
        step("add-end")
        return self.result(bridge, host_link, pod_link, ips, routes, allotted.dns)

    def note(self, **changes: object) -> None:
        """Write the record anew with these changes."""
        self.record = self.record._replace(**changes)  # type: ignore[arg-type]
        self.journal.write(self.record)
        step("add-journal")

    def allot(self) -> spec.Result:
        """Get addresses, routes and resolver settings from the IPAM plugin; an L2-only network has none."""
        kind = self.conf.ipam_type
        if not kind:
            return spec.Result()
        if kind == "pynet-ipam":
            self.undo.callback(_quietly, ipam.delete, self.request, self.context)
            result = ipam.add(self.request, self.context)
        else:
            self.undo.callback(_quietly, delegate.run, "DEL", self.request, kind, self.environment)
            result = delegate.add(self.request, kind, self.environment)
        step("add-ipam")
        if not result.ips:
            raise CniError(spec.FAILED, f"IPAM plugin {kind} returned no IP address")
        return result

    def ensure_bridge(self) -> rtnl.Link:
        """Return the bridge; one that this ADD made goes again if the ADD fails and nobody else uses it."""
        bridge, made = wiring.ensure_bridge(self.host, self.conf)
        if made:
            self.undo.callback(_quietly, remove_bridge, self.host, self.conf.bridge)
        step("add-bridge")
        return bridge

    def wire(
        self, bridge: rtnl.Link, ips: list[spec.Ip], addresses: list[wiring.IpInterface], routes: list[spec.Route]
    ) -> tuple[rtnl.Link, rtnl.Link]:
        """Make the veth and configure the pod's end; return both ends."""
        request, conf = self.request, self.conf
        mark = naming.Mark(request.container, request.ifname, request.network, tuple(str(a.ip) for a in addresses))
        self.undo.callback(_quietly, self.delete_host_link)
        host_link = wiring.connect(
            self.host, self.pod_netns, conf, bridge, self.host_name, request.ifname, naming.alias(mark)
        )
        step("add-veth")
        with netns.inside(self.pod_netns):
            if conf.disable_container_interface:
                pod_link = wiring.pod_link(self.pod, request.ifname)
            else:
                pod_link = wiring.configure(
                    self.pod, request.ifname, addresses, [kernel_route(route, ips) for route in routes],
                    dad=conf.enable_dad,
                )  # fmt: skip
        step("add-pod")
        return host_link, pod_link

    def delete_host_link(self) -> None:
        link = rtnl.link_named(self.host, self.host_name)
        if link is not None:
            self.context.delete_link(self.host, link.ifindex)

    def give_gateways(self, bridge: rtnl.Link, ips: list[spec.Ip]) -> rtnl.Link:
        """Put the gateways' addresses on the bridge and let the host forward."""
        if not self.conf.is_gateway:
            return bridge
        wanted = gateway_addresses(ips)
        made = wiring.ensure_gateway_addresses(self.host, bridge, wanted, force=self.conf.force_address, pin=True)
        self.undo.callback(_quietly, wiring.remove_addresses, self.host, bridge.ifindex, made)
        wiring.enable_forwarding({address.version for address in wanted})
        step("add-gateway")
        return bridge

    def forget_neighbours(self, bridge: rtnl.Link, addresses: list[wiring.IpInterface]) -> None:
        """Forget what hardware addresses the host knows for these addresses from the pods that had them before."""
        if addresses:
            self.host.batch([rtnl.neighbour_request(bridge.ifindex, a.packed, add=False) for a in addresses])

    def result(
        self, bridge: rtnl.Link, host_link: rtnl.Link, pod_link: rtnl.Link,
        ips: list[spec.Ip], routes: list[spec.Route], dns: spec.Dns,
    ) -> spec.Result:  # fmt: skip
        """Return the result, after what a plugin before us in the chain returned."""
        before = self.conf.previous or spec.Result()
        own = (
            spec.Interface(bridge.name, bridge.mac, mtu=bridge.mtu),
            spec.Interface(host_link.name, host_link.mac, mtu=host_link.mtu),
            spec.Interface(pod_link.name, pod_link.mac, self.request.netns, pod_link.mtu),
        )
        number = len(before.interfaces) + 2
        return spec.Result(
            interfaces=before.interfaces + own,
            ips=before.ips + tuple(ip._replace(interface=number) for ip in ips),
            routes=before.routes + tuple(routes),
            dns=self.conf.dns if self.conf.dns != spec.Dns() else dns if dns != spec.Dns() else before.dns,
        )


def plan_gateways(conf: NetConf, allotted: spec.Result) -> tuple[list[spec.Ip], list[spec.Route]]:
    """Return addresses with their gateways and the routes, default routes included, as the result shows them. Pure."""
    ips, routes = [], list(allotted.routes)
    defaulted: set[int] = set()
    for ip in allotted.ips:
        address = ipaddress.ip_interface(ip.address)
        if not ip.gateway and conf.is_gateway:
            ip = ip._replace(gateway=str(address.network.network_address + 1))
        ips.append(ip)
        default = "0.0.0.0/0" if address.version == 4 else "::/0"
        if conf.is_default_gateway and address.version not in defaulted:
            defaulted.add(address.version)
            if not any(route.dst == default and route.gw for route in routes):
                routes.append(spec.Route(default, ip.gateway))
    return ips, routes


def gateway_addresses(ips: list[spec.Ip]) -> list[wiring.IpInterface]:
    """Return the gateways' addresses with their networks' prefix lengths. Pure."""
    found = (f"{ip.gateway}/{ip.address.partition('/')[2]}" for ip in ips if ip.gateway)
    return [ipaddress.ip_interface(text) for text in dict.fromkeys(found)]


def kernel_route(route: spec.Route, ips: list[spec.Ip]) -> rtnl.Route:
    """Return a result's route as the kernel takes it: without a gateway of its own, via its family's first one."""
    destination = ipaddress.ip_network(route.dst, strict=False)
    gateway = route.gw
    if not gateway and route.scope in (None, 0):
        gateway = next((ip.gateway for ip in ips if ip.gateway and (":" in ip.gateway) == (":" in route.dst)), "")
    return rtnl.Route(
        destination.network_address.packed, destination.prefixlen,
        ipaddress.ip_address(gateway).packed if gateway else b"", 0,
        table=route.table or rtnl.MAIN_TABLE, priority=route.priority,
        scope=route.scope if route.scope is not None else (0 if gateway else rtnl.SCOPE_LINK),
        mtu=route.mtu, advmss=route.advmss,
    )  # fmt: skip


def open_netns(path: str) -> int:
    """Return a descriptor of the pod's namespace. Raise `CniError` 8; our own namespace is none for a pod."""
    try:
        fd = netns.open_path(path)
    except OSError as error:
        raise CniError(spec.BAD_NETNS, f"CNI_NETNS: failed to open netns {path!r}: {error.strerror}") from None
    return fd


def open_inside(pod_netns: int, request: Request) -> netlink.Socket:
    """Return a socket of the pod's namespace. Raise `CniError` 8 for our own namespace."""
    own = netns.own()
    try:
        same = netns.identity(own) == netns.identity(pod_netns)
    finally:
        os.close(own)
    if same:
        raise CniError(spec.BAD_NETNS, f"CNI_NETNS: {request.netns} is the plugin's own network namespace")
    with netns.inside(pod_netns):
        return netlink.Socket()


def remove_bridge(host: netlink.Socket, name: str) -> None:
    """Delete a bridge that nothing is attached to."""
    bridge = rtnl.link_named(host, name)
    if bridge is not None and not rtnl.links(host, master=bridge.ifindex):
        rtnl.delete_link(host, bridge.ifindex)


def _quietly(work: Callable[..., object], *arguments: object) -> None:
    """Do an undoing step; its own failure is told on stderr and does not hide the error that is being undone."""
    try:
        work(*arguments)
    except Exception as error:
        print(f"pynet-cni: undoing a failed ADD: {getattr(work, '__name__', work)}: {error}", file=sys.stderr)


# --- DEL


def delete(request: Request, environment: Mapping[str, str], context: Context, pod_netns: int) -> str:
    """Remove all that the attachment has; what is not there any more does not matter."""
    state_dir = netconf.state_dir(request.config)
    book = context.journal(state_dir)
    record = book.read(request.container, request.ifname)
    tag = ruleset.owner(request.container, request.ifname)
    with ExitStack() as opened:
        if pod_netns < 0 and request.netns:
            try:
                pod_netns = netns.open_path(request.netns)
                opened.callback(os.close, pod_netns)
            except OSError:
                pod_netns = -1
        host = opened.enter_context(netlink.Socket())
        step("del-start")
        link = rtnl.link_named(host, naming.host_link(request.container, request.ifname))
        if link is not None:
            context.delete_link(host, link.ifindex)
        elif pod_netns >= 0:
            _delete_in_pod(pod_netns, request)
        step("del-link")
        if record is None:
            ruleset.remove_owned(tag)
        else:
            ruleset.remove(list(record.elements), tag)
        step("del-rules")
        _release(request, environment, context)
        step("del-ipam")
        if record is not None and record.made_bridge and not record.ready:
            remove_bridge(host, record.bridge)
        if record is not None:
            book.forget(request.container, request.ifname)
        step("del-end")
    return ""


def _delete_in_pod(pod_netns: int, request: Request) -> None:
    try:
        pod = open_inside(pod_netns, request)
    except CniError:
        return  # our own namespace: nothing in it is a pod's
    with pod:
        link = rtnl.link_named(pod, request.ifname)
        if link is not None and link.kind == "veth":
            rtnl.delete_link(pod, link.ifindex)


def _release(request: Request, environment: Mapping[str, str], context: Context) -> None:
    ipam_section = request.config.get("ipam")
    kind = ipam_section.get("type") if isinstance(ipam_section, dict) else ""
    if kind == "pynet-ipam":
        ipam.delete(request, context)
    elif kind and isinstance(kind, str):
        delegate.run("DEL", request, kind, environment)


# --- the others


def check(request: Request, environment: Mapping[str, str], context: Context, pod_netns: int) -> str:
    """Compare what the attachment should have with what it has; raise `CniError` for the first difference."""
    conf = netconf.parse(request.config, request.args, request.version)
    with ExitStack() as opened:
        if pod_netns < 0:
            pod_netns = open_netns(request.netns)
            opened.callback(os.close, pod_netns)
        host = opened.enter_context(netlink.Socket())
        pod = opened.enter_context(open_inside(pod_netns, request))
        _, end = checks.links(request, conf, host, pod)
        checks.previous(request, conf, end, host)
        checks.addresses(conf, end, pod)
        ips = list(conf.previous.ips) if conf.previous else []
        checks.routes(conf, end, pod, lambda route: kernel_route(route, ips))
        checks.gateways(conf, host, gateway_addresses(ips), conf.bridge)
    if conf.ipam_type == "pynet-ipam":
        ipam.check(request, context)
    elif conf.ipam_type:
        delegate.run("CHECK", request, conf.ipam_type, environment)
    return ""


def valid_attachments(config: Mapping[str, object]) -> set[tuple[str, str]] | None:
    """Return the attachments that GC must spare; None when the list is absent. Raise `CniError`."""
    for key in ("cni.dev/valid-attachments", "cni.dev/attachments"):
        raw = config.get(key)
        if raw is None:
            continue
        if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
            raise CniError(spec.BAD_CONFIG, f"field {key} is not a list of objects")
        return {(str(entry.get("containerID", "")), str(entry.get("ifname", ""))) for entry in raw}
    return None


_VERBS: dict[str, Callable[[Request, Mapping[str, str], Context, int], str]] = {
    "ADD": add,
    "DEL": delete,
    "CHECK": check,
}
