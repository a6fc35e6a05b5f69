"""IPAM's configuration, host-local's schema: range sets, routes, requested addresses; parsed and validated. Pure."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cni import results, spec

TYPE = "pynet-ipam"


class Range(NamedTuple):
    """Addresses to hand out, first and last included, as numbers; the gateway is never handed out."""

    subnet: str
    family: int
    prefix: int
    first: int
    last: int
    gateway: int


RangeSet = tuple[Range, ...]
"""Ranges of one family from which a pod gets one address."""


class IpamConf(NamedTuple):
    """What `ipam` asks for."""

    network: str
    sets: tuple[RangeSet, ...]
    routes: tuple[results.Route, ...] = ()
    resolv_conf: str = ""
    data_dir: str = ""
    requested: tuple[str, ...] = ()


def packed(number: int, family: int) -> bytes:
    """Return an address's bytes."""
    return number.to_bytes(4 if family == 4 else 16, "big")


def shown(number: int, family: int) -> str:
    """Return an address as text."""
    return str(ipaddress.IPv4Address(number) if family == 4 else ipaddress.IPv6Address(number))


def parse(config: Mapping[str, Any], args: Mapping[str, str], version: str, state_dir: str) -> IpamConf:
    """Return the checked IPAM configuration of a network configuration. Raise `CniError` naming the field."""
    ipam = config.get("ipam")
    if not isinstance(ipam, dict):
        raise spec.CniError(spec.BAD_CONFIG, "field ipam is missing: expected an object with type and ranges")
    sets = list(_sets(config, ipam))
    if not sets:
        raise spec.CniError(spec.BAD_CONFIG, "field ipam.ranges: no IP ranges specified")
    _refuse_overlaps(sets)
    if not spec.at_least(version, "0.3.0"):
        _refuse_too_many(sets, version)
    return IpamConf(
        network=str(config.get("name", "")),
        sets=tuple(sets),
        routes=tuple(_route(raw) for raw in _list(ipam.get("routes"), "ipam.routes")),
        resolv_conf=_text(ipam.get("resolvConf"), "ipam.resolvConf"),
        data_dir=_data_dir(ipam) or f"{state_dir}/ipam",
        requested=tuple(_requested(config, args)),
    )


def _data_dir(ipam: Mapping[str, Any]) -> str:
    """Return where the reservations are to be. Agent and executable run in different folders, so a whole path it is."""
    path = _text(ipam.get("dataDir"), "ipam.dataDir")
    if path and not path.startswith("/"):
        raise spec.CniError(spec.BAD_CONFIG, f"field ipam.dataDir: {path} is not an absolute path")
    return path


def _sets(config: Mapping[str, Any], ipam: Mapping[str, Any]) -> Iterator[RangeSet]:
    """Yield the range sets in the order of precedence: run time, old flat keys, `ranges`."""
    runtime = _object(config.get("runtimeConfig"), "runtimeConfig")
    for number, raw in enumerate(_list(runtime.get("ipRanges"), "runtimeConfig.ipRanges")):
        yield _range_set(raw, f"runtimeConfig.ipRanges[{number}]")
    if ipam.get("subnet"):
        yield (_range(ipam, "ipam"),)
    for number, raw in enumerate(_list(ipam.get("ranges"), "ipam.ranges")):
        yield _range_set(raw, f"ipam.ranges[{number}]")


def _range_set(raw: Any, where: str) -> RangeSet:
    ranges = tuple(_range(entry, f"{where}[{number}]") for number, entry in enumerate(_list(raw, where)))
    if not ranges:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}: a range set holds at least one range")
    if len({entry.family for entry in ranges}) > 1:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}: mixed address families in one range set")
    return ranges


