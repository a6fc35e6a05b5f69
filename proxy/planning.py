"""The cluster → a `Plan`, kept up to date Service by Service. Pure.

Here traffic policies become verdicts, and here two Services that claim one address are told apart: the older one keeps
it. A planner's plan is a function of the cluster and the node alone, whatever way it came there.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from proxy.cluster import Cluster
from proxy.endpoints import NOTHING, Place, Selection, SliceFacts, found_for, select, serving
from proxy.plan import (
    Action,
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalKind,
    NodeSettings,
    Plan,
    PlanChange,
    ServerKey,
    Verdict,
    VirtualServer,
    inside,
)
from proxy.services import ServedPort, ServiceFacts
from pynet.objects import Object
from pynet.sources import Batch

Claim = tuple[str, str, int]  # address (empty: node port), protocol, port


class Contest(msgspec.Struct, frozen=True, order=True):
    """A frontend that a Service port asked for and another one, older, has."""

    loser: ServerKey
    winner: ServerKey
    address: str
    port: int

    def __str__(self) -> str:
        what = f"{self.address}:{self.port}" if self.address else f"node port {self.port}"
        return f"{self.loser}: {what} belongs to the older {self.winner}"


class Surroundings(msgspec.Struct, frozen=True):
    """What of the node decides in one family. `node_ips`: the node's own addresses as its Node object has them."""

    settings: NodeSettings
    place: Place = Place()
    node_ips: tuple[str, ...] = ()
    default_scheduler: str = "random"


def build(
    objects: Iterable[Object],
    family: Family,
    settings: NodeSettings,
    *,
    zone: str = "",
    node_ips: tuple[str, ...] = (),
    default_scheduler: str = "random",
) -> Plan:
    """Return the plan for `objects`: what tests and questions from an operator start from."""
    cluster = Cluster(settings.node_name)
    cluster.apply(Batch(upserts=tuple(objects)))
    place = Place(settings.node_name, zone)
    planner = Planner(family, Surroundings(settings, place, node_ips, default_scheduler))
    return planner.update(cluster, cluster.services).new


