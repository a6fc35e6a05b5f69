"""Which endpoints may answer for a Service port: EndpointSlices (or Endpoints) → candidates → the two lists. Pure.

The selection is kube-proxy's CategorizeEndpoints: readiness, terminating fallback, topology hints, locality.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from proxy.plan import Endpoint, Family
from proxy.services import MAX_NAME, PROTOCOLS, canonical_address
from pynet.objects import BadObject, Endpoints, EndpointSlice, SliceEndpoint

SERVICE_LABEL = "kubernetes.io/service-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
TRIGGER_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
MAX_ENDPOINTS = 10_000
# in the usual spelling: 0.0.0.0, 127/8, 169.254/16, 224/4; ::, ::1, fe80::/10, ff00::/8
_SPECIAL = re.compile(r"0\.0\.0\.0$|127\.|169\.254\.|(22[4-9]|23\d)\.|::1?$|fe[89ab][0-9a-f]:|ff[0-9a-f]{2}:")


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One address of a slice. `zones`, `nodes`: hints, empty where there are none."""

    address: str
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


class SliceFacts(msgspec.Struct, frozen=True, gc=False):
    """What a slice offers: every candidate serves every port (name, protocol, number). `service`: namespace/name."""

    service: str
    family: Family
    ports: tuple[tuple[str, str, int], ...]
    candidates: tuple[Candidate, ...]
    triggered: str = ""


class Place(msgspec.Struct, frozen=True):
    """Where this node is: what makes an endpoint local or near."""

    node: str = ""
    zone: str = ""


class Selection(msgspec.Struct, frozen=True, gc=False):
    """The usable endpoints of one Service port, each list sorted.

    `exists`: a usable endpoint is somewhere, perhaps where a policy keeps traffic from it.
    """

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    exists: bool = False


NOTHING = Selection()


def facts_of_slice(piece: EndpointSlice) -> SliceFacts | None:
    """Return what a slice offers, None where it is not the proxy's. Raise `BadObject` that names the field."""
    meta = piece.metadata
    labels = meta.labels or {}
    service = labels.get(SERVICE_LABEL)
    if not service or HEADLESS_LABEL in labels or piece.address_type == "FQDN":
        return None
    where = f"EndpointSlice {meta.namespace}/{meta.name}"
    family = {"IPv4": Family.V4, "IPv6": Family.V6}.get(piece.address_type)
    if family is None:
        raise BadObject(where, "addressType", f"expected IPv4, IPv6 or FQDN, found {piece.address_type!r}")
    if len(piece.endpoints or ()) > MAX_ENDPOINTS:
        raise BadObject(where, "endpoints", f"{len(piece.endpoints or ())} entries; at most {MAX_ENDPOINTS} are taken")
    ports = []
    for index, port in enumerate(piece.ports or ()):
        if port.name is None or not port.port:
            continue
        protocol = port.protocol or "TCP"
        _check_port(where, f"ports[{index}]", port.name, protocol, port.port)
        ports.append((port.name, protocol, port.port))
    return SliceFacts(
        service=f"{meta.namespace}/{service}",
        family=family,
        ports=tuple(ports),
        candidates=tuple(
            _candidate(where, index, family, endpoint)
            for index, endpoint in enumerate(piece.endpoints or ())
            if endpoint.addresses
        ),
        triggered=(meta.annotations or {}).get(TRIGGER_ANNOTATION, ""),
    )


def facts_of_endpoints(endpoints: Endpoints) -> tuple[SliceFacts, ...]:
    """Return what v1 Endpoints offer, as slices: one a subset and family. Raise `BadObject`."""
    meta = endpoints.metadata
    if HEADLESS_LABEL in (meta.labels or {}):
        return ()
    where = f"Endpoints {meta.namespace}/{meta.name}"
    found = []
    for index, subset in enumerate(endpoints.subsets or ()):
        by_family: dict[Family, list[Candidate]] = {}
        for ready, addresses in ((True, subset.addresses), (False, subset.not_ready_addresses)):
            for entry in addresses or ():
                canonical = canonical_address(entry.ip)
                if canonical is None:
                    raise BadObject(where, f"subsets[{index}].addresses", f"{entry.ip[:60]!r} is no IP address")
                _check_address(where, f"subsets[{index}].addresses", canonical[1])
                candidate = Candidate(canonical[1], ready=ready, serving=ready, node=entry.node_name or "")
                by_family.setdefault(canonical[0], []).append(candidate)
        for place, port in enumerate(subset.ports or ()):
            _check_port(where, f"subsets[{index}].ports[{place}]", port.name, port.protocol, port.port)
        ports = tuple((port.name, port.protocol, port.port) for port in subset.ports or ())
        for family, candidates in by_family.items():
            found.append(SliceFacts(f"{meta.namespace}/{meta.name}", family, ports, tuple(candidates)))
    return tuple(found)