def _range(raw: Any, where: str) -> Range:
    entry = _object(raw, where)
    subnet = _text(entry.get("subnet"), f"{where}.subnet")
    if not subnet:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}.subnet is missing")
    try:
        interface = ipaddress.ip_interface(subnet)
    except ValueError as error:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}.subnet: {error}") from None
    network = interface.network
    if "/" not in subnet or "%" in subnet:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}.subnet: {subnet} is not a CIDR address")
    if network.prefixlen > network.max_prefixlen - 2:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}.subnet: network {subnet} too small to allocate from")
    if interface.ip != network.network_address:
        raise spec.CniError(
            spec.BAD_CONFIG, f"field {where}.subnet: network {subnet} has host bits set; the network is {network}"
        )
    family = network.version
    low, high = int(network.network_address), int(network.broadcast_address)

    def bound(key: str, default: int) -> int:
        text = _text(entry.get(key), f"{where}.{key}")
        if not text:
            return default
        found = address(text, f"{where}.{key}")
        if found.version != family:
            raise spec.CniError(spec.BAD_CONFIG, f"field {where}.{key}: {text} is not of the family of {subnet}")
        if key != "gateway" and found not in network:
            raise spec.CniError(spec.BAD_CONFIG, f"field {where}.{key}: {text} not in network {subnet}")
        return int(found)

    first = bound("rangeStart", low + 1)
    last = bound("rangeEnd", high - 1 if family == 4 else high)
    if last < first:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}.rangeEnd is before rangeStart")
    return Range(str(network), family, network.prefixlen, first, last, bound("gateway", low + 1))


def _refuse_overlaps(sets: list[RangeSet]) -> None:
    found = sorted((entry.family, entry.first, entry.last, entry.subnet) for ranges in sets for entry in ranges)
    for (family, first, last, subnet), (other_family, other, _, other_subnet) in itertools.pairwise(found):
        if family == other_family and other <= last:
            raise spec.CniError(
                spec.BAD_CONFIG,
                f"field ipam.ranges: ranges overlap: {subnet} from {shown(first, family)} to {shown(last, family)}"
                f" and {other_subnet} from {shown(other, family)}",
            )


def _refuse_too_many(sets: list[RangeSet], version: str) -> None:
    for family in (4, 6):
        if sum(ranges[0].family == family for ranges in sets) > 1:
            raise spec.CniError(
                spec.BAD_CONFIG, f"field ipam.ranges: CNI version {version} holds one IPv{family} address at most"
            )


def _route(raw: Any) -> results.Route:
    route = results.parse_route(raw, "ipam.routes")
    try:
        destination = ipaddress.ip_network(route.dst, strict=False)
    except ValueError as error:
        raise spec.CniError(spec.BAD_CONFIG, f"field ipam.routes.dst: {error}") from None
    if route.gw and address(route.gw, "ipam.routes.gw").version != destination.version:
        raise spec.CniError(spec.BAD_CONFIG, f"field ipam.routes: gw {route.gw} is not of the family of {route.dst}")
    return route


def _requested(config: Mapping[str, Any], args: Mapping[str, str]) -> Iterator[str]:
    """Yield requested addresses without prefix lengths, in the order CNI_ARGS, args.cni.ips, runtimeConfig.ips."""
    cni_args = _object(_object(config.get("args"), "args").get("cni"), "args.cni")
    runtime = _object(config.get("runtimeConfig"), "runtimeConfig")
    found = [("CNI_ARGS: IP", text.strip()) for text in args.get("IP", "").split(",") if text.strip()]
    found += [("args.cni.ips", text) for text in _list(cni_args.get("ips"), "args.cni.ips")]
    found += [("runtimeConfig.ips", text) for text in _list(runtime.get("ips"), "runtimeConfig.ips")]
    for where, text in found:
        plain = _text(text, where).partition("/")[0]
        yield str(address(plain, where))


def address(text: str, where: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return one address. Raise `CniError` naming the field."""
    try:
        if "%" in text:
            raise ValueError(f"{text!r} has a zone")
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise spec.CniError(spec.BAD_CONFIG, f"field {where}: {error}") from None
    if found.version == 6 and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def _object(raw: Any, where: str) -> Mapping[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise spec.CniError(spec.BAD_CONFIG, f"field {where} is not an object")
    return raw


def _list(raw: Any, where: str) -> list[Any]:
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise spec.CniError(spec.BAD_CONFIG, f"field {where} is not a list")
    return raw


def _text(raw: Any, where: str) -> str:
    if raw is None:
        return ""
    if not isinstance(raw, str):
        raise spec.CniError(spec.BAD_CONFIG, f"field {where} is not text: {raw!r}")
    return raw
