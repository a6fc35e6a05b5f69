"""Which tracked flows are stale after a change, and their removal. The decision is pure; `Cleaner` carries it out.

UDP has no end that a router could see: a flow whose endpoint is gone would go on into nothing for as long as the client
sends, so it is removed at once, also where a Service has no endpoint left, was deleted, or got its first one. TCP and
SCTP flows of a removed endpoint are kept, reset, or kept for a while, as the Service says (`VirtualServer.removal`).
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from proxy.cluster import Cluster
from proxy.metrics import Metrics
from proxy.plan import Family, Plan, PlanChange, ServerKey, VirtualServer
from pynet.daemon import logs
from pynet.kernel import conntrack, netlink, rtnl
from pynet.kernel.conntrack import Flow

log = logs.get(__name__)
Backend = tuple[str, int]
Claim = tuple[str, str, int]  # protocol, address (empty: a node port), port
_VERSIONS = {Family.V4: 4, Family.V6: 6}
_SOCKET_FAMILIES = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NOBODY: frozenset[Backend] = frozenset()


class Watch(msgspec.Struct, frozen=True):
    """What flows to one frontend are judged by: who may answer, and who did before.

    `known`: former endpoints; with `only_known`, an answer of anybody else is not ours to judge (the frontend is gone,
    or the protocol's flows are kept by default).
    """

    may_answer: frozenset[Backend] = _NOBODY
    known: frozenset[Backend] = _NOBODY
    only_known: bool = False


class Drain(msgspec.Struct, frozen=True):
    """Flows that are to be removed at `due`, unless the endpoint is back by then."""

    due: float
    family: Family
    key: ServerKey
    claims: tuple[Claim, ...]
    backends: frozenset[Backend]


def backends_of(server: VirtualServer | None) -> frozenset[Backend]:
    """Return every endpoint that may still answer for a Service port."""
    if server is None:
        return _NOBODY
    return frozenset((e.address, e.port) for e in (*server.cluster, *server.local, *server.draining))


def claims_of(server: VirtualServer | None) -> Iterable[Claim]:
    """Return the frontends of a Service port."""
    if server is None:
        return ()
    return ((server.key.protocol, frontend.address, frontend.port) for frontend in server.frontends)


def udp_watches(change: PlanChange) -> dict[Claim, Watch]:
    """Return what UDP flows are to be judged by after `change`."""
    watches: dict[Claim, Watch] = {}
    for key in change.keys:
        if key.protocol != "UDP":
            continue
        old, new = change.old.servers.get(key), change.new.servers.get(key)
        before, now = backends_of(old), backends_of(new)
        if new is not None and before == now and old is not None and [*claims_of(old)] == [*claims_of(new)]:
            continue
        for claim in claims_of(old):
            watches.setdefault(claim, Watch(known=before, only_known=True))
        for claim in claims_of(new):
            watches[claim] = Watch(may_answer=now, known=before)
    return watches


def removals(change: PlanChange, now: float) -> list[Drain]:
    """Return the TCP and SCTP flows that are to end after `change`, as their Services declare; resets are due now."""
    found = []
    for key in change.keys:
        old, new = change.old.servers.get(key), change.new.servers.get(key)
        if key.protocol == "UDP" or old is None:
            continue
        policy = (new or old).removal
        gone = backends_of(old) - backends_of(new)
        if policy == "keep" or not gone:
            continue
        seconds = 0 if policy == "reset" else int(policy.partition(":")[2])
        found.append(Drain(now + seconds, change.new.family, key, tuple(claims_of(old)), gone))
    return found


def stale(flows: Iterable[Flow], watches: dict[Claim, Watch], node_addresses: Collection[str]) -> list[Flow]:
    """Return the flows to remove. A flow to a node port is ours if it was translated, or went to the node itself."""
    found = []
    for flow in flows:
        watch = watches.get((flow.protocol, flow.destination, flow.port))
        is_translated = flow.answers != flow.destination
        if watch is None and (is_translated or flow.destination in node_addresses):
            watch = watches.get((flow.protocol, "", flow.port))
        if watch is None:
            continue
        backend = (flow.answers, flow.answers_port)
        if backend in watch.may_answer or (watch.only_known and backend not in watch.known):
            continue
        found.append(flow)
    return found


class Cleaner:
    """Follows what is written and removes the flows that it made stale."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._drains: list[Drain] = []
        self._plans: dict[Family, Plan] = {}
        self._unfinished: dict[Family, dict[Claim, Watch]] = {}

    def follow(self, cluster: Cluster, changes: Sequence[PlanChange], services: Collection[str]) -> None:  # noqa: ARG002
        """Remove what `changes` made stale."""
        for change in changes:
            family = change.new.family
            self._plans[family] = change.new
            self._drains += removals(change, self._clock())
            watches = self._unfinished.pop(family, {}) | udp_watches(change)
            if watches:
                self._unfinished[family] = watches
        self.tick(self._clock())

    def tick(self, now: float) -> None:
        """Remove the flows whose time has come, and those that could not be removed before."""
        for family, waiting in list(self._unfinished.items()):
            if self._remove(family, {"UDP"}, waiting):
                del self._unfinished[family]
        due = [drain for drain in self._drains if drain.due <= now]
        if not due:
            return
        self._drains = [drain for drain in self._drains if drain.due > now]
        for family in {drain.family for drain in due}:
            watches: dict[Claim, Watch] = {}
            protocols = set()
            for drain in due:
                gone = drain.backends - backends_of(self._plans[family].servers.get(drain.key))
                if drain.family is family and gone:
                    protocols.add(drain.key.protocol)
                    for claim in drain.claims:
                        known = watches[claim].known if claim in watches else _NOBODY
                        watches[claim] = Watch(known=known | gone, only_known=True)
            if watches:
                self._remove(family, protocols, watches)

    def _remove(self, family: Family, protocols: Collection[str], watches: dict[Claim, Watch]) -> bool:
        began = self._clock()
        try:
            addresses = node_addresses(family) if any(not address for _, address, _ in watches) else ()
            gone = stale(conntrack.flows(protocols, _VERSIONS[family]), watches, addresses)
            count = conntrack.delete(gone) if gone else 0
        except OSError as error:
            if error.errno == errno.EPERM:  # --userspace-listen-only, as any user: no flow there is translated
                log.debug("flows cannot be read without privilege")
                return True
            log.warning("stale flows could not be removed; trying again", extra=logs.fields(error=error))
            return False
        self._metrics.conntrack_seconds.labels(family.value).observe(self._clock() - began)
        self._metrics.conntrack_deleted.labels(family.value).inc(count)
        if count:
            log.info("removed stale flows", extra=logs.fields(family=family.value, count=count))
        return True


def node_addresses(family: Family) -> frozenset[str]:
    """Return every address of this network namespace: node ports answer on more than the Node object names."""
    kind = _SOCKET_FAMILIES[family]
    with netlink.Socket() as sock:
        return frozenset(socket.inet_ntop(kind, address.packed) for address in rtnl.all_addresses(sock, kind))
