"""Makes the kernel's virtual servers, sets, rules and addresses what the layout says; lets removed endpoints drain.

A full pass reads what is ours and writes the difference; an update compares two layouts of the Services that changed.
Ours is what the set of all frontends names, what is on our link, and what the set of marks names; no other virtual
server is touched. Additions go sets, rules, addresses, servers, and removals the other way round.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from proxy.modes import ApplyError, Drift, Written
from proxy.modes.ipvs import layout, sets, tables
from proxy.modes.ipvs.layout import Ground, Piece, Wanted
from proxy.modes.ipvs.node import Node
from proxy.modes.ipvs.servers import Servers
from proxy.modes.ipvs.steps import Step, steps
from proxy.plan import Family, Plan, PlanChange, ServerKey, VirtualServer, inside
from pynet.daemon import logs
from pynet.ipvs import ServiceId, Timeouts
from pynet.kernel import ipset
from pynet.kernel.ipset import IpsetError
from pynet.kernel.iptables import Backend, IptablesError, Tool, backend_of_host
from pynet.kernel.ipvs import IpvsMissing
from pynet.kernel.netlink import NetlinkError
from pynet.kernel.nfnetlink import NfnetlinkError
from pynet.kernel.sysctl import SysctlError

log = logs.get(__name__)
A = TypeVar("A")
R = TypeVar("R")
Found = list[tuple[ServerKey | None, str]]


class Options(msgspec.Struct, frozen=True):
    """What can be set. `drain_seconds`: how long connections keep an endpoint whose Service says nothing about it."""

    scheduler: str = "rr"
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    timeouts: Timeouts = Timeouts()
    drain_seconds: float = 3600.0


class Standing(msgspec.Struct, frozen=True):
    """What was written last, in one family. `users`: how many Service ports have an address on our link."""

    plan: Plan
    ground: Ground
    pieces: dict[ServerKey, Piece]
    marks: dict[ServerKey, int]
    users: Counter[str]


class IpvsMode:
    """The IPVS mode of the network namespace in which it was made. The kernel is asked at the first write."""

    name = "ipvs"

    def __init__(
        self,
        options: Options | None = None,
        *,
        backend: Backend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options or Options()
        self._backend = backend
        self._node = Node()
        self._servers = Servers(clock)
        self._standing: dict[Family, Standing] = {}
        self._foreign: set[ServiceId] = set()  # found to be so by an addition that failed
        self._told: set[ServiceId] = set()
        self._canaries: dict[Family, tables.Canary] = {}

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Read what the kernel holds of ours and write what differs. Raise `ApplyError`."""
        return Written.sum(_guarded(self._converge, plan)[0] for plan in plans)

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Write what differs in the Service ports that changed. Raise `ApplyError`."""
        return Written.sum(_guarded(self._update, change) for change in changes)

    def audit(self) -> Drift:
        """Read the kernel back and repair what differs from the last plans. Raise `ApplyError`."""
        found: Found = []
        for standing in list(self._standing.values()):
            found += _guarded(self._converge, standing.plan)[1]
        return Drift(tuple(found))

    def tampered(self) -> bool:
        """Whether rules, link or servers of ours are gone or the node's addresses are others; ends drains besides."""
        if not self._standing:
            return False
        is_wrong = _guarded(self._servers.end_drains, self._has_endpoints)
        return is_wrong or any(_guarded(self._looks_wrong, standing) for standing in self._standing.values())

    def cleanup(self) -> None:
        """Remove what is ours: rules of both iptables back ends, virtual servers, sets, link."""
        tables.remove()
        try:
            held = ipset.saved("PYNET-")
            if self._servers.is_possible():
                present = self._servers.present()
                ours = [name for family in Family for name in self._ours(family, _held(family, held), present)]
                self._servers.remove(ours)
            self._node.remove_link()
            ipset.destroy(sorted(layout.all_set_names() & held.keys()))
        except (IpsetError, NetlinkError) as error:
            log.warning("clean-up failed", extra=logs.fields(mode=self.name, error=error))
        self._standing.clear()
        for canary in self._canaries.values():
            canary.close()
        self._canaries.clear()

    def lacking(self, names: Iterable[str]) -> frozenset[str]:
        """Return which of these schedulers the kernel has not; it is asked once for each. Raise `NetlinkError`."""
        return self._servers.lacking(names)

    def _tool(self, family: Family) -> Tool:
        if self._backend is None:
            self._backend = backend_of_host()
        return Tool(self._backend, tables.VERSIONS[family])

    def _canary(self, family: Family) -> tables.Canary:
        if family not in self._canaries:
            self._canaries[family] = tables.Canary(self._tool(family))
        return self._canaries[family]

    def _converge(self, plan: Plan) -> tuple[Written, Found]:
        """Make the kernel hold `plan`; return what was written, and a line for each difference found."""
        began = time.monotonic()
        family = plan.family
        saved = ipset.saved("PYNET-")
        if not saved.keys() >= {layout.set_name(family, suffix) for suffix in layout.SETS}:
            ipset.restore(sets.declarations(family))
        held = _held(family, saved)
        present = self._servers.present()
        ours = self._ours(family, held, present)
        self._foreign &= present.keys()
        foreign = {name for name in present if name not in ours or name in self._foreign}
        ground = self._ground(plan, frozenset(foreign))
        self._tell_foreign(layout.in_the_way(ground, plan))
        marks = _marks(plan, held)
        pieces = layout.pieces(ground, plan, marks)
        users = Counter(address for piece in pieces.values() for address in piece.addresses)
        rendering = time.monotonic() - began

        additions, removals = sets.differences(family, held, sets.entries_of(pieces.values(), users.keys()))
        self._node.prepare([family], strict_arp=self._options.strict_arp)
        self._servers.set_timeouts(self._options.timeouts)
        ipset.restore(additions)
        wrong = tables.converge(self._tool(family), family, plan.settings)
        on_link = self._node.link_addresses(family)
        self._node.add(users.keys() - on_link)
        want = _wanted(pieces)
        todo = steps(self._servers.live({name: present[name] for name in ours if name not in foreign}, want), want)
        self._standing[family] = Standing(plan, ground, pieces, marks, users)
        if self._write(family, todo):
            return self._converge(plan)
        self._node.remove(on_link - users.keys())
        ipset.restore(removals)

        wrong += (f"set: {line.removesuffix(' -exist')} was missing" for line in (*additions, *removals))
        wrong += (f"address {address} was missing on {layout.LINK}" for address in sorted(users.keys() - on_link))
        found: Found = [(None, f"{family.value}: {what}") for what in wrong]
        found += ((self._owner(family, step.service), f"{family.value}: {step}") for step in todo)
        applying = time.monotonic() - began - rendering
        return Written(len(additions) + len(removals) + len(todo), rendering, applying), found

    def _update(self, change: PlanChange) -> Written:
        began = time.monotonic()
        family = change.new.family
        standing = self._standing.get(family)
        old = {key: standing.plan.servers[key] for key in change.keys if standing and key in standing.plan.servers}
        new = {key: change.new.servers[key] for key in change.keys if key in change.new.servers}
        if standing is None or standing.plan.settings != change.new.settings or self._moves_ground(standing, old, new):
            return self._converge(change.new)[0]
        ground = standing.ground
        marks = dict(standing.marks)
        needy = [key for key, server in new.items() if layout.needs_mark(server)]
        if needy or any(key in marks for key in change.keys):
            needed = (marks.keys() - set(change.keys)) | set(needy)
            marks = layout.assigned_marks(change.new.settings, marks, needed)
        before = {key: standing.pieces[key] for key in old}
        after = {key: layout.piece(ground, server, marks.get(key, 0)) for key, server in new.items()}
        users = standing.users.copy()
        users.update(address for piece in after.values() for address in piece.addresses)
        users.subtract(address for piece in before.values() for address in piece.addresses)
        users = +users
        new_addresses = users.keys() - standing.users.keys()
        old_addresses = standing.users.keys() - users.keys()
        additions, removals = sets.differences(
            family, sets.entries_of(before.values(), old_addresses), sets.entries_of(after.values(), new_addresses)
        )
        todo = steps(self._servers.written(_wanted(before)), _wanted(after))
        rendering = time.monotonic() - began

        ipset.restore(additions)
        if new_addresses:
            self._node.add(new_addresses)
        pieces = {key: piece for key, piece in standing.pieces.items() if key not in before} | after
        self._standing[family] = Standing(change.new, ground, pieces, marks, users)
        if self._write(family, todo):
            return self._converge(change.new)[0]
        self._node.remove(old_addresses)
        ipset.restore(removals)
        applying = time.monotonic() - began - rendering
        return Written(len(additions) + len(removals) + len(todo), rendering, applying)

    def _ground(self, plan: Plan, foreign: frozenset[ServiceId]) -> Ground:
        addresses = self._node.own_addresses(plan.family)
        taken = (name for server in plan.servers.values() for name in layout.taken_by(server, plan.family, addresses))
        schedulers = {name for server in plan.servers.values() for name in layout.schedulers_of(server)}
        return Ground(
            plan.family,
            plan.settings,
            addresses,
            self._options.scheduler,
            frozenset(taken),
            self._told_lacking(schedulers),
            foreign,
            self._options.drain_seconds,
        )

    def _told_lacking(self, names: Collection[str]) -> frozenset[str]:
        new = self._servers.unknown(names)
        missing = self.lacking(names)
        for name in sorted(missing & new):
            log.warning(
                "this kernel lacks a scheduler",
                extra=logs.fields(scheduler=name, module=f"ip_vs_{name}", instead=self._options.scheduler),
            )
        return missing

    def _moves_ground(
        self, standing: Standing, old: Mapping[ServerKey, VirtualServer], new: Mapping[ServerKey, VirtualServer]
    ) -> bool:
        """Whether a change of these servers may change pieces of others."""
        ground = standing.ground
        taken = [
            {
                name
                for server in servers.values()
                for name in layout.taken_by(server, ground.family, ground.node_addresses)
            }
            for servers in (old, new)
        ]
        schedulers = {name for server in new.values() for name in layout.schedulers_of(server)}
        return taken[0] != taken[1] or not self._told_lacking(schedulers) <= ground.lacking

    def _ours(self, family: Family, held: sets.Entries, present: Collection[ServiceId]) -> set[ServiceId]:
        """Return the virtual servers of the kernel that are ours: with an excluded address only what a set names."""
        version = tables.VERSIONS[family]
        marks = set(sets.marks_of(held["SPLIT"]).values())
        on_link = self._node.link_addresses(family)
        return {
            name
            for name in present
            if name.version == version
            and (
                name.mark in marks
                if name.mark
                else layout.frontend_entry(name) in held["SERVERS"]
                or (name.address in on_link and not inside(name.address, self._options.exclude_cidrs))
            )
        }

    def _tell_foreign(self, names: Mapping[ServiceId, ServerKey]) -> None:
        for name in names.keys() - self._told:
            log.warning(
                "a virtual server of somebody else is in the way, and left alone",
                extra=logs.fields(server=name, port=names[name]),
            )
        self._told = set(names)

    def _looks_wrong(self, standing: Standing) -> bool:
        family = standing.plan.family
        wanted = sum(bool(one.destinations) for piece in standing.pieces.values() for one in piece.services.values())
        return (
            self._node.own_addresses(family) != standing.ground.node_addresses
            or not (self._node.has_link() or not standing.users)
            or self._servers.are_fewer(tables.VERSIONS[family], wanted)
            or not self._canary(family).is_alive()
        )

    def _write(self, family: Family, todo: Sequence[Step]) -> bool:
        """Take the steps. True: some servers are somebody else's, and nothing is settled. Raise `ApplyError`."""
        foreign, failed = self._servers.take(todo)
        self._foreign |= foreign
        if failed and not foreign:
            owners = {self._owner(family, step.service) for step, _ in failed}
            message = "; ".join(f"{step}: {error}" for step, error in failed[:5])
            raise ApplyError(f"IPVS: {message}", [] if None in owners else [key for key in owners if key])
        return bool(foreign)

    def _has_endpoints(self, name: ServiceId) -> bool:
        pieces = (piece for standing in self._standing.values() for piece in standing.pieces.values())
        return any(piece.services[name].destinations for piece in pieces if name in piece.services)

    def _owner(self, family: Family, name: ServiceId) -> ServerKey | None:
        pieces = self._standing[family].pieces if family in self._standing else {}
        return next((key for key, piece in pieces.items() if name in piece.services), None)