class Planner:
    """The plan of one family, and who claims what."""

    def __init__(self, family: Family, around: Surroundings) -> None:
        self._family = family
        self._around = around
        self._asked: dict[str, tuple[VirtualServer, ...]] = {}
        self._created: dict[str, str] = {}
        self._claims: dict[Claim, tuple[ServerKey, ...]] = {}
        self._contests: dict[str, tuple[Contest, ...]] = {}
        self._served: dict[str, tuple[ServerKey, ...]] = {}
        self.plan = Plan(family, around.settings)

    @property
    def contests(self) -> list[Contest]:
        """Return the claims that were lost, sorted."""
        return sorted(contest for lost in self._contests.values() for contest in lost)

    def update(self, cluster: Cluster, names: Iterable[str], around: Surroundings | None = None) -> PlanChange:
        """Take in the Services named (all that the cluster has, when `around` is new) and return the difference."""
        if around is not None and around != self._around:
            self._around = around
            names = {*cluster.services, *self._asked}
        affected = set()
        for name in names:
            facts = cluster.services.get(name)
            servers = servers_of(facts, cluster.slices(name), self._family, self._around) if facts else ()
            affected.add(name)
            affected.update(self._ask(name, facts.created if facts else "", servers))
        return self._settle(affected)

    def _ask(self, name: str, created: str, servers: tuple[VirtualServer, ...]) -> set[str]:
        """Note what a Service asks for; return the others that share a claim with what it asks or asked for."""
        others: set[str] = set()
        before = self._asked.get(name, ())
        is_same = _same_claims(before, servers) and self._created.get(name, created) == created
        for server in () if is_same else before:
            for claim in _claims(server):
                left = tuple(key for key in self._claims[claim] if key != server.key)
                others.update(key.service for key in left)
                if left:
                    self._claims[claim] = left
                else:
                    del self._claims[claim]
        self._created[name] = created
        for server in () if is_same else servers:
            for claim in _claims(server):
                there = self._claims.get(claim, ())
                others.update(key.service for key in there)
                self._claims[claim] = (*there, server.key)
        if servers:
            self._asked[name] = servers
        else:
            self._asked.pop(name, None)
            self._created.pop(name, None)
        return others

    def _rank(self, key: ServerKey) -> tuple[bool, str, ServerKey]:
        """Older first; without a time of creation last; then by name."""
        created = self._created[key.service]
        return not created, created, key

    def _settle(self, names: Iterable[str]) -> PlanChange:
        old = self.plan
        servers = dict(old.servers)
        changed: list[ServerKey] = []
        for name in sorted(names):
            wanted = self._won(name)
            for key in [key for key in self._served.get(name, ()) if key not in wanted]:
                del servers[key]
                changed.append(key)
            for key, server in wanted.items():
                if servers.get(key) != server:
                    servers[key] = server
                    changed.append(key)
            if wanted:
                self._served[name] = tuple(wanted)
            else:
                self._served.pop(name, None)
        if changed or old.settings != self._around.settings:
            self.plan = Plan(self._family, self._around.settings, servers)
        return PlanChange(old, self.plan, tuple(changed))

    def _won(self, name: str) -> dict[ServerKey, VirtualServer]:
        """Return what a Service asked for without the frontends that an older one has, and note those."""
        found = {}
        lost = []
        for server in self._asked.get(name, ()):
            frontends = []
            for frontend in server.frontends:
                claimants = self._claims[frontend.address, server.key.protocol, frontend.port]
                winner = claimants[0] if len(claimants) == 1 else min(claimants, key=self._rank)
                if winner == server.key:
                    frontends.append(frontend)
                else:
                    lost.append(Contest(server.key, winner, frontend.address, frontend.port))
            if len(frontends) != len(server.frontends):
                server = msgspec.structs.replace(server, frontends=tuple(frontends))
            found[server.key] = server
        if lost:
            self._contests[name] = tuple(lost)
        else:
            self._contests.pop(name, None)
        return found


def _claims(server: VirtualServer) -> Iterable[Claim]:
    protocol = server.key.protocol
    return ((frontend.address, protocol, frontend.port) for frontend in server.frontends)


def _same_claims(before: tuple[VirtualServer, ...], after: tuple[VirtualServer, ...]) -> bool:
    return len(before) == len(after) and all(
        b.key == a.key and (b.frontends is a.frontends or [*_claims(b)] == [*_claims(a)])
        for b, a in zip(before, after, strict=True)
    )


def servers_of(
    facts: ServiceFacts, slices: Iterable[SliceFacts], family: Family, around: Surroundings
) -> tuple[VirtualServer, ...]:
    """Return a Service's virtual servers, as if it were alone."""
    pieces = [piece for piece in slices if piece.family is family]
    weights = dict(facts.weights) if facts.weights else None
    return tuple(_server(facts, port, pieces, weights, around) for port in facts.ports.get(family, ()))


def _server(
    facts: ServiceFacts,
    port: ServedPort,
    slices: list[SliceFacts],
    weights: dict[str, int] | None,
    around: Surroundings,
) -> VirtualServer:
    found = found_for(slices, port.key.port_name, port.key.protocol)
    outside = port.reachable_from_outside
    uses_local = facts.internal_local or (facts.external_local and outside)
    selection = (
        select(
            found,
            around.place,
            uses_cluster=outside or not facts.internal_local,
            uses_local=uses_local,
            weights=weights,
        )
        if found
        else NOTHING
    )
    return VirtualServer(
        key=port.key,
        frontends=_frontends(facts, port, selection, around),
        cluster=selection.cluster,
        local=selection.local,
        affinity_seconds=facts.affinity_seconds,
        scheduler=facts.scheduler or around.default_scheduler,
        removal=facts.removal,
        draining=_draining(serving(found), selection) if found else (),
        health_check_port=facts.health_check_node_port,
    )


