"""What a lab's network looks like: subnets, ranges, and the addresses of nodes and client. Pure.

A topology is a file of `topologies/`. A node's index (1, 2, …) decides everything of it: its subnet, its underlay
addresses, its pod CIDRs, its zone; so a node that comes back has what it had before.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec
import yaml

FOLDER = Path(__file__).resolve().parent.parent / "topologies"
FAMILIES = ("IPv4", "IPv6")
NODE_BITS = {"IPv4": 24, "IPv6": 64}  # prefix length of a node's pod CIDR
FIRST_NODE_HOST = 10  # node N has host number 10 + N in its subnet
CLIENT_HOST = 200
LIMIT = 180  # nodes


class TopologyError(ValueError):
    """A topology that cannot be used; the message names file and field."""


class NodesPart(msgspec.Struct, frozen=True):
    """How many nodes there are unless the user says otherwise, and the subnets that they are dealt over in turn."""

    count: int
    subnets: tuple[str, ...]


class Topology(msgspec.Struct, frozen=True, rename="kebab"):
    """One file of `topologies/`. `ranges` and `subnets`: network by family."""

    about: str
    ranges: dict[str, dict[str, str]]
    subnets: dict[str, dict[str, str]]
    nodes: NodesPart
    client: str


def names() -> list[str]:
    """Return the names of the topologies that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Topology:
    """Return a topology by name."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise TopologyError(f"no topology {name!r}; there are: {', '.join(names())}")
    return parse(path.read_text(), path.name)


def parse(text: str, origin: str) -> Topology:
    """Return the topology that a file's text describes."""
    try:
        topology = msgspec.convert(yaml.safe_load(text), Topology)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise TopologyError(f"{origin}: {error}") from None
    for field, name in [("client", topology.client), *(("nodes.subnets", each) for each in topology.nodes.subnets)]:
        if name not in topology.subnets:
            raise TopologyError(f"{origin}: {field}: no subnet {name!r} under subnets")
    for kind in ("pods", "services"):
        if not topology.ranges.get(kind):
            raise TopologyError(f"{origin}: ranges.{kind}: missing")
    return topology


def families(ipv6: bool) -> tuple[str, ...]:
    """Return the address families of a lab."""
    return FAMILIES if ipv6 else FAMILIES[:1]


def host(network: str, number: int) -> str:
    """Return the address of host `number` in `network`."""
    return str(ipaddress.ip_network(network)[number])


def prefix_length(network: str) -> int:
    """Return the prefix length of `network`."""
    return ipaddress.ip_network(network).prefixlen


def node_subnet(topology: Topology, index: int) -> str:
    """Return the name of the subnet of node `index` (from 1)."""
    subnets = topology.nodes.subnets
    return subnets[(index - 1) % len(subnets)]


def node_addresses(topology: Topology, index: int, ipv6: bool) -> dict[str, str]:
    """Return the underlay addresses of node `index`, by family."""
    subnet = topology.subnets[node_subnet(topology, index)]
    return {family: host(subnet[family], FIRST_NODE_HOST + index) for family in families(ipv6)}


def addresses_named(topology: Topology, subnet: str, word: str, ipv6: bool) -> dict[str, str]:
    """Return what `word` says of a place in a subnet, by family: an address of it, or a host number, in every family.

    Raise `TopologyError` where that is neither.
    """
    networks = {family: ipaddress.ip_network(topology.subnets[subnet][family]) for family in families(ipv6)}
    try:
        if word.isdigit():
            return {family: str(network[int(word)]) for family, network in networks.items()}
        address = ipaddress.ip_address(word)
    except (ValueError, IndexError):
        raise TopologyError(f"{word!r} is no address, and no host number of {subnet}") from None
    for family, network in networks.items():
        if address in network:
            return {family: str(address)}
    raise TopologyError(f"{word} is not in {subnet}: {', '.join(map(str, networks.values()))}")


def client_addresses(topology: Topology, ipv6: bool) -> dict[str, str]:
    """Return the client's addresses, by family."""
    subnet = topology.subnets[topology.client]
    return {family: host(subnet[family], CLIENT_HOST) for family in families(ipv6)}


def gateways(topology: Topology, subnet: str, ipv6: bool) -> dict[str, str]:
    """Return the router's addresses in a subnet, by family: host 1."""
    return {family: host(topology.subnets[subnet][family], 1) for family in families(ipv6)}


def pod_cidrs(topology: Topology, index: int, ipv6: bool) -> tuple[str, ...]:
    """Return the pod CIDRs of node `index`, the first family first: the index-th network of the range."""
    found = []
    for family in families(ipv6):
        whole = ipaddress.ip_network(topology.ranges["pods"][family])
        size = whole.max_prefixlen - NODE_BITS[family]
        found.append(f"{whole.network_address + (index << size)}/{NODE_BITS[family]}")
    return tuple(found)


def cluster_cidrs(topology: Topology, ipv6: bool) -> tuple[str, ...]:
    """Return the ranges of all pods, by family order."""
    return tuple(topology.ranges["pods"][family] for family in families(ipv6))