def _wanted(pieces: Mapping[ServerKey, Piece]) -> dict[ServiceId, Wanted]:
    return {name: wanted for piece in pieces.values() for name, wanted in piece.services.items()}


def _held(family: Family, saved: Mapping[str, ipset.Held]) -> sets.Entries:
    """Return the entries of our sets, by suffix."""
    names = {suffix: layout.set_name(family, suffix) for suffix in layout.SETS}
    return {suffix: saved[name].entries if name in saved else frozenset() for suffix, name in names.items()}


def _marks(plan: Plan, held: sets.Entries) -> dict[ServerKey, int]:
    """Return the firewall marks: those that the kernel has, as far as they can be told, and new ones."""
    known = sets.marks_of(held["SPLIT"])
    need = [server for server in plan.servers.values() if layout.needs_mark(server)]
    have: dict[ServerKey, int] = {}
    for server in need if known else ():
        protocol = server.key.protocol.lower()
        for frontend in server.frontends:
            ending = f"{frontend.address},{protocol}:{frontend.port}"
            mark = next(
                (m for e, m in known.items() if e == ending or (not frontend.address and e.endswith(ending))), 0
            )
            if mark and mark not in have.values():
                have[server.key] = mark
                break
    return layout.assigned_marks(plan.settings, have, (server.key for server in need))


def _guarded(work: Callable[[A], R], argument: A) -> R:
    try:
        return work(argument)
    except (
        NetlinkError,
        NfnetlinkError,
        IpsetError,
        IptablesError,
        SysctlError,
        IpvsMissing,
        layout.OutOfMarks,
    ) as error:
        raise ApplyError(str(error)) from error
