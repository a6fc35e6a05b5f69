"""Why a connection reaches its Service, or does not: the plan's answer, with the field of the object behind each step.

Pure: works on what the sources said and what the plan decided, reads no kernel. Answers are findings, in the order in
which a packet meets them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from proxy.cluster import Cluster
from proxy.endpoints import Candidate, Place, found_for
from proxy.plan import (
    Action,
    Endpoint,
    Frontend,
    FrontendKind,
    Origin,
    OutcomeKind,
    Packet,
    Plan,
    ServerKey,
    VirtualServer,
    inside,
    is_loopback,
    origin_of,
    serves_node_ports,
    verdict,
)
from proxy.planning import Contest

_FIELDS = {
    FrontendKind.CLUSTER_IP: "spec.clusterIPs",
    FrontendKind.NODE_PORT: "spec.ports[].nodePort",
    FrontendKind.LOAD_BALANCER: "status.loadBalancer.ingress",
    FrontendKind.EXTERNAL_IP: "spec.externalIPs",
}
_ORIGINS = {
    Origin.POD: "a pod, as --detect-local-mode tells",
    Origin.NODE: "this node itself",
    Origin.OUTSIDE: "outside of this node's pods",
}


class Finding(msgspec.Struct, frozen=True):
    """One step of an answer. `source`: the object and field (or flag) that decided it."""

    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.text}  [{self.source}]" if self.source else self.text


class Answer(msgspec.Struct, frozen=True):
    """What becomes of a connection, in one word, and the findings that lead there."""

    outcome: OutcomeKind
    findings: tuple[Finding, ...]


def explain(
    cluster: Cluster, plan: Plan, contests: Iterable[Contest], place: Place, packet: Packet, addresses: Collection[str]
) -> Answer:
    """Return what becomes of `packet` on the node with these `addresses`, and why."""
    outcome = verdict(plan, packet, addresses)
    if outcome.key is None or outcome.frontend is None:
        return Answer(outcome.kind, tuple(_no_service(plan, contests, packet, addresses, outcome.kind)))
    server = plan.servers[outcome.key]
    frontend = outcome.frontend
    origin = origin_of(plan.settings, packet, addresses)
    found = [
        Finding(
            f"{packet.destination}:{packet.port}/{packet.protocol} is port {server.key.port_name!r} of the Service",
            f"Service {server.key.service} {_FIELDS[frontend.kind]}",
        ),
        Finding(f"{packet.source} is {_ORIGINS[origin]}", f"--detect-local-mode {plan.settings.detector.kind.value}"),
        *_lost(contests, server.key),
        *_ranges(server, frontend, packet),
        *_policy(server, frontend, origin),
        *_candidates(cluster, server, place),
    ]
    for choice in outcome.choices:
        seen = "one of this node's addresses" if choice.masquerade else packet.source
        found.append(
            Finding(f"to {_shown(choice.endpoint)}, {choice.probability:.0%}, which sees {seen} as the source")
        )
    if outcome.kind is OutcomeKind.FORWARD and server.affinity_seconds:
        seconds = server.affinity_seconds
        source = f"Service {server.key.service} spec.sessionAffinity"
        found.append(Finding(f"a client stays with its endpoint for {seconds} s after its last connection", source))
    if outcome.kind is OutcomeKind.REJECT:
        found.append(Finding("refused at once: no endpoint is usable anywhere"))
    return Answer(outcome.kind, tuple(found))


def _no_service(
    plan: Plan, contests: Iterable[Contest], packet: Packet, addresses: Collection[str], outcome: OutcomeKind
) -> Iterable[Finding]:
    """Say what comes nearest where no frontend is met."""
    near = False
    for key, server in sorted(plan.servers.items()):
        for frontend in server.frontends:
            where = f"Service {key.service} {_FIELDS[frontend.kind]}"
            if frontend.kind is FrontendKind.NODE_PORT:
                if frontend.port == packet.port and key.protocol == packet.protocol:
                    near = True
                    yield _node_port_missed(plan, packet, addresses, where)
            elif frontend.address == packet.destination:
                near = True
                has = f"{frontend.port}/{key.protocol}"
                yield Finding(f"{packet.destination} belongs to a Service that has {has} here, not this port", where)
    for contest in contests:
        if contest.port == packet.port and contest.address in ("", packet.destination):
            near = True
            yield Finding(str(contest), f"Service {contest.loser.service}")
    if outcome is OutcomeKind.DROP:
        text = f"{packet.destination} is in a network of cluster IPs, and no Service has it: dropped in silence"
        yield Finding(text, "ServiceCIDR spec.cidrs")
    elif not near:
        yield Finding("no Service has this address or node port: the packet is routed as if there were no proxy")


def _node_port_missed(plan: Plan, packet: Packet, addresses: Collection[str], where: str) -> Finding:
    if is_loopback(packet.destination):
        return Finding("node ports do not answer on this loopback address", "--iptables-localhost-nodeports")
    if packet.destination not in addresses:
        return Finding(f"{packet.port} is a node port, but {packet.destination} is no address of this node", where)
    assert not serves_node_ports(plan.settings, packet.destination, addresses)
    allowed = ", ".join(plan.settings.node_port_addresses)
    return Finding(f"node ports answer on addresses inside of {allowed} only", "--nodeport-addresses")


def _lost(contests: Iterable[Contest], key: ServerKey) -> Iterable[Finding]:
    for contest in contests:
        if contest.loser == key:
            yield Finding(str(contest), f"Service {contest.winner.service} metadata.creationTimestamp")


def _ranges(server: VirtualServer, frontend: Frontend, packet: Packet) -> Iterable[Finding]:
    if frontend.source_ranges is None:
        return
    source = f"Service {server.key.service} spec.loadBalancerSourceRanges"
    inner = inside(packet.source, frontend.source_ranges)
    yield Finding(f"{packet.source} is {'one' if inner else 'none'} of those who may use this address", source)


def _policy(server: VirtualServer, frontend: Frontend, origin: Origin) -> Iterable[Finding]:
    decided = frontend.verdict_for(origin)
    internal = frontend.kind is FrontendKind.CLUSTER_IP
    source = f"Service {server.key.service} spec.{'internal' if internal else 'external'}TrafficPolicy"
    if decided.action is Action.LOCAL:
        yield Finding("only endpoints of this node may answer", source)
    elif decided.action is Action.DROP:
        yield Finding("only endpoints of this node may answer, and it has none: dropped in silence", source)


def _candidates(cluster: Cluster, server: VirtualServer, place: Place) -> Iterable[Finding]:
    """Say for each endpoint that the slices name why it may or may not answer."""
    slices = list(cluster.slices(server.key.service))
    if not slices:
        yield Finding("no EndpointSlice (nor Endpoints) belongs to the Service", "label kubernetes.io/service-name")
        return
    found = found_for(slices, server.key.port_name, server.key.protocol)
    if not found:
        named = sorted({f"{name!r}/{protocol}" for piece in slices for name, protocol, _ in piece.ports})
        has = ", ".join(named) or "none"
        yield Finding(
            f"no slice has a port named {server.key.port_name!r}/{server.key.protocol}; there is {has}", "ports"
        )
        return
    chosen = {(endpoint.address, endpoint.port) for endpoint in (*server.cluster, *server.local)}
    for (address, port), candidate in sorted(found.items()):
        if (address, port) not in chosen:
            reason, field = _excluded(candidate, place)
            yield Finding(f"not to {_joined(address, port)}: {reason}", f"EndpointSlice endpoints[].{field}")


def _excluded(candidate: Candidate, place: Place) -> tuple[str, str]:
    if not candidate.ready and candidate.terminating:
        reason = "terminating, and others are ready" if candidate.serving else "terminating, and no longer serving"
        return reason, "conditions"
    if not candidate.ready:
        return "not ready", "conditions.ready"
    if candidate.zones or candidate.nodes:
        meant = ", ".join((*candidate.nodes, *candidate.zones))
        return f"meant for {meant}, and this is node {place.node} in zone {place.zone or '(none)'}", "hints"
    return f"on node {candidate.node or '(none)'}, where the traffic policy does not go", "nodeName"


def _shown(endpoint: Endpoint) -> str:
    where = "on this node" if endpoint.local else "elsewhere"
    return f"{_joined(endpoint.address, endpoint.port)} ({where})"


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
