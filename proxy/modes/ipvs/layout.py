"""A `Plan` in IPVS's words: virtual servers, ipset entries, the dummy link's addresses; a `Piece` a Service port. Pure.

IPVS knows an address and a port, not who asks. Where origins get different endpoints (external policy Local), the
virtual server has those of the outside, and one on a firewall mark has those of pods and the node. All other
differences of origin (masquerade, drop) are entries of ipsets, on which the constant rules of `rules` act.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from proxy.plan import (
    Action,
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    NodeSettings,
    Origin,
    Plan,
    ServerKey,
    VirtualServer,
    inside,
)
from pynet.ipvs import SCHED_FALLBACK, SCHEDULERS, DestinationId, Service, ServiceId

LINK = "pynet-ipvs"
_VERSIONS = {Family.V4: 4, Family.V6: 6}
_MARKS = 0xFFF
_WEIGHTED = {"rr": "wrr", "lc": "wlc"}
_HASHING = ("sh", "mh")
# A firewall mark's server keeps the port of a client's packet when it is persistent, so affinity is by hash there.
_MARKED_AFFINITY = "mh"

# suffix of a set's name → its type; each holds frontends, if nothing else is said
SETS = {
    "IPS": "hash:ip",  # the addresses of our link
    "SERVERS": "hash:ip,port",  # every frontend: what is ours among the virtual servers
    "MASQ-POD": "hash:ip,port",
    "MASQ-NODE": "hash:ip,port",
    "MASQ-OUT": "hash:ip,port",
    "DROP-POD": "hash:ip,port",
    "DROP-NODE": "hash:ip,port",
    "DROP-OUT": "hash:ip,port",
    "REJECT": "hash:ip,port",
    "RANGED": "hash:ip,port",  # those with source ranges
    "RANGES": "hash:ip,port,net",  # their source ranges
    "SPLIT": "hash:ip,port",  # those with a server on a firewall mark, which is the entry's skbmark
}
_ORIGINS = {Origin.POD: "POD", Origin.NODE: "NODE", Origin.OUTSIDE: "OUT"}


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """A virtual server and its destinations' weights. Without any it is there only while connections end.

    `drain_seconds`: how long a removed destination may keep its connections; 0: it goes at once, but for those that
    are `answering` still, which have until `answering_seconds` from when they got their last new connection.
    """

    service: Service
    destinations: dict[DestinationId, int]
    drain_seconds: float = 0.0
    answering: frozenset[DestinationId] = frozenset()
    answering_seconds: float = 0.0

    def seconds_of(self, removed: DestinationId) -> float:
        """Return how long a removed destination may keep its connections."""
        return self.drain_seconds or (self.answering_seconds if removed in self.answering else 0.0)


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one Service port has in the kernel. `entries`: by the set's suffix; `addresses`: on the dummy link."""

    services: dict[ServiceId, Wanted]
    entries: dict[str, tuple[str, ...]]
    addresses: tuple[str, ...]


NOTHING = Piece({}, {}, ())


class Ground(msgspec.Struct, frozen=True):
    """What holds for all Service ports of a family.

    `node_addresses`: the node's own, loopback and ours excepted. `scheduler`: the one where a Service names none that
    IPVS has; `lacking`: those that this kernel has not. `taken`: frontends with an address of the node's own; a node
    port of the same number yields to them. `foreign`: somebody else's virtual servers, which are left alone.
    `drain_seconds`: the limit for a Service that declares none.
    """

    family: Family
    settings: NodeSettings
    node_addresses: tuple[str, ...]
    scheduler: str = "rr"
    taken: frozenset[ServiceId] = frozenset()
    lacking: frozenset[str] = frozenset()
    foreign: frozenset[ServiceId] = frozenset()
    drain_seconds: float = 3600.0


class OutOfMarks(Exception):
    """More Service ports need a firewall mark than there are."""


def set_name(family: Family, suffix: str) -> str:
    """Return an ipset's name."""
    return f"PYNET-{'6-' if family is Family.V6 else ''}{suffix}"


def all_set_names() -> frozenset[str]:
    """Return the names of all our ipsets, of both families."""
    return frozenset(set_name(family, suffix) for family in Family for suffix in SETS)


def set_options(family: Family, suffix: str) -> dict[str, str]:
    """Return what an ipset is created with, beside its type."""
    options = {"family": "inet6" if family is Family.V6 else "inet", "maxelem": "1048576"}
    return options | ({"skbinfo": ""} if suffix == "SPLIT" else {})


