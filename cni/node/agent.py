"""The agent: takes Nodes and the kernel's events, and brings this node's kernel and files to what `routes` decides.

Every reconcile reads all that it compares with (1,000 peers: 12 ms), so it needs no memory of what was done before, and
one that was cut short, or a change by another hand, is mended by the next.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from cni.node import conflist, forwarding, masquerading, overlay
from cni.node.changes import Changes, difference
from cni.node.masquerade import LINK_LOCAL, masquerade
from cni.node.metrics import Metrics
from cni.node.nodes import Member, Problem, member_of
from cni.node.routes import DEVICES, PROTOCOL, Settings, Wanted, describe, wanted
from cni.node.status import NodeFile, Peer, Status, Writer
from pynet.daemon import lifecycle, logs
from pynet.daemon.loop import BoundedRunner
from pynet.kernel.netevents import Event
from pynet.kernel.netlink import NetlinkError
from pynet.kernel.routes import Change, Rtnetlink
from pynet.netstate import NetState, Route, family_of
from pynet.objects import Node
from pynet.sources import Batch

log = logs.get(__name__)
_REST = 0.01  # seconds between the end of a reconcile and the start of the next
_RETRY, _RETRY_LIMIT = 1.0, 30.0  # seconds until what was refused is tried again; doubled each time


class Options(msgspec.Struct, frozen=True):
    """What the agent is told beside the routes' settings. `conf_dir` None: no configuration is written."""

    settings: Settings
    state_dir: Path
    bridge: str
    conf_dir: Path | None = None
    resync: float = 60.0
    non_masquerade: tuple[str, ...] = ()
    masquerade_link_local: bool = False
    masquerade: masquerading.Choice = "auto"