def _draining(answering: frozenset[tuple[str, int]], selection: Selection) -> tuple[Endpoint, ...]:
    chosen = {(e.address, e.port) for e in (*selection.cluster, *selection.local)}
    return tuple(Endpoint(address, port) for address, port in sorted(answering - chosen))


def _frontends(
    facts: ServiceFacts, port: ServedPort, selection: Selection, around: Surroundings
) -> tuple[Frontend, ...]:
    """Return the addresses of a Service port with their verdicts; an address that two fields name is the first's."""
    internal = _internal_verdicts(facts, selection, around.settings)
    found = [Frontend(FrontendKind.CLUSTER_IP, port.cluster_ip, port.port, *internal)]
    if not port.reachable_from_outside:
        return tuple(found)
    external = _external_verdicts(facts, selection)
    taken = {port.cluster_ip}
    for address in port.external_ips:
        if address not in taken:
            taken.add(address)
            found.append(Frontend(FrontendKind.EXTERNAL_IP, address, port.port, *external))
    for address in port.load_balancer_ips:
        if address not in taken:
            taken.add(address)
            ranges = _ranges_for(facts, address, around)
            found.append(Frontend(FrontendKind.LOAD_BALANCER, address, port.port, *external, ranges))
    if port.node_port:
        found.append(Frontend(FrontendKind.NODE_PORT, "", port.node_port, *external))
    return tuple(found)


def _action(is_local: bool, selection: Selection) -> Action:
    """Return what becomes of traffic under a policy: refused where nobody could answer, dropped where only others."""
    if not selection.exists:
        return Action.REJECT
    if is_local:
        return Action.LOCAL if selection.local else Action.DROP
    return Action.CLUSTER if selection.cluster else Action.REJECT


def _internal_verdicts(
    facts: ServiceFacts, selection: Selection, settings: NodeSettings
) -> tuple[Verdict, Verdict, Verdict]:
    """Return the cluster IP's verdicts for pod, node, outside: pods keep their address, as far as they are known."""
    action = _action(facts.internal_local, selection)
    forwards = action in (Action.CLUSTER, Action.LOCAL)
    for_pod = _VERDICTS[action, forwards and settings.masquerade_all]
    is_detected = settings.detector.kind is not LocalKind.NONE
    for_others = _VERDICTS[action, forwards and (settings.masquerade_all or is_detected)]
    return for_pod, for_others, for_others


def _external_verdicts(facts: ServiceFacts, selection: Selection) -> tuple[Verdict, Verdict, Verdict]:
    """Return the other addresses' verdicts for pod, node, outside.

    Cluster policy: masqueraded, since another node may answer. Local policy: pods and the node itself go anywhere (the
    short-circuit: they would reach a node that has an endpoint), the outside stays on this node and keeps its address.
    """
    anywhere = _action(False, selection)
    forwards = anywhere is Action.CLUSTER
    masqueraded = _VERDICTS[anywhere, forwards]
    if not facts.external_local:
        return masqueraded, masqueraded, masqueraded
    return _VERDICTS[anywhere, False], masqueraded, _VERDICTS[_action(True, selection), False]


_VERDICTS = {(action, masquerade): Verdict(action, masquerade) for action in Action for masquerade in (False, True)}


def _ranges_for(facts: ServiceFacts, address: str, around: Surroundings) -> tuple[str, ...] | None:
    """Return who may use a load balancer's address: the ranges, and the address itself where they hold this node.

    A node that has the address on an interface of its own sends with that address as the source.
    """
    family = Family.V6 if ":" in address else Family.V4
    ranges = facts.source_ranges.get(family)
    if ranges is None:
        return None
    if any(inside(ip, ranges) for ip in around.node_ips):
        return (*ranges, f"{address}/{128 if family is Family.V6 else 32}")
    return ranges