def split_bit(settings: NodeSettings) -> int:
    """Return the bit that all firewall marks of virtual servers have: the one beside the masquerade bit."""
    mark = settings.masquerade_mark
    return mark << 1 if mark < 1 << 31 else mark >> 1


def assigned_marks(settings: NodeSettings, have: Mapping[ServerKey, int], need: Iterable[ServerKey]) -> dict[
    ServerKey, int
]:  # fmt: skip
    """Return a mark for each Service port in `need`: the one that it has, else the lowest free. Raise `OutOfMarks`."""
    shift = 0 if min(settings.masquerade_mark, split_bit(settings)) > _MARKS else 16
    possible = (split_bit(settings) | number << shift for number in range(1, _MARKS + 1))
    needed = sorted(need)
    found = {key: have[key] for key in needed if key in have}
    used = set(found.values())
    free = (mark for mark in possible if mark not in used)
    for key in needed:
        if key not in found:
            mark = next(free, None)
            if mark is None:
                raise OutOfMarks(
                    f"{key}: more than {_MARKS} Service ports have one endpoint list for the outside and another for "
                    "pods (externalTrafficPolicy: Local): no firewall mark is left"
                )
            found[key] = mark
    return found


def needs_mark(server: VirtualServer) -> bool:
    """Whether origins of one of the frontends get different endpoints."""
    return any(_split_endpoints(server, frontend) is not None for frontend in server.frontends)


def taken_by(server: VirtualServer, family: Family, node_addresses: Collection[str]) -> Iterable[ServiceId]:
    """Return the frontends with an address of the node's own."""
    return (
        ServiceId(_VERSIONS[family], frontend.address, frontend.port, server.key.protocol)
        for frontend in server.frontends
        if frontend.address in node_addresses
    )


def in_the_way(ground: Ground, plan: Plan) -> dict[ServiceId, ServerKey]:
    """Return the frontends that somebody else's virtual servers have."""
    if not ground.foreign:
        return {}
    names = {
        ServiceId(_VERSIONS[ground.family], address, frontend.port, key.protocol): key
        for key, server in plan.servers.items()
        for frontend in server.frontends
        for address in _addresses(ground, frontend)
    }
    return {name: names[name] for name in sorted(ground.foreign) if name in names}


def pieces(ground: Ground, plan: Plan, marks: Mapping[ServerKey, int]) -> dict[ServerKey, Piece]:
    """Return the pieces of a whole plan."""
    return {key: piece(ground, server, marks.get(key, 0)) for key, server in plan.servers.items()}


def piece(ground: Ground, server: VirtualServer, mark: int = 0) -> Piece:
    """Return what one Service port has in the kernel. `mark`: where `needs_mark` says so."""
    services: dict[ServiceId, Wanted] = {}
    entries: dict[str, list[str]] = {}
    addresses: dict[str, None] = {}
    for frontend in server.frontends:
        for address in _addresses(ground, frontend):
            name = ServiceId(_VERSIONS[ground.family], address, frontend.port, server.key.protocol)
            if name in ground.foreign or (not frontend.address and name in ground.taken):
                continue
            endpoints = _main_endpoints(server, frontend)
            services[name] = _wanted(ground, server, endpoints)
            split = _split_endpoints(server, frontend)
            if split is not None and mark:
                marked = ServiceId(name.version, mark=mark)
                services[marked] = _wanted(ground, server, split, is_marked=True)
            for suffix, entry in _entries(server, frontend, name, mark if split is not None else 0):
                entries.setdefault(suffix, []).append(entry)
            if address not in ground.node_addresses:
                addresses[address] = None
    return Piece(services, {suffix: tuple(found) for suffix, found in entries.items()}, tuple(addresses))


def schedulers_of(server: VirtualServer) -> frozenset[str]:
    """Return the schedulers that a Service port may ask the kernel for, beside the default one."""
    named = {server.scheduler} & set(SCHEDULERS)
    weighted = {_WEIGHTED[name] for name in named if name in _WEIGHTED} or set(_WEIGHTED.values())
    return frozenset(named | weighted | ({_MARKED_AFFINITY} if server.affinity_seconds else set()))


def _wanted(
    ground: Ground, server: VirtualServer, endpoints: tuple[Endpoint, ...], *, is_marked: bool = False
) -> Wanted:
    service = _service(ground, server, endpoints, is_marked)
    destinations = {DestinationId(endpoint.address, endpoint.port): endpoint.weight for endpoint in endpoints}
    if _drops_at_once(server, service):
        return Wanted(service, destinations)
    if server.removal == "reset":
        answering = frozenset(DestinationId(each.address, each.port) for each in server.draining)
        return Wanted(service, destinations, 0.0, answering, ground.drain_seconds)
    word, _, seconds = server.removal.partition(":")
    return Wanted(service, destinations, float(seconds) if word == "drain" else ground.drain_seconds)