class Agent:
    """One node's agent. `run` works in the calling thread; `on_batch` and `on_event` may come from any other."""

    def __init__(self, options: Options, metrics: Metrics, kernel: Rtnetlink) -> None:
        self._options, self._metrics, self._kernel = options, metrics, kernel
        self._runner = BoundedRunner(self._reconcile, min_interval=_REST, max_interval=options.resync, retry=_RETRY)
        self._lock = threading.Lock()
        self._nodes: dict[str, Member] | None = None
        self._vxlan = True
        self._masquerading = masquerading.chosen(options.masquerade)
        self._writer = Writer(options.state_dir)
        self._watched: frozenset[int] = frozenset()
        self._quiet: frozenset[int] = frozenset()
        self._told: frozenset[Problem] = frozenset()
        self._last_routes: tuple[Route, ...] | None = None
        self._audited = -float("inf")
        self._failures = 0
        self._refused = 0
        self._timer: threading.Timer | None = None
        self.ready = threading.Event()
        self.failing_since: float | None = None

    def on_batch(self, batch: Batch) -> None:
        """Take what a source says of Nodes."""
        with self._lock:
            if "Node" in batch.replaced:
                self._nodes = {}
            if self._nodes is None:
                return
            for obj in batch.upserts:
                if isinstance(obj, Node):
                    self._nodes[obj.metadata.name] = member_of(obj)
            for ref in batch.deletes:
                if ref.kind == "Node":
                    self._nodes.pop(ref.name, None)
        self._runner.request()

    def on_event(self, event: Event) -> None:
        """Take the kernel's word of a change; ask for a reconcile where it can matter to us."""
        if event.what in ("link", "neighbour"):
            relevant = event.index in self._watched
        elif event.what == "address":
            relevant = event.index not in self._quiet
        else:
            relevant = True
        if relevant:
            log.debug("kernel event", extra=logs.fields(event=event))
            self._runner.request()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""
        self._runner.run(stop)
        if self._timer is not None:
            self._timer.cancel()

    def _reconcile(self) -> None:
        with self._lock:
            if self._nodes is None:
                return
            members = dict(self._nodes)
        started = time.monotonic()
        audit = started - self._audited >= self._options.resync
        problems: list[Problem] = []
        state, want = self._routes(members, problems)
        failed = [
            self._step(problems, "masquerade", lambda: self._masquerade(members, want, audit)),
            self._step(problems, "forwarding", lambda: self._forwarding(want, state, problems)),
            self._step(problems, "conflist", lambda: self._conflist(want, problems)),
            self._step(problems, "status", lambda: self._report(want, state, problems)),
        ]
        if audit:
            self._audited = started
        self._after(any(failed) or self._refused > 0, started)
        self._tell({*problems, *want.problems})
        if not any(failed) and not self.ready.is_set():
            self.ready.set()
            log.info("ready", extra=logs.fields(peers=len(members), routes=len(want.routes)))
            lifecycle.notify("READY=1")

    def _routes(self, members: dict[str, Member], problems: list[Problem]) -> tuple[NetState, Wanted]:
        """Bring devices, neighbours, forwarding entries and routes to what is wanted; return the state after it."""
        settings = msgspec.structs.replace(self._options.settings, vxlan=self._vxlan)
        state = self._kernel.read(overlays=DEVICES.values())
        want = wanted(members, settings, state)
        try:
            changed = overlay.ensure(self._kernel, want.devices, state)
        except NetlinkError as error:
            if error.errno in (95, 22) and not any(state.link(device.name) for device in want.devices):
                self._vxlan = False
            problems.append(Problem("VXLAN", str(error)))
            settings = msgspec.structs.replace(settings, vxlan=False)
            changed = True
        if changed:
            state = self._kernel.read(overlays=DEVICES.values())
            want = wanted(members, settings, state)
        changes = difference(want, state)
        refused = self._apply(changes) if changes else []
        overlay.remove_others(self._kernel, want.devices, state)
        if changes:
            self._count(changes, want, {entry for entry, _ in refused})
            state = self._kernel.read(overlays=DEVICES.values())
        for entry, refusal in refused:
            what = f"route {entry.dst}" if isinstance(entry, Route) else f"entry {entry}"
            problems.append(Problem(what, f"the kernel refused it: {refusal.strerror}"))
        self._refused = len(refused)
        self._last_routes = want.routes
        self._note_links(want, state)
        return state, want

    def _apply(self, changes: Changes) -> list[tuple[Change, NetlinkError]]:
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
        same = want.routes == self._last_routes
        for verb, routes in (
            ("added", changes.add_routes),
            ("replaced", changes.replace_routes),
            ("deleted", changes.delete_routes),
        ):
            done = [route for route in routes if route not in refused]
            self._metrics.changes.labels(verb).inc(len(done))
            if same:
                self._metrics.repaired.inc(len(done))
            level = log.info if len(done) <= 20 else log.debug
            for route in done:
                level(f"route {verb}", extra=logs.fields(route=describe(route), repaired=same))
            if len(done) > 20:
                log.info(f"routes {verb}", extra=logs.fields(count=len(done), repaired=same))

    def _note_links(self, want: Wanted, state: NetState) -> None:
        """Note which links' events matter: those that packets to peers leave by, and not those of the pods."""
        names = {place.dev for place in want.underlay} | {reach.dev for reach in want.reaches}
        names |= {device.name for device in want.devices}
        self._watched = frozenset(link.index for link in state.links if link.name in names)
        self._quiet = frozenset(link.index for link in state.links if link.name == self._options.bridge)

    def _masquerade(self, members: dict[str, Member], want: Wanted, audit: bool) -> None:
        if self._masquerading is None:
            return
        direct = [*self._options.settings.cluster_cidrs, *self._options.non_masquerade]
        direct += [] if self._options.masquerade_link_local else LINK_LOCAL
        direct += [claim.cidr for member in members.values() for claim in member.claims]
        direct += [address for member in members.values() for address in member.addresses]
        if self._masquerading.ensure(masquerade(want.pod_cidrs, direct), audit):
            log.debug("masquerade brought up to date")

    def _forwarding(self, want: Wanted, state: NetState, problems: list[Problem]) -> None:
        families = {family_of(cidr) for cidr in want.pod_cidrs} | {family_of(route.dst) for route in want.routes}
        loose = {device.name for device in want.devices}
        if want.devices:
            loose |= {place.dev for place in want.underlay} | {reach.dev for reach in want.reaches if reach.dev}
        complaints = forwarding.sysctls(families, sorted(loose), (link.name for link in state.links))
        problems += [Problem("sysctl", complaint) for complaint in complaints]

    def _conflist(self, want: Wanted, problems: list[Problem]) -> None:
        folder = self._options.conf_dir
        if folder is None:
            return
        if not want.pod_cidrs:
            own = f"Node {self._options.settings.name}"
            problems.append(Problem(own, "spec.podCIDRs: this node has none, so no network configuration is written"))
            return
        content = conflist.conflist(want.pod_cidrs, want.pod_mtu, self._options.bridge, self._options.state_dir)
        if conflist.write(folder, content):
            file = folder / conflist.NAME
            fields = logs.fields(file=file, pod_cidrs=",".join(want.pod_cidrs), mtu=want.pod_mtu)
            log.info("network configuration written", extra=fields)
        reason = f"a runtime takes it before ours, {conflist.NAME}"
        problems += [Problem(str(folder / name), reason) for name in conflist.preferred_over_ours(folder)]

    def _report(self, want: Wanted, state: NetState, problems: list[Problem]) -> None:
        present = [route for route in state.routes if route.protocol == PROTOCOL]
        metrics = self._metrics
        for family in (4, 6):
            metrics.wanted.labels(str(family)).set(sum(family_of(route.dst) == family for route in want.routes))
            metrics.present.labels(str(family)).set(sum(family_of(route.dst) == family for route in present))
        for how in ("direct", "vxlan", "none"):
            metrics.peers.labels(how).set(sum(reach.how == how for reach in want.reaches))
        metrics.refused.set(self._refused)
        metrics.foreign.set(sum("foreign route" in problem.reason for problem in want.problems))
        every = tuple(sorted({*problems, *want.problems}))
        metrics.problems.set(len(every))
        options = self._options
        node = NodeFile(options.settings.name, want.pod_cidrs, want.pod_mtu, options.bridge, want.underlay)
        self._writer.write(
            Status(
                node=node,
                pid=os.getpid(),
                backend=options.settings.backend,
                masquerade=self._masquerading.name if self._masquerading else "off",
                peers=tuple(
                    Peer(r.node, r.address, r.cidr, r.how, r.dev, r.via, r.mtu, r.reason) for r in want.reaches
                ),
                problems=every,
                routes_wanted=len(want.routes),
                routes_present=len(present),
            )
        )

    def _step(self, problems: list[Problem], name: str, work: Callable[[], None]) -> bool:
        """Do one part of a reconcile; its failure is told and does not stop the others. Return whether it failed."""
        try:
            work()
        except Exception as error:
            problems.append(Problem(name, str(error) or type(error).__name__))
            log.debug("step failed", extra=logs.fields(step=name), exc_info=True)
            return True
        return False

    def _after(self, failed: bool, started: float) -> None:
        """Account for a reconcile; have what failed tried again soon, beside all that events ask for."""
        self._metrics.seconds.observe(time.monotonic() - started)
        self._metrics.reconciles.labels("failed" if failed else "done").inc()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not failed:
            self._metrics.last.set_to_current_time()
            self._failures, self.failing_since = 0, None
            return
        self.failing_since = self.failing_since or started
        pause = min(_RETRY * 2**self._failures, _RETRY_LIMIT)
        self._failures += 1
        self._timer = threading.Timer(pause, self._runner.request)
        self._timer.daemon = True
        self._timer.start()

    def _tell(self, problems: Iterable[Problem]) -> None:
        """Log every problem once, when it comes and when it goes."""
        now = frozenset(problems)
        for problem in sorted(now - self._told):
            log.warning("problem", extra=logs.fields(object=problem.object, reason=problem.reason))
        for problem in sorted(self._told - now):
            log.info("problem is gone", extra=logs.fields(object=problem.object, reason=problem.reason))
        self._told = now
