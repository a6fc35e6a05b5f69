"""What must be true of Service traffic on one node, in one address family, in no mode's words.

The centre of the proxy, and pure: from `services.py` and `endpoints.py` it settles traffic policies, topology,
terminating endpoints, affinity and source ranges; a mode translates the result and never decides again. `verdict` says
what happens to a packet: the meaning against which every mode is tested, and from which `pyproxy explain` answers.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Collection
from functools import lru_cache

import msgspec


class Family(enum.Enum):
    """An address family; a plan is for one."""

    V4 = "IPv4"
    V6 = "IPv6"


class Origin(enum.Enum):
    """Where a packet to a Service comes from: what decides between verdicts."""

    POD = "pod"  # a pod of this node or of the cluster, as --detect-local-mode tells
    NODE = "node"  # a process of this node itself
    OUTSIDE = "outside"  # anything else


class Endpoint(msgspec.Struct, frozen=True, gc=False, order=True):
    """Where traffic can go. `local`: on this node."""

    address: str
    port: int
    local: bool = False
    weight: int = 1


class Action(enum.Enum):
    """What happens to a packet that meets a frontend."""

    CLUSTER = "cluster"  # forward to one of `VirtualServer.cluster`
    LOCAL = "local"  # forward to one of `VirtualServer.local`
    REJECT = "reject"  # answer at once: TCP reset or ICMP port unreachable
    DROP = "drop"  # silence: endpoints exist, but the policy keeps this traffic from them


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """An action, and whether the source address becomes the node's. Hairpin traffic is always masqueraded besides."""

    action: Action
    masquerade: bool = False


class FrontendKind(enum.Enum):
    """Which field of the Service an address comes from."""

    CLUSTER_IP = "clusterIP"
    NODE_PORT = "nodePort"
    LOAD_BALANCER = "loadBalancer"
    EXTERNAL_IP = "externalIP"


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """An address and port that clients use. `address` is empty for a node port: every node-port address of the node.

    `source_ranges`: networks that may use it; None: everybody. Whoever is outside of them is dropped.
    """

    kind: FrontendKind
    address: str
    port: int
    pod: Verdict
    node: Verdict
    outside: Verdict
    source_ranges: tuple[str, ...] | None = None

    def verdict_for(self, origin: Origin) -> Verdict:
        """Return the verdict for traffic of `origin` (source ranges not considered)."""
        return {Origin.POD: self.pod, Origin.NODE: self.node, Origin.OUTSIDE: self.outside}[origin]


class Scheduler(enum.Enum):
    """How an endpoint is chosen, in modes that have a choice; IPVS has more names of its own."""

    RANDOM = "random"
    ROUND_ROBIN = "rr"


class ServerKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """What names a Service port: `namespace/name`, the port's name, the protocol (TCP, UDP, SCTP)."""

    service: str
    port_name: str
    protocol: str

    def __str__(self) -> str:
        return (
            f"{self.service}:{self.port_name}/{self.protocol}" if self.port_name else f"{self.service}/{self.protocol}"
        )


class VirtualServer(msgspec.Struct, frozen=True, gc=False):
    """One Service port: where clients find it and which endpoints may answer.

    `cluster`, `local`: usable endpoints, sorted; already narrowed by topology, readiness and terminating fallback.
    `affinity_seconds`: 0, or how long a client address stays with its endpoint.
    `scheduler`: a `Scheduler` value or the name of an IPVS scheduler, as annotated or configured.
    `removal`: what becomes of established flows of a removed endpoint: keep, drain:SECONDS, reset.
    `health_check_port`: where this node tells a load balancer of its endpoints; 0: nowhere.
    `draining`: endpoints that get no new traffic from this node and still answer: their flows are not stale.
    """

    key: ServerKey
    frontends: tuple[Frontend, ...]
    cluster: tuple[Endpoint, ...]
    local: tuple[Endpoint, ...]
    affinity_seconds: int = 0
    scheduler: str = Scheduler.RANDOM.value
    removal: str = "keep"
    draining: tuple[Endpoint, ...] = ()
    health_check_port: int = 0


class LocalKind(enum.Enum):
    """How a packet is known to come from a pod (--detect-local-mode)."""

    NONE = "none"
    CIDR = "cidr"  # ClusterCIDR and NodeCIDR: the source is inside one of `cidrs`
    BRIDGE = "bridge"  # BridgeInterface: it arrived through `interface`
    PREFIX = "prefix"  # InterfaceNamePrefix: it arrived through an interface whose name begins so


class LocalDetector(msgspec.Struct, frozen=True):
    """Who counts as a pod. With `LocalKind.NONE` nobody does, and ClusterIP traffic is not masqueraded for it."""

    kind: LocalKind = LocalKind.NONE
    cidrs: tuple[str, ...] = ()
    interface: str = ""


class NodeSettings(msgspec.Struct, frozen=True):
    """What holds for the whole node, in this family.

    `node_port_addresses`: networks of the node's own addresses that serve node ports; empty: every local address.
    `localhost_node_ports`: node ports also answer on loopback addresses (IPv4 only).
    `masquerade_mark`: one bit; the bit above it (below it, for bit 31) is ours as well.
    `service_cidrs`: networks that cluster IPs are taken from: what no Service has of them, nobody is to reach.
    """

    node_name: str = ""
    detector: LocalDetector = LocalDetector()
    node_port_addresses: tuple[str, ...] = ()
    localhost_node_ports: bool = True
    masquerade_all: bool = False
    masquerade_mark: int = 0x4000
    service_cidrs: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """What must be true, for one node and one family. Never changed in place; successors share what did not change."""

    family: Family
    settings: NodeSettings = NodeSettings()
    servers: dict[ServerKey, VirtualServer] = {}