def _service(ground: Ground, server: VirtualServer, endpoints: tuple[Endpoint, ...], is_marked: bool) -> Service:
    """Return how a virtual server chooses; weights that differ are honoured whatever the scheduler's name."""
    name = server.scheduler if server.scheduler in SCHEDULERS else ground.scheduler
    if len({endpoint.weight for endpoint in endpoints}) > 1:
        name = _WEIGHTED.get(name, name)
    if is_marked and server.affinity_seconds:
        name = _MARKED_AFFINITY
    if name in ground.lacking:
        name = ground.scheduler
    return Service(
        scheduler=name,
        persistence=0 if is_marked else server.affinity_seconds,
        flags=SCHED_FALLBACK if name in _HASHING else 0,
    )


def _drops_at_once(server: VirtualServer, service: Service) -> bool:
    """Whether a removed destination cannot stay with weight 0 until its connections end.

    UDP knows no end: its flows would stay with a dead endpoint for as long as the client sends. `dh` drops new
    connections that it leads to a destination of weight 0.
    """
    return server.key.protocol == "UDP" or service.scheduler == "dh"


def frontend_entry(name: ServiceId) -> str:
    """Return a frontend as a set of `hash:ip,port` spells it."""
    return f"{name.address},{name.protocol.lower()}:{name.port}"


def _addresses(ground: Ground, frontend: Frontend) -> Iterable[str]:
    if frontend.kind is not FrontendKind.NODE_PORT:
        return (frontend.address,)
    networks = ground.settings.node_port_addresses
    return (address for address in ground.node_addresses if not networks or inside(address, networks))


def _endpoints(server: VirtualServer, action: Action) -> tuple[Endpoint, ...]:
    """Return where an action leads; nowhere for what refuses or drops."""
    return {Action.CLUSTER: server.cluster, Action.LOCAL: server.local}.get(action, ())


def _main_endpoints(server: VirtualServer, frontend: Frontend) -> tuple[Endpoint, ...]:
    """Return the endpoints of the virtual server on the address: the outside's, else the pods', else the node's."""
    for verdict in (frontend.outside, frontend.pod, frontend.node):
        if endpoints := _endpoints(server, verdict.action):
            return endpoints
    return ()


def _split_endpoints(server: VirtualServer, frontend: Frontend) -> tuple[Endpoint, ...] | None:
    """Return the endpoints of pods and the node where they are others than the outside's; None where they are not."""
    main = _main_endpoints(server, frontend)
    for verdict in (frontend.pod, frontend.node):
        endpoints = _endpoints(server, verdict.action)
        if endpoints and endpoints != main:
            return endpoints
    return None


def _entries(server: VirtualServer, frontend: Frontend, name: ServiceId, mark: int) -> Iterable[tuple[str, str]]:
    """Return (suffix of a set, entry) for one frontend on one address."""
    entry = frontend_entry(name)
    yield "SERVERS", entry
    if mark:
        yield "SPLIT", f"{entry} skbmark {mark:#x}"
    forwarding = {o for o in Origin if _endpoints(server, frontend.verdict_for(o).action)}
    if len(forwarding) < len(Origin) and any(_is_refused(server, frontend, origin) for origin in Origin):
        if forwarding:  # a plan has no such mixture; a virtual server that is there cannot refuse one origin
            yield from (("DROP-" + _ORIGINS[o], entry) for o in Origin if _is_refused(server, frontend, o))
        else:
            yield "REJECT", entry
    for origin, word in _ORIGINS.items():
        verdict = frontend.verdict_for(origin)
        if verdict.action is Action.DROP:
            yield f"DROP-{word}", entry
        elif verdict.masquerade and origin in forwarding and not (mark and origin is not Origin.OUTSIDE):
            yield f"MASQ-{word}", entry
    if frontend.source_ranges is not None:
        yield "RANGED", entry
        for network in frontend.source_ranges:
            yield "RANGES", f"{entry},{_as_saved(network)}"


def _is_refused(server: VirtualServer, frontend: Frontend, origin: Origin) -> bool:
    action = frontend.verdict_for(origin).action
    return action is not Action.DROP and not _endpoints(server, action)


def _as_saved(network: str) -> str:
    """Return a network as ipset prints it: without the length of a single address."""
    address, _, length = network.partition("/")
    return address if length in ("", "128" if ":" in address else "32") else network
