"""Results of ADD: their parts, and the shape that each version of the specification gives them. Pure."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from cni.spec import BAD_CONFIG, DECODING, INCOMPATIBLE, CniError, at_least


class Interface(NamedTuple):
    """One of a result's interfaces; without a sandbox it is on the host."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int = 0
    socket_path: str = ""
    pci_id: str = ""


class Ip(NamedTuple):
    """One of a result's addresses, `address` with its prefix length; `interface` is an index into the interfaces."""

    address: str
    gateway: str = ""
    interface: int | None = None


class Route(NamedTuple):
    """One of a result's routes; None and 0 are unset."""

    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


class Dns(NamedTuple):
    """A result's resolver settings."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def render(self) -> dict[str, Any]:
        """Return the object with what is set."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items() if value
        }


class Result(NamedTuple):
    """What ADD answers, in no version's shape."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()


def render(result: Result, version: str) -> str:
    """Return the result in one version's shape. Raise `CniError` when that shape cannot hold it."""
    answer = _old(result, version) if not at_least(version, "0.3.0") else _new(result, version)
    return json.dumps(answer) + "\n"  # without indent: that is 10 times slower, in Python


def _new(result: Result, version: str) -> dict[str, Any]:
    one, newest = at_least(version, "1.0.0"), at_least(version, "1.1.0")
    answer: dict[str, Any] = {"cniVersion": version}
    if result.interfaces:
        answer["interfaces"] = [_interface(interface, newest) for interface in result.interfaces]
    if result.ips:
        answer["ips"] = [_ip(ip, with_family=not one) for ip in result.ips]
    if result.routes:
        answer["routes"] = [_route(route, newest) for route in result.routes]
    dns = result.dns.render()
    if dns or not one:
        answer["dns"] = dns
    return answer


def _interface(interface: Interface, newest: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"name": interface.name}
    if interface.mac:
        answer["mac"] = interface.mac
    if newest and interface.mtu:
        answer["mtu"] = interface.mtu
    if interface.sandbox:
        answer["sandbox"] = interface.sandbox
    if newest and interface.socket_path:
        answer["socketPath"] = interface.socket_path
    if newest and interface.pci_id:
        answer["pciID"] = interface.pci_id
    return answer


def _ip(ip: Ip, *, with_family: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"version": "6" if ":" in ip.address else "4"} if with_family else {}
    if ip.interface is not None:
        answer["interface"] = ip.interface
    answer["address"] = ip.address
    if ip.gateway:
        answer["gateway"] = ip.gateway
    return answer


def _route(route: Route, newest: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"dst": route.dst}
    if route.gw:
        answer["gw"] = route.gw
    if newest:
        answer |= {key: getattr(route, key) for key in ("mtu", "advmss", "priority") if getattr(route, key)}
        answer |= {key: getattr(route, key) for key in ("table", "scope") if getattr(route, key) is not None}
    return answer


def _old(result: Result, version: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"cniVersion": version}
    for key, colon in (("ip4", False), ("ip6", True)):
        ip = next((ip for ip in result.ips if (":" in ip.address) == colon), None)
        if ip is None:
            continue
        answer[key] = {"ip": ip.address} | ({"gateway": ip.gateway} if ip.gateway else {})
        routes = [_route(route, False) for route in result.routes if (":" in route.dst) == colon]
        if routes:
            answer[key]["routes"] = routes
    if "ip4" not in answer and "ip6" not in answer:
        raise CniError(INCOMPATIBLE, f"cannot convert: a result of version {version} needs at least one IP address")
    answer["dns"] = result.dns.render()
    return answer


def parse_result(raw: object, version: str, where: str = "prevResult") -> Result:
    """Return a result read in `version`'s shape. Raise `CniError` 6 or 7, naming the field after `where`."""
    if not isinstance(raw, dict):
        raise CniError(DECODING, f"field {where} is not an object: expected a result of version {version}")
    if "ip4" in raw or "ip6" in raw:
        return _parse_old(raw, where)
    return Result(
        interfaces=tuple(_parse_interface(entry, at) for at, entry in _objects(raw, "interfaces", where)),
        ips=tuple(_parse_ip(entry, "address", at) for at, entry in _objects(raw, "ips", where)),
        routes=tuple(_parse_result_route(entry, at) for at, entry in _objects(raw, "routes", where)),
        dns=parse_dns(raw.get("dns"), f"{where}.dns"),
    )


