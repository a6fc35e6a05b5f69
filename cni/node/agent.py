"""The agent: when Nodes or the kernel change, and from time to time, does each part of the node's work again.

Parts do not stop each other: where nothing can masquerade, routes still are kept. What fails is told once, shown by
`pynetd status`, and tried again, while changes go on being served.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from cni.node import acceptance, conflist, forwarding, masquerading
from cni.node.glance import Glances
from cni.node.ledger import Ledger
from cni.node.masquerade import LINK_LOCAL, Masquerade, masquerade
from cni.node.membership import Membership
from cni.node.metrics import Metrics
from cni.node.nodes import Member, Problem, claim_of
from cni.node.podcidrs import Pool
from cni.node.routes import DEVICES, PROTOCOL, Settings, Wanted
from cni.node.status import NodeFile, Peer, Status, Writer
from cni.node.ways import Outcome, Ways
from pynet.daemon import lifecycle, logs
from pynet.daemon.loop import BoundedRunner
from pynet.kernel.netevents import Event
from pynet.kernel.routes import Rtnetlink
from pynet.netstate import family_of
from pynet.sources import Batch
from pynet.sources.events import Events, NoEvents

log = logs.get(__name__)
_REST = 0.05  # seconds between the end of a reconcile and the start of the next
_LOOK_AT_FORWARD = 10.0  # seconds: for what no glance at the FORWARD chain tells
_RETRY, _RETRY_LIMIT = 1.0, 30.0  # seconds until what was refused is tried again; doubled each time


class Options(msgspec.Struct, frozen=True):
    """What the agent is told beside the routes' settings. `conf_dir` None: no configuration is written; `ledger`:
    where pod CIDRs from `pools` are assigned, if they are.
    """

    settings: Settings
    state_dir: Path
    bridge: str
    conf_dir: Path | None = None
    resync: float = 60.0
    non_masquerade: tuple[str, ...] = ()
    masquerade_link_local: bool = False
    masquerade: masquerading.Choice = "auto"
    ledger: Ledger | None = None
    pools: tuple[Pool, ...] = ()


class Agent:
    """One node's agent. `run` works in the calling thread; what is named `on_…` may be called from any other."""

    def __init__(self, options: Options, metrics: Metrics, kernel: Rtnetlink, events: Events | None = None) -> None:
        self._options, self._metrics = options, metrics
        self._events = events or NoEvents()
        self._pause = pause = min(options.resync, _LOOK_AT_FORWARD)
        self._runner = BoundedRunner(self._reconcile, min_interval=_REST, max_interval=pause, retry=_RETRY)
        self._membership = Membership(options.ledger, options.pools, options.settings.name)
        self._ways = Ways(options.settings, kernel, metrics)
        self._masquerading = masquerading.chosen(options.masquerade)
        self._masqueraded: tuple[dict[str, Member], tuple[str, ...], Masquerade] | None = None
        self._writer = Writer(options.state_dir)
        self._watched: frozenset[int] = frozenset()
        self._overlays: frozenset[int] = frozenset()
        self._quiet: frozenset[int] = frozenset()
        self._told: frozenset[Problem] = frozenset()
        self._look = threading.Event()
        self._looked = self._audited = -float("inf")
        self._accepted: tuple[str, ...] = ()
        self._accepted_at = -float("inf")
        self._rules_changed = threading.Event()
        self.glances = Glances()
        self._closed: list[str] = []
        self._failures = 0
        self._timer: threading.Timer | None = None
        self.ready = threading.Event()
        self.pod_cidrs: tuple[str, ...] = ()
        self.failing_since: float | None = None

    def on_batch(self, batch: Batch) -> None:
        """Take what a source says of Nodes."""
        self._membership.take(batch)
        self._runner.request()

    def on_record(self) -> None:
        """Take word that the record of assigned pod CIDRs may have changed."""
        self._runner.request()

    def on_event(self, event: Event) -> None:
        """Take the kernel's word of a change; ask for a reconcile where it can matter to us."""
        if event.what == "neighbour":
            # the underlay's change all the time and are the kernel's own. The kernel does not say who made a forwarding
            # entry: ours are known by what they say
            relevant = event.index in self._overlays
            if event.mac:
                relevant = relevant and ((event.mac, event.remote) in self._ways.entries) == event.gone
        elif event.what == "link":
            relevant = event.index in self._watched
        else:
            relevant = event.what != "address" or event.index not in self._quiet
        if relevant:
            log.debug("kernel event", extra=logs.fields(event=event))
            self._look.set()
            self._runner.request()

    def on_glance(self) -> None:
        """Take word that somebody may have closed a FORWARD chain, or changed our masquerade."""
        self._rules_changed.set()
        self._runner.request()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""
        self._runner.run(stop)
        if self._timer is not None:
            self._timer.cancel()

    def _reconcile(self) -> None:
        started = time.monotonic()
        current = self._membership.current()
        if current is None:
            return
        members, problems = current
        audit = self._rules_changed.is_set() or started - self._audited >= self._options.resync
        self._rules_changed.clear()
        look = self._look.is_set() or started - self._looked >= self._pause
        if look:
            self._look.clear()
            self._looked = started
        try:
            outcome = self._ways.bring(members, look)
        except Exception:
            self.failing_since = self.failing_since or started
            self._look.set()
            raise
        want = outcome.want
        problems += [*want.problems, *outcome.problems]
        self.pod_cidrs = want.pod_cidrs
        self._note_links(outcome)
        failed = [
            self._step(problems, "masquerade", lambda: self._masquerade(members, want, audit)),
            self._step(problems, "forwarding", lambda: self._forwarding(outcome, problems, audit)),
            self._step(problems, "network configuration", lambda: self._configure_runtime(want, problems)),
            self._step(problems, "status", lambda: self._report(outcome, problems)),
        ]
        if audit:
            self.glances.note()
            self._audited = started if not any(failed) else self._audited
        self._after(any(failed) or outcome.refused > 0, started)
        self._tell(problems)
        if not any(failed) and not self.ready.is_set():
            self.ready.set()
            log.info("ready", extra=logs.fields(nodes=len(members), routes=len(want.routes)))
            lifecycle.notify("READY=1")

    def _note_links(self, outcome: Outcome) -> None:
        """Note which links' events matter: those that packets to peers leave by, and not those of the pods."""
        want, links = outcome.want, outcome.state.links
        names = {place.dev for place in want.underlay} | {reach.dev for reach in want.reaches}
        names |= {device.name for device in want.devices}
        self._watched = frozenset(link.index for link in links if link.name in names)
        self._overlays = frozenset(link.index for link in links if link.name in DEVICES.values())
        self._quiet = frozenset(link.index for link in links if link.name == self._options.bridge)

    def _masquerade(self, members: dict[str, Member], want: Wanted, audit: bool) -> None:
        if self._masqueraded is not None and self._masqueraded[:2] == (members, want.pod_cidrs):
            self._masquerading.ensure(self._masqueraded[2], audit)
            return
        direct = [*self._options.settings.cluster_cidrs, *self._options.non_masquerade]
        direct += [] if self._options.masquerade_link_local else LINK_LOCAL
        # what the cluster CIDRs cover needs no element of its own
        covers = [claim_of(cidr) for cidr in self._options.settings.cluster_cidrs]
        direct += [c.cidr for c in want.claims if not any(w.first <= c.first and c.last <= w.last for w in covers)]
        direct += [address for member in members.values() for address in member.addresses]
        sets = masquerade(want.pod_cidrs, direct)
        self._masquerading.ensure(sets, audit)
        self._masqueraded = (members, want.pod_cidrs, sets)

    def _forwarding(self, outcome: Outcome, problems: list[Problem], audit: bool) -> None:
        want = outcome.want
        families = {family_of(cidr) for cidr in want.pod_cidrs} | {family_of(route.dst) for route in want.routes}
        loose = {device.name for device in want.devices}
        if want.devices:
            loose |= {place.dev for place in want.underlay} | {reach.dev for reach in want.reaches if reach.dev}
        quiet = {"lo", self._options.bridge, *DEVICES.values()}
        outer = [link.name for link in outcome.state.links if link.name not in quiet]
        complaints = forwarding.sysctls(families, sorted(loose), outer)
        passing = self._options.settings.cluster_cidrs or want.pod_cidrs
        due = audit or time.monotonic() - self._accepted_at >= self._pause
        if due or passing != self._accepted:
            self._closed = acceptance.ensure(passing)
            self._accepted, self._accepted_at = passing, time.monotonic()
        problems += [Problem("forwarding", complaint) for complaint in (*complaints, *self._closed)]

    def _configure_runtime(self, want: Wanted, problems: list[Problem]) -> None:
        folder = self._options.conf_dir
        if folder is None:
            return
        own, cidrs = f"Node {self._options.settings.name}", conflist.with_room(want.pod_cidrs)
        small = [cidr for cidr in want.pod_cidrs if cidr not in cidrs]
        problems += [Problem(own, f"spec.podCIDRs: {cidr} has no room for a pod") for cidr in small]
        if not cidrs:
            problems.append(Problem(own, "spec.podCIDRs: this node has none, so no network configuration is written"))
            return
        content = conflist.conflist(cidrs, want.pod_mtu, self._options.bridge, self._options.state_dir)
        if conflist.write(folder, content):
            file = folder / conflist.NAME
            fields = logs.fields(file=file, pod_cidrs=",".join(cidrs), mtu=want.pod_mtu)
            log.info("network configuration written", extra=fields)
        reason = f"a runtime takes it before ours, {conflist.NAME}"
        problems += [Problem(str(folder / name), reason) for name in conflist.preferred_over_ours(folder)]

    def _report(self, outcome: Outcome, problems: Iterable[Problem]) -> None:
        want, metrics, options = outcome.want, self._metrics, self._options
        present = [route for route in outcome.state.routes if route.protocol == PROTOCOL]
        every = tuple(sorted(set(problems)))
        metrics.routes(want.routes, present)
        for how in ("direct", "vxlan", "none"):
            metrics.peers.labels(how).set(sum(reach.how == how for reach in want.reaches))
        metrics.refused.set(outcome.refused)
        metrics.foreign.set(sum("foreign route" in problem.reason for problem in want.problems))
        metrics.problems.set(len(every))
        node = NodeFile(options.settings.name, want.pod_cidrs, want.pod_mtu, options.bridge, want.underlay)
        self._writer.write(
            Status(
                node=node,
                pid=os.getpid(),
                backend=options.settings.backend,
                masquerade=self._masquerading.name,
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
            log.debug("part failed", extra=logs.fields(part=name), exc_info=True)
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
            if "foreign route" in problem.reason:  # what only a person can undo
                self._events.emit("ForeignRoute", f"{problem.object}: {problem.reason}")
        for problem in sorted(self._told - now):
            log.info("problem is gone", extra=logs.fields(object=problem.object, reason=problem.reason))
        self._told = now