class PlanChange(msgspec.Struct, frozen=True):
    """From one plan to its successor: `keys` are the servers that were added, removed or changed."""

    old: Plan
    new: Plan
    keys: tuple[ServerKey, ...]


class Packet(msgspec.Struct, frozen=True):
    """The first packet of a connection, as it meets the node. `interface`: where it arrived; empty: made here."""

    source: str
    destination: str
    protocol: str = "TCP"
    port: int = 0
    interface: str = ""


class OutcomeKind(enum.Enum):
    """What becomes of a packet."""

    PASS = "pass"  # to no Service: routed as if there were no proxy
    FORWARD = "forward"
    REJECT = "reject"
    DROP = "drop"


class Choice(msgspec.Struct, frozen=True, order=True):
    """One endpoint that may be chosen, how often (0 to 1), and whether it sees the node's address as the source."""

    endpoint: Endpoint
    probability: float
    masquerade: bool


class Outcome(msgspec.Struct, frozen=True):
    """What becomes of a packet, and the Service port and frontend that decided it."""

    kind: OutcomeKind
    choices: tuple[Choice, ...] = ()
    key: ServerKey | None = None
    frontend: Frontend | None = None


PASS = Outcome(OutcomeKind.PASS)


@lru_cache(maxsize=4096)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)


def inside(address: str, networks: Collection[str]) -> bool:
    """Whether `address` is in one of `networks`."""
    parsed = ipaddress.ip_address(address)
    return any(parsed in _network(network) for network in networks)


def is_loopback(address: str) -> bool:
    """Whether `address` is one of the host's loopback addresses."""
    return ipaddress.ip_address(address).is_loopback


def origin_of(settings: NodeSettings, packet: Packet, addresses: Collection[str]) -> Origin:
    """Return what `packet` counts as; `addresses`: the node's own. A pod's address counts before a node's."""
    detector = settings.detector
    if (
        (detector.kind is LocalKind.CIDR and inside(packet.source, detector.cidrs))
        or (detector.kind is LocalKind.BRIDGE and packet.interface == detector.interface)
        or (detector.kind is LocalKind.PREFIX and packet.interface.startswith(detector.interface) and packet.interface)
    ):
        return Origin.POD
    if packet.source in addresses or is_loopback(packet.source):
        return Origin.NODE
    return Origin.OUTSIDE


def serves_node_ports(settings: NodeSettings, address: str, addresses: Collection[str]) -> bool:
    """Whether node ports answer on `address`; `addresses`: the node's own."""
    if is_loopback(address):
        if ":" in address or not settings.localhost_node_ports:
            return False
    elif address not in addresses:
        return False
    return not settings.node_port_addresses or inside(address, settings.node_port_addresses)


def is_unallocated(settings: NodeSettings, address: str, addresses: Collection[str]) -> bool:
    """Whether `address`, which no Service has, is in a ServiceCIDR; `addresses`: the node's own, which are its own."""
    return inside(address, settings.service_cidrs) and address not in addresses and not is_loopback(address)


def verdict(plan: Plan, packet: Packet, addresses: Collection[str] = ()) -> Outcome:
    """Return what becomes of `packet`, which starts a connection, on a node with these `addresses`.

    A frontend with an address of its own comes before a node port. A port that no Service has, on an address that is
    some Service's cluster IP, is refused; an address in a ServiceCIDR that is nobody's at all is dropped. Affinity is
    not considered: it narrows `choices` to one of them.
    """
    here = node_port = None
    is_cluster_ip = False
    for server in plan.servers.values():
        for frontend in server.frontends:
            if frontend.address == packet.destination:
                is_cluster_ip = is_cluster_ip or frontend.kind is FrontendKind.CLUSTER_IP
                if frontend.port == packet.port and server.key.protocol == packet.protocol:
                    here = server, frontend
            elif not frontend.address and frontend.port == packet.port and server.key.protocol == packet.protocol:
                node_port = server, frontend
    if here is None and is_cluster_ip:
        return Outcome(OutcomeKind.REJECT)
    if here is None and node_port and serves_node_ports(plan.settings, packet.destination, addresses):
        here = node_port
    if here is None:
        return Outcome(OutcomeKind.DROP) if is_unallocated(plan.settings, packet.destination, addresses) else PASS
    return _outcome(plan.settings, packet, addresses, *here)


def _outcome(
    settings: NodeSettings, packet: Packet, addresses: Collection[str], server: VirtualServer, frontend: Frontend
) -> Outcome:
    if frontend.source_ranges is not None and not inside(packet.source, frontend.source_ranges):
        return Outcome(OutcomeKind.DROP, (), server.key, frontend)
    decided = frontend.verdict_for(origin_of(settings, packet, addresses))
    endpoints = {Action.CLUSTER: server.cluster, Action.LOCAL: server.local}.get(decided.action, ())
    if decided.action is Action.DROP:
        return Outcome(OutcomeKind.DROP, (), server.key, frontend)
    if not endpoints:
        return Outcome(OutcomeKind.REJECT, (), server.key, frontend)
    total = sum(endpoint.weight for endpoint in endpoints)
    choices = tuple(
        Choice(endpoint, endpoint.weight / total, decided.masquerade or endpoint.address == packet.source)
        for endpoint in endpoints
    )
    return Outcome(OutcomeKind.FORWARD, choices, server.key, frontend)
