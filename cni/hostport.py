"""Host ports of a pod: which mappings go to which of its addresses, and their map elements. Pure.

A mapping without hostIP is for both families that the pod has; 0.0.0.0 and :: are all addresses of one family.
"""

from __future__ import annotations

import ipaddress
from _blake2 import blake2b  # hashlib would load all of OpenSSL
from typing import NamedTuple

from cni import spec
from cni.netconf import PROTOCOLS, PortMapping
from cni.ruleset import HERE, UNMARK

ANY = {4: "0.0.0.0", 6: "::"}
OWN, ALL, NONE = "own", "all", "none"
"""Whose connections through a host port are masqueraded: those of the pod's network and loopback, all (masqAll), or
nobody's (snat false)."""
LOOPBACK = {4: ("127.0.0.0/8",), 6: ()}
"""Where the host's own loopback reaches host ports from; the kernel takes no answer to ::1 that comes from a link."""


class Forward(NamedTuple):
    """One host port of one family: `host` is the host's address, or 0.0.0.0 or :: for all."""

    family: int
    protocol: str
    host: str
    host_port: int
    pod: str
    subnet: str
    pod_port: int
    masquerade: str = OWN


def forwards(
    mappings: tuple[PortMapping, ...], addresses: list[tuple[str, str]], masquerade: str = OWN
) -> list[Forward]:
    """Return what to forward to the pod's first address (with its subnet) of each family. Raise `CniError`."""
    firsts: dict[int, tuple[str, str]] = {}
    for address, subnet in addresses:
        firsts.setdefault(ipaddress.ip_address(address).version, (address, subnet))
    found = []
    for mapping in mappings:
        wanted = ipaddress.ip_address(mapping.host_ip).version if mapping.host_ip else 0
        for family, (address, subnet) in firsts.items():
            if wanted in (0, family):
                host = mapping.host_ip or ANY[family]
                to = (address, subnet, mapping.container_port)
                found.append(Forward(family, mapping.protocol, host, mapping.host_port, *to, masquerade))
    targets: dict[tuple[int, str, str, int], int] = {}
    for one in found:
        first = targets.setdefault((one.family, one.protocol, one.host, one.host_port), one.pod_port)
        if first != one.pod_port:
            raise spec.CniError(
                spec.BAD_CONFIG,
                f"field runtimeConfig.portMappings: {one.protocol} port {one.host_port} of {one.host} is mapped to two "
                f"container ports, {first} and {one.pod_port}",
            )
    return list(dict.fromkeys(found))


def elements(forward: Forward, tag: str) -> list[str]:
    """Return the map elements of one host port, its owner's tag as comment."""
    port = f'{_port_key(forward)} comment "{tag}" : {forward.pod} . {forward.pod_port}'
    return [
        f"{HERE} {_port_map(forward)} {{ {port} }}",
        f'{_backward(forward)} comment "{tag}" : goto {chain_name(forward)} }}',
    ]


def keys(forward: Forward) -> list[str]:
    """Return the elements' maps and keys, as removal names them."""
    return [f"{HERE} {_port_map(forward)} {{ {_port_key(forward)} }}", f"{_backward(forward)} }}"]


def _backward(forward: Forward) -> str:
    return f"{HERE} hairpin{forward.family} {{ {forward.pod} . {forward.protocol} . {forward.pod_port}"


def chain_name(forward: Forward) -> str:
    """Return the name of the chain for connections to pods of one subnet that came through a host port."""
    if forward.masquerade != OWN:
        return f"hairpin-{forward.masquerade}"
    return "hairpin-" + blake2b(forward.subnet.encode(), digest_size=6).hexdigest()


def chains(forwards: list[Forward]) -> str:
    """Return the chains: who is in the pod's own network, or on the host's loopback, comes under the host's address.

    Its answers would otherwise not come back through the host, which has to translate them. With masqAll, everybody.
    Of others the mark goes.
    """
    lines: dict[str, None] = {}
    for forward in forwards:
        name = chain_name(forward)
        ip = "ip" if forward.family == 4 else "ip6"
        sources = [f"{ip} saddr {source} " for source in (forward.subnet, *LOOPBACK[forward.family])]
        masquerades = {OWN: sources, ALL: [""], NONE: []}[forward.masquerade]
        lines |= dict.fromkeys((f"add chain {HERE} {name}", f"flush chain {HERE} {name}"))
        lines |= dict.fromkeys(f"add rule {HERE} {name} {source}masquerade" for source in masquerades)
        lines[f"add rule {HERE} {name} {UNMARK}"] = None
    return "".join(f"{line}\n" for line in lines)


def needs_localhost(forward: Forward) -> bool:
    """Say whether the port is to be reached under 127.0.0.1, for which the kernel must route loopback addresses."""
    if forward.family != 4 or forward.masquerade == NONE:
        return False
    return forward.host == ANY[4] or ipaddress.ip_address(forward.host).is_loopback


def overlap(one: str, other: str) -> bool:
    """Say whether two host addresses of the same family cannot hold the same port."""
    if ipaddress.ip_address(one).version != ipaddress.ip_address(other).version:
        return False
    return one == other or ANY[ipaddress.ip_address(one).version] in (one, other)


def _port_map(forward: Forward) -> str:
    return f"{'anyports' if forward.host == ANY[forward.family] else 'ports'}{forward.family}"


def _port_key(forward: Forward) -> str:
    if forward.host == ANY[forward.family]:
        return f"{forward.protocol} . {forward.host_port}"
    return f"{forward.protocol} . {forward.host} . {forward.host_port}"


def protocol_number(name: str) -> int:
    """Return a transport protocol's number."""
    return PROTOCOLS[name]
