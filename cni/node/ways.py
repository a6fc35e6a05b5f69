"""Brings devices, neighbours, forwarding entries and routes to what `routes` decides.

It reads all that it compares with (1,000 peers: 12 ms), so it needs no memory of what was done before: what was cut
short, or changed by another hand, is mended. Only after a call that the kernel took as a whole, with no word of a
change since, is what that call left taken for read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from cni.node import overlay
from cni.node.changes import Changes, difference
from cni.node.metrics import Metrics
from cni.node.nodes import Member, Problem
from cni.node.routes import DEVICES, PROTOCOL, Settings, Wanted, describe, wanted
from pynet.daemon import logs
from pynet.kernel.netlink import NetlinkError
from pynet.kernel.routes import Change, Refused, Rtnetlink
from pynet.netstate import NetState, Route, family_of

log = logs.get(__name__)
_LISTED = 20  # so many changed routes are logged one by one, more of them as a number
_NO_SUCH_KIND = 95  # EOPNOTSUPP: the kernel has no VXLAN


class Outcome(msgspec.Struct, frozen=True):
    """What was wanted, what is there now, and what is wrong. `refused`: how many entries the kernel did not take."""

    want: Wanted
    state: NetState
    problems: tuple[Problem, ...] = ()
    refused: int = 0


class Ways:
    """The ways to the other nodes' pods, in the namespace of `kernel`. `entries`: MAC and remote of each wanted entry
    of the VXLAN devices, by which the kernel's word of our own changes is told from that of others'.
    """

    def __init__(self, settings: Settings, kernel: Rtnetlink, metrics: Metrics) -> None:
        self._settings, self._kernel, self._metrics = settings, kernel, metrics
        self._last: tuple[Route, ...] | None = None
        self._left: NetState | None = None
        self.entries: frozenset[tuple[str, str]] = frozenset()

    def bring(self, members: Mapping[str, Member], look: bool = True) -> Outcome:
        """Bring the kernel to what the Nodes make wanted; without `look`, from what the last call left. Raise
        `NetlinkError` where it cannot even be read.
        """
        kernel, problems = self._kernel, []
        state = kernel.read(overlays=DEVICES.values()) if look or self._left is None else self._left
        self._left = None
        want = wanted(members, self._settings, state)
        changed = failed = False
        try:
            changed = overlay.ensure(kernel, want.devices, state)
        except NetlinkError as error:
            problems.append(Problem("VXLAN", str(error)))
            failed = error.errno != _NO_SUCH_KIND
            settings = msgspec.structs.replace(self._settings, vxlan=False)
            if not failed:
                self._settings = settings
            want = wanted(members, settings, state)
        if changed:
            state = kernel.read(overlays=DEVICES.values())
            want = wanted(members, self._settings, state)
        if joined := _joined(want, state):
            # what is left without our next hop says whose it is
            kernel.delete(joined)
            state = kernel.read(overlays=DEVICES.values())
            want = wanted(members, self._settings, state)
        changes = difference(want, state)
        self.entries = frozenset((entry.mac, entry.remote) for entry in want.forwarding)
        refused = self._apply(changes) if changes else []
        removed = overlay.remove_others(kernel, want.devices, state)
        if changes:
            self._count(changes, want, {entry for entry, _ in refused})
        if refused or removed or failed:
            state = kernel.read(overlays=DEVICES.values())
        else:
            state = self._left = _left(want, state)
        for entry, refusal in refused:
            what = f"route {entry.dst}" if isinstance(entry, Route) else f"entry {entry}"
            problems.append(Problem(what, f"the kernel refused it: {refusal.strerror}"))
        self._last = want.routes
        return Outcome(want, state, tuple(problems), len(refused) + failed)

    def _apply(self, changes: Changes) -> Refused:
        kernel = self._kernel
        refused = kernel.add(changes.add)
        # what is replaced has no moment without a route; what is only in the way of another goes before it
        replaced = kernel.replace(changes.replace_routes)
        kernel.delete(changes.delete_routes)
        added = kernel.add(changes.add_routes)
        again = [route for route, _ in replaced if isinstance(route, Route)]
        if again:
            # IPv6 refuses some replacements that it takes as a removal and an addition
            kernel.delete(again)
            replaced = kernel.add(again)
        kernel.delete(changes.delete)
        return refused + replaced + added

    def _count(self, changes: Changes, want: Wanted, refused: set[Change]) -> None:
        repaired = want.routes == self._last
        counted: tuple[tuple[str, Iterable[Route]], ...] = (
            ("added", changes.add_routes),
            ("replaced", changes.replace_routes),
            ("deleted", changes.delete_routes),
        )
        for verb, routes in counted:
            done = [route for route in routes if route not in refused]
            self._metrics.changes.labels(verb).inc(len(done))
            if repaired:
                self._metrics.repaired.inc(len(done))
            if len(done) > _LISTED:
                log.info(f"routes {verb}", extra=logs.fields(count=len(done), repaired=repaired))
                continue
            for route in done:
                log.info(f"route {verb}", extra=logs.fields(route=describe(route), repaired=repaired))


def _joined(want: Wanted, state: NetState) -> list[Route]:
    """Return the wanted routes that another hand appended one of its own to: IPv6 makes them one of several next hops,
    which carries our protocol number whoever appended.
    """
    several = {
        (route.dst, route.metric)
        for route in state.routes
        if route.protocol == PROTOCOL and route.via == "multipath" and family_of(route.dst) == 6
    }
    return [route for route in want.routes if (route.dst, route.metric) in several] if several else []


def _left(want: Wanted, state: NetState) -> NetState:
    """Return what is there once everything wanted was done: others' routes, and ours as wanted."""
    foreign = tuple(route for route in state.routes if route.protocol != PROTOCOL)
    return msgspec.structs.replace(
        state, routes=foreign + want.routes, neighbours=want.neighbours, forwarding=want.forwarding
    )
