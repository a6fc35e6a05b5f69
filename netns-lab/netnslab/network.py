"""The wires of a lab: the `underlay` (a switch a subnet, and the router between them), the nodes' and client's links.

All of it is made inside namespaces: a veth pair is born with both ends where they belong, so the machine's own
namespace never sees one.
"""

from __future__ import annotations

import ipaddress

from . import machine
from . import topology as plan
from .state import Folder, NodeRecord, Spec

UPLINK = "eth0"  # a node's and the client's link to the switch
EVERYWHERE = {  # addresses usable at once; ICMP errors told to whoever asks again, not one in some seconds
    "net.ipv4.icmp_ratelimit": "0",
    "net.ipv6.icmp.ratelimit": "0",
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.all.accept_ra": "0",
    "net.ipv6.conf.default.accept_ra": "0",
}
ROUTER = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1", "net.ipv4.conf.all.rp_filter": "0"}


def switch(subnet: str) -> str:
    """Return the name of a subnet's switch in the underlay."""
    return f"sw-{subnet}"


def build_underlay(folder: Folder, topology: plan.Topology, ipv6: bool) -> None:
    """Make the underlay: one switch a subnet, with the router's address on it."""
    underlay = folder.netns("underlay")
    machine.add_namespace(folder.name, underlay)
    machine.sysctl(folder.name, underlay, {**EVERYWHERE, **ROUTER})
    lines = []
    for subnet, networks in topology.subnets.items():
        lines.append(f"link add {switch(subnet)} type bridge mcast_snooping 0")
        for family, gateway in plan.gateways(topology, subnet, ipv6).items():
            lines.append(f"address add {gateway}/{plan.prefix_length(networks[family])} dev {switch(subnet)}")
        lines.append(f"link set {switch(subnet)} up")
    machine.batch(folder.name, underlay, lines)


def attach(
    folder: Folder, topology: plan.Topology, netns: str, subnet: str, port: str, addresses: dict[str, str]
) -> None:
    """Make a namespace and join it to a switch: link, addresses, a default route to the router.

    The link's hardware address comes from the IPv4 address: a machine that comes back is known to its neighbours.
    """
    mac = "02:00:" + ":".join(f"{part:02x}" for part in ipaddress.IPv4Address(addresses["IPv4"]).packed)
    machine.add_namespace(folder.name, netns)
    machine.sysctl(folder.name, netns, EVERYWHERE)
    # the kernel takes a removed namespace's links away in its own time: the port of a machine of before may be there
    machine.run(["ip", "-n", folder.netns("underlay"), "link", "del", port], check=False)
    machine.batch(
        folder.name,
        folder.netns("underlay"),
        [
            f"link add {port} type veth peer name {UPLINK} address {mac} netns {netns}",
            f"link set {port} master {switch(subnet)} up",
        ],
    )
    machine.batch(folder.name, netns, _addressing(topology, subnet, addresses))


def _addressing(topology: plan.Topology, subnet: str, addresses: dict[str, str]) -> list[str]:
    networks = topology.subnets[subnet]
    lines = [f"address flush dev {UPLINK} scope global"]
    for family, address in addresses.items():
        lines.append(f"address add {address}/{plan.prefix_length(networks[family])} dev {UPLINK}")
    lines.append(f"link set {UPLINK} up")
    for family, gateway in plan.gateways(topology, subnet, "IPv6" in addresses).items():
        if family in addresses:
            lines.append(f"route replace default via {gateway} dev {UPLINK}")
    return lines


def attach_client(folder: Folder, topology: plan.Topology, spec: Spec) -> None:
    """Make the client, a machine outside of the cluster."""
    addresses = plan.client_addresses(topology, spec.ipv6)
    attach(folder, topology, folder.netns("client"), topology.client, "client", addresses)


def attach_node(folder: Folder, topology: plan.Topology, node: NodeRecord) -> None:
    """Make a node's machine."""
    attach(folder, topology, node.netns, node.subnet, node.port, node.addresses)


def readdress(folder: Folder, topology: plan.Topology, node: NodeRecord, addresses: dict[str, str]) -> None:
    """Give a node other underlay addresses."""
    machine.batch(folder.name, node.netns, _addressing(topology, node.subnet, addresses))


def connect(folder: Folder, node: NodeRecord, up: bool) -> None:
    """Plug a node's cable into the switch, or pull it."""
    machine.batch(folder.name, folder.netns("underlay"), [f"link set {node.port} {'up' if up else 'down'}"])


def remove_node(node: NodeRecord) -> None:
    """Remove a node's machine, and everything that runs on it."""
    machine.end(machine.processes_in(node.netns))
    machine.delete_namespace(node.netns)
