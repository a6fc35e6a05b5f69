"""Which gateway and default routes a pod gets, beside what IPAM says. Pure."""

from __future__ import annotations

import ipaddress

from cni import results, spec
from cni.netconf import NetConf
from cni.wiring import IpInterface
from pynet.kernel import rtnl

DEFAULTS = {4: "0.0.0.0/0", 6: "::/0"}


def plan(conf: NetConf, allotted: results.Result) -> tuple[list[results.Ip], list[results.Route]]:
    """Return addresses with their gateways and the routes, default routes included, as the result shows them.

    As the reference bridge: without a gateway from IPAM the subnet's first address is one; a default route of IPAM's
    that names its gateway stands.
    """
    ips: list[results.Ip] = []
    routes = list(allotted.routes)
    defaulted: set[int] = set()
    for ip in allotted.ips:
        try:
            address = ipaddress.ip_interface(ip.address)
        except ValueError as error:
            raise spec.CniError(spec.DECODING, f"IPAM's result: address {error}") from None
        if not ip.gateway and conf.is_gateway:
            ip = ip._replace(gateway=str(address.network.network_address + 1))
        ips.append(ip)
        if conf.is_default_gateway and address.version not in defaulted:
            defaulted.add(address.version)
            default = DEFAULTS[address.version]
            if not any(route.dst == default and route.gw for route in routes):
                routes.append(results.Route(default, ip.gateway))
    return ips, routes


def addresses(ips: list[results.Ip]) -> list[IpInterface]:
    """Return the gateways' addresses with their networks' prefix lengths."""
    found = (f"{ip.gateway}/{ip.address.partition('/')[2]}" for ip in ips if ip.gateway)
    return [ipaddress.ip_interface(text) for text in dict.fromkeys(found)]


def kernel_route(route: results.Route, ips: list[results.Ip]) -> rtnl.Route:
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