def _check_port(where: str, field: str, name: str, protocol: str, number: int) -> None:
    if not 1 <= number <= 65535:
        raise BadObject(where, f"{field}.port", f"expected a port from 1 to 65535, found {number}")
    if protocol not in PROTOCOLS:
        raise BadObject(where, f"{field}.protocol", f"expected TCP, UDP or SCTP, found {protocol!r}")
    if len(name) > MAX_NAME:
        raise BadObject(where, f"{field}.name", f"longer than {MAX_NAME} characters")


def _check_address(where: str, field: str, address: str) -> None:
    """Refuse what the API refuses as an endpoint: it would open what only a node itself may reach."""
    if _SPECIAL.match(address):
        raise BadObject(where, field, f"{address!r} is an unspecified, loopback, link-local or multicast address")


def _candidate(where: str, index: int, family: Family, endpoint: SliceEndpoint) -> Candidate:
    canonical = canonical_address(endpoint.addresses[0])
    if canonical is None or canonical[0] is not family:
        raise BadObject(
            where,
            f"endpoints[{index}].addresses[0]",
            f"expected an {family.value} address, found {endpoint.addresses[0][:60]!r}",
        )
    _check_address(where, f"endpoints[{index}].addresses[0]", canonical[1])
    hints = endpoint.hints
    return Candidate(
        address=canonical[1],
        ready=endpoint.ready,
        serving=endpoint.serving,
        terminating=endpoint.terminating,
        node=endpoint.node_name or "",
        zones=tuple(zone.name for zone in hints.for_zones or ()) if hints else (),
        nodes=tuple(node.name for node in hints.for_nodes or ()) if hints else (),
    )


Found = dict[tuple[str, int], Candidate]


def found_for(slices: Iterable[SliceFacts], port_name: str, protocol: str) -> Found:
    """Return the candidates of one Service port by address and number: joined by the port's *name and protocol*.

    Where slices overlap, one that is not terminating beats one that is, then ready beats unready.
    """
    found: Found = {}
    for piece in slices:
        for name, proto, number in piece.ports:
            if name != port_name or proto != protocol:
                continue
            for candidate in piece.candidates:
                known = found.get((candidate.address, number))
                if known is None or _rank(candidate) > _rank(known):
                    found[candidate.address, number] = candidate
    return found


def _rank(candidate: Candidate) -> tuple[bool, bool]:
    return not candidate.terminating, candidate.ready


def select(
    found: Found,
    place: Place,
    *,
    uses_cluster: bool,
    uses_local: bool,
    weights: dict[str, int] | None = None,
) -> Selection:
    """Return the usable endpoints: readiness first, topology among the ready, and serving-while-terminating last.

    `uses_cluster`: some traffic of the port may go anywhere; `uses_local`: some may stay on this node only.
    """
    if not found:
        return NOTHING
    node = place.node

    def endpoints(chosen: Iterable[tuple[tuple[str, int], Candidate]]) -> tuple[Endpoint, ...]:
        made = []
        for (address, port), c in chosen:
            weight = weights.get(address) or weights.get(c.node) or 1 if weights else 1
            made.append(Endpoint(address, port, bool(node) and c.node == node, weight))
        made.sort()
        return tuple(made)

    ready = [item for item in found.items() if item[1].ready]
    cluster: tuple[Endpoint, ...] = ()
    if uses_cluster:
        cluster = endpoints(_in_topology(ready, place)) or endpoints(
            item for item in found.items() if item[1].serving and item[1].terminating
        )
    if not uses_local:
        return Selection(cluster=cluster, exists=bool(cluster))
    ending = [item for item in found.items() if not item[1].ready and item[1].serving and item[1].terminating]
    local = endpoints(item for item in ready if node and item[1].node == node)
    local = local or endpoints(item for item in ending if node and item[1].node == node)
    return Selection(cluster=cluster, local=local, exists=bool(ready or ending or cluster))


def _in_topology(
    ready: list[tuple[tuple[str, int], Candidate]], place: Place
) -> list[tuple[tuple[str, int], Candidate]]:
    """Return those of `ready` that their hints mean for this node, else for its zone, else all of them.

    Hints count only where every ready endpoint has them and one names us (KEP-2433, KEP-3015).
    """
    if any(not c.nodes and not c.zones for _, c in ready):
        return ready
    if all(c.nodes for _, c in ready):
        near = [item for item in ready if place.node in item[1].nodes]
        if near:
            return near
    if place.zone and all(c.zones for _, c in ready):
        near = [item for item in ready if place.zone in item[1].zones]
        if near:
            return near
    return ready


def serving(found: Found) -> frozenset[tuple[str, int]]:
    """Return every endpoint that still answers: flows to any other are stale."""
    return frozenset(key for key, candidate in found.items() if candidate.serving)


def ready_local_count(found: Iterable[Found], node: str) -> int:
    """Return how many distinct ready addresses are on `node`: what a health check node port reports."""
    return len({key[0] for part in found for key, c in part.items() if c.ready and c.node == node and node})
