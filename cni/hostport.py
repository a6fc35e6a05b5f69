"""Host ports of a pod: which mappings go to which of its addresses, and their map elements. Pure.

A mapping without hostIP is for both families that the pod has; 0.0.0.0 and :: are all addresses of one family.
"""

from __future__ import annotations

import ipaddress
from _blake2 import blake2b  # hashlib would load all of OpenSSL
from typing import NamedTuple

from cni.netconf import PROTOCOLS, PortMapping
from cni.ruleset import HERE

ANY = {4: "0.0.0.0", 6: "::"}
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


def forwards(mappings: tuple[PortMapping, ...], addresses: list[tuple[str, str]]) -> list[Forward]:
    """Return what to forward to the pod's first address of each family, given as (address, subnet)."""
    firsts: dict[int, tuple[str, str]] = {}
    for address, subnet in addresses:
        firsts.setdefault(ipaddress.ip_address(address).version, (address, subnet))
    found = []
    for mapping in mappings:
        wanted = ipaddress.ip_address(mapping.host_ip).version if mapping.host_ip else 0
        for family, (address, subnet) in firsts.items():
            if wanted in (0, family):
                host = mapping.host_ip or ANY[family]
                found.append(
                    Forward(family, mapping.protocol, host, mapping.host_port, address, subnet, mapping.container_port)
                )
    return list(dict.fromkeys(found))


def elements(forward: Forward, tag: str) -> list[str]:
    """Return the map elements of one host port, its owner's tag as comment."""
    family, protocol = forward.family, forward.protocol
    backward = f"{forward.pod} . {protocol} . {forward.pod_port}"
    port = f'{_port_key(forward)} comment "{tag}" : {forward.pod} . {forward.pod_port}'
    return [
        f"{HERE} {_port_map(forward)} {{ {port} }}",
        f'{HERE} hairpin{family} {{ {backward} comment "{tag}" : goto {chain_name(forward.subnet)} }}',
    ]


def keys(forward: Forward) -> list[str]:
    """Return the elements' maps and keys, as removal names them."""
    backward = f"{forward.pod} . {forward.protocol} . {forward.pod_port}"
    return [
        f"{HERE} {_port_map(forward)} {{ {_port_key(forward)} }}",
        f"{HERE} hairpin{forward.family} {{ {backward} }}",
    ]


def chain_name(subnet: str) -> str:
    """Return the name of the chain for pods of one subnet that are reached through a host port."""
    return "hairpin-" + blake2b(subnet.encode(), digest_size=6).hexdigest()


def chain(subnet: str) -> str:
    """Return the chain: who is in the pod's own network, or on the host's loopback, comes under the host's address.

    Its answers would otherwise not come back through the host, which has to translate them.
    """
    family = ipaddress.ip_network(subnet).version
    ip = "ip" if family == 4 else "ip6"
    name = chain_name(subnet)
    sources = (subnet, *LOOPBACK[family])
    lines = [f"add chain {HERE} {name}", f"flush chain {HERE} {name}"]
    lines += [f"add rule {HERE} {name} {ip} saddr {source} masquerade" for source in sources]
    return "\n".join(lines) + "\n"


def needs_localhost(forward: Forward) -> bool:
    """Say whether the port is to be reached under 127.0.0.1, for which the kernel must route loopback addresses."""
    return forward.family == 4 and (forward.host == ANY[4] or ipaddress.ip_address(forward.host).is_loopback)


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