def _parse_old(raw: Mapping[str, Any], where: str) -> Result:
    ips, routes = [], []
    for key in ("ip4", "ip6"):
        part = raw.get(key)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise CniError(DECODING, f"field {where}.{key} is not an object")
        ips.append(_parse_ip(part, "ip", f"{where}.{key}"))
        routes += [_parse_result_route(entry, at) for at, entry in _objects(part, "routes", f"{where}.{key}")]
    return Result(ips=tuple(ips), routes=tuple(routes), dns=parse_dns(raw.get("dns"), f"{where}.dns"))


def _parse_interface(entry: Mapping[str, Any], where: str) -> Interface:
    keys = ("name", "mac", "sandbox", "socketPath", "pciID")
    name, mac, sandbox, socket_path, pci_id = (_text(entry, key, where) for key in keys)
    mtu = entry.get("mtu") or 0
    if not isinstance(mtu, int) or isinstance(mtu, bool):
        raise CniError(DECODING, f"field {where}.mtu is not a whole number: {mtu!r}")
    return Interface(name, mac, sandbox, mtu, socket_path, pci_id)


def _parse_ip(entry: Mapping[str, Any], key: str, where: str) -> Ip:
    address, gateway = _text(entry, key, where), _text(entry, "gateway", where)
    _refuse_unparsed(ipaddress.ip_interface, address, f"{where}.{key}")
    if gateway:
        _refuse_unparsed(ipaddress.ip_address, gateway, f"{where}.gateway")
        if (":" in gateway) != (":" in address):
            raise CniError(DECODING, f"field {where}.gateway: {gateway} is not of the family of {address}")
    interface = entry.get("interface")
    if interface is not None and (not isinstance(interface, int) or isinstance(interface, bool)):
        raise CniError(DECODING, f"field {where}.interface is not a whole number: {interface!r}")
    return Ip(address, gateway, interface)


def _parse_result_route(entry: Mapping[str, Any], where: str) -> Route:
    route = parse_route(entry, where)
    _refuse_unparsed(partial(ipaddress.ip_network, strict=False), route.dst, f"{where}.dst")
    if route.gw:
        _refuse_unparsed(ipaddress.ip_address, route.gw, f"{where}.gw")
    return route


def _objects(raw: Mapping[str, Any], key: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list, each with where it stands."""
    entries = raw.get(key) or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CniError(DECODING, f"field {where}.{key} is not a list of objects")
    return [(f"{where}.{key}[{number}]", entry) for number, entry in enumerate(entries)]


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key) or ""
    if not isinstance(value, str):
        raise CniError(DECODING, f"field {where}.{key} is not text: {value!r}")
    return value


def _refuse_unparsed(parse: Callable[[str], object], value: str, where: str) -> None:
    try:
        parse(value)
    except ValueError as error:
        raise CniError(DECODING, f"field {where}: {error}") from None


def parse_route(entry: object, where: str) -> Route:
    """Return one route of a configuration or result. Raise `CniError` 7 naming the field."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dst"), str):
        raise CniError(BAD_CONFIG, f"field {where}: a route is an object with dst as text, not {entry!r}")
    for key in ("mtu", "advmss", "priority", "table", "scope"):
        value = entry.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32):
            raise CniError(BAD_CONFIG, f"field {where}: route {entry['dst']}: {key} is {value!r}, expected a number")
    gateway = entry.get("gw") or ""
    if not isinstance(gateway, str):
        raise CniError(BAD_CONFIG, f"field {where}: route {entry['dst']}: gw is {gateway!r}, expected an address")
    return Route(
        dst=entry["dst"], gw=gateway, mtu=entry.get("mtu") or 0, advmss=entry.get("advmss") or 0,
        priority=entry.get("priority") or 0, table=entry.get("table"), scope=entry.get("scope"),
    )  # fmt: skip


def parse_dns(raw: object, where: str) -> Dns:
    """Return resolver settings. Raise `CniError` 7 naming the field."""
    if raw is None:
        return Dns()
    if not isinstance(raw, dict):
        raise CniError(BAD_CONFIG, f"field {where} is not an object")
    lists = {}
    for key in ("nameservers", "search", "options"):
        value = raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CniError(BAD_CONFIG, f"field {where}.{key} is not a list of text")
        lists[key] = tuple(value)
    domain = raw.get("domain") or ""
    if not isinstance(domain, str):
        raise CniError(BAD_CONFIG, f"field {where}.domain is not text")
    return Dns(lists["nameservers"], domain, lists["search"], lists["options"])
