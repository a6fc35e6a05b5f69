"""Events → plan → mode: when to write, what after a failure, when to look whether the kernel still holds it.

Knows no mode by name and no source. All of `work` runs in one thread; `deliver` comes from any. Nothing is written
before every kind of object was delivered whole once (or the state file stands in for a source that is silent).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Protocol, runtime_checkable

from proxy.cluster import Cluster
from proxy.config import Settings, surroundings
from proxy.lacking import Lacking
from proxy.metrics import Metrics
from proxy.modes import ApplyError, Mode, Written
from proxy.plan import Family, Plan, PlanChange, ServerKey, VirtualServer
from proxy.planning import Contest, Planner
from proxy.quarantine import Suspect, Writer, with_servers_of, without
from pynet.daemon import logs
from pynet.objects import BadObject, Object
from pynet.sources import Batch
from pynet.sources.events import Events

log = logs.get(__name__)
TAMPER_SECONDS = 2.0
_AUDIT_SHARE = 50  # an audit that took a second is not repeated before so many have passed
_RETRY_REFUSED_SECONDS = 600.0
_SILENT_SOURCE_SECONDS = 3.0


class Follower(Protocol):
    """Who wants to know what was written: stale flows, health checks, held ports."""

    def follow(self, cluster: Cluster, changes: Sequence[PlanChange], services: Collection[str]) -> None:
        """Take in what the kernel now has; `changes`: one a family, the first time from an empty plan.

        `services`: whose objects changed, also where that changed no plan.
        """

    def tick(self, now: float) -> None:
        """Do what is due; called about once a second."""


@runtime_checkable
class CountsRules(Protocol):
    """A mode whose rules are counted: the iptables mode."""

    def rule_counts(self) -> dict[tuple[Family, str], int]:
        """Return how many rules of ours stand, by family and table."""


class Snapshots(Protocol):
    """Where the last known good state is kept."""

    def load(self) -> bytes | None:
        """Return what was stored, None where nothing usable is."""

    def store(self, state: Callable[[], bytes], generation: int, now: float) -> None:
        """Store a state, at times of its own choosing; `generation`: another number means another state."""


class Health(Protocol):
    """Who is told how it goes."""

    def queued(self, now: float) -> None:
        """A change is waiting."""

    def written(self, now: float) -> None:
        """Everything known is in the kernel."""


class Engine:
    """The proxy's heart: see the module's head."""

    def __init__(
        self,
        settings: Settings,
        mode: Mode,
        families: Sequence[Family],
        kinds: frozenset[str],
        metrics: Metrics,
        *,
        request: Callable[[], None],
        events: Events,
        health: Health,
        followers: Sequence[Follower] = (),
        snapshots: Snapshots | None = None,
        first_written: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._mode = mode
        self._metrics = metrics
        self._request = request
        self._events = events
        self._health = health
        self._followers = followers
        self._snapshots = snapshots
        self._first_written = first_written
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: list[Batch] = []
        self._silent = set(kinds)
        self._is_state_read = False
        self._started = clock()
        self.cluster = Cluster(settings.node_name)
        self._planners = {family: Planner(family, surroundings(settings, family, None)) for family in families}
        self._applied: dict[Family, Plan] = {}
        self._lacking = {family: Lacking() for family in families}
        self._pending: dict[Family, set[ServerKey]] = {family: set() for family in families}
        self._refused: dict[Family, dict[ServerKey, VirtualServer | None]] = {family: {} for family in families}
        self._retry_refused_at = 0.0
        self._is_loaded = False
        self._is_sound = False  # the kernel holds `_applied`; false: the next write is a full one
        self._checked_at = self._audited_at = self._started
        self._audit_pause = settings.audit_seconds
        self._triggers: list[str] = []
        self._contests: list[Contest] = []
        self._is_announced = False
        self._touched: set[str] = set()
        self._generation = 0

    def deliver(self, batch: Batch) -> None:
        """Take a batch from a source; from any thread."""
        with self._lock:
            self._queue.append(batch)
        self._request()

    def plans(self) -> tuple[Plan, ...]:
        """Return what the kernel holds, a plan a family; from any thread."""
        return tuple(self._applied.values())

    def work(self) -> None:
        """Do all that is due. Raise `ApplyError` where the kernel refused for a reason that is no Service's."""
        now = self._clock()
        touched, is_around_new = self._take_in()
        if not self._may_write(now):
            return
        is_first = not self._is_loaded
        self._is_loaded = True
        if touched or is_around_new or is_first:
            names = self.cluster.services.keys() | touched if is_first or is_around_new else touched
            self._touched |= names
            self._plan(names, is_around_new or is_first)
        if now >= self._retry_refused_at:
            self._release_refused(now)
        if not self._is_sound or any(self._pending.values()) or self._settings_differ():
            changes = self._write()
        else:
            changes = [PlanChange(plan, plan, ()) for plan in self._applied.values()]
        if self._touched or not self._is_announced or any(change.keys for change in changes):
            for follower in self._followers:
                follower.follow(self.cluster, changes, self._touched)
            self._touched = set()
            self._finish()
        self._look(self._clock())
        for follower in self._followers:
            follower.tick(self._clock())
        if self._snapshots and not self._silent:
            self._snapshots.store(self.cluster.snapshot, self._generation, now)

    def _take_in(self) -> tuple[set[str], bool]:
        with self._lock:
            batches, self._queue = self._queue, []
        touched: set[str] = set()
        is_around_new = False
        for batch in batches:
            result = self.cluster.apply(batch)
            touched |= result.services
            is_around_new = is_around_new or result.around
            self._triggers += (stamp for _, stamp in result.triggers)
            self._silent -= batch.replaced
            self._report(result.bad)
            services = sum(ref.kind == "Service" for ref in batch.deletes) + sum(
                type(obj).__name__ == "Service" for obj in batch.upserts
            )
            for family in self._planners:
                self._metrics.changed(family, services, len(batch.upserts) + len(batch.deletes) - services)
        if touched or is_around_new:
            self._generation += 1
            self._health.queued(self._clock())
            for family in self._planners:
                self._metrics.last_queued.labels(family.value).set(time.time())
        return touched, is_around_new

    def _report(self, bad: Iterable[tuple[BadObject, Object]]) -> None:
        for error, obj in bad:
            self._metrics.bad_objects.inc()
            log.warning("object skipped", extra=logs.fields(object=error.where, field=error.field, reason=error.reason))
            self._events.emit("Quarantined", str(error), obj)

    def _may_write(self, now: float) -> bool:
        """Whether enough is known: every kind was delivered, or no source says anything and a state file speaks."""
        if not self._silent or self._is_loaded:
            return True
        if self._snapshots and not self._is_state_read and now - self._started >= _SILENT_SOURCE_SECONDS:
            self._is_state_read = True
            state = self._snapshots.load()
            if state is not None and self.cluster.restore(state):
                waiting = logs.fields(waiting_for=sorted(self._silent))
                log.warning("source is silent: starting from the state file", extra=waiting)
                return True
            if state is not None:
                log.warning("state file is another version's: waiting for the source, and replacing it then")
        return False

    def _plan(self, names: Iterable[str], is_around_new: bool) -> None:
        names = list(names)
        for family, planner in self._planners.items():
            node, cidrs = self.cluster.node, self.cluster.service_cidrs
            around = surroundings(self._settings, family, node, cidrs) if is_around_new else None
            change = planner.update(self.cluster, names, around)
            self._pending[family].update(change.keys)
        contests = sorted({contest for planner in self._planners.values() for contest in planner.contests})
        if contests != self._contests:
            for contest in contests:
                if contest not in self._contests:
                    log.warning(
                        "address is claimed twice; the older Service keeps it", extra=logs.fields(claim=contest)
                    )
                    self._events.emit("AddressInUse", str(contest), self.cluster.told_of(contest.loser.service))
            self._contests = contests
            self._metrics.contests.set(len(contests))

    def _settings_differ(self) -> bool:
        return any(
            family not in self._applied or self._applied[family].settings != planner.plan.settings
            for family, planner in self._planners.items()
        )

    def _release_refused(self, now: float) -> None:
        for family, refused in self._refused.items():
            self._pending[family].update(refused)
            refused.clear()
        self._retry_refused_at = now + _RETRY_REFUSED_SECONDS

    def _wanted(self, family: Family) -> tuple[Plan, tuple[ServerKey, ...]]:
        """Return the plan to write, without what the kernel refused before, and the keys that differ from last time."""
        plan = self._planners[family].plan
        refused = self._refused[family]
        for key, server in list(refused.items()):
            if plan.servers.get(key) != server:
                del refused[key]
                self._pending[family].add(key)
        keys = tuple(sorted(self._pending[family] - refused.keys()))
        if refused:
            applied = self._applied.get(family)
            plan = with_servers_of(plan, applied, refused) if applied else without(plan, refused)
            plan = Plan(family, self._planners[family].plan.settings, plan.servers)
        return plan, keys

    def _write(self) -> list[PlanChange]:
        """Write what is wanted; return the difference to what was written before."""
        began = self._clock()
        wanted = {family: self._wanted(family) for family in self._planners}
        is_partial = self._is_sound and not self._settings_differ()
        writer = Writer(self._mode)
        try:
            if is_partial:
                result = writer.update(
                    {family: PlanChange(self._applied[family], plan, keys) for family, (plan, keys) in wanted.items()}
                )
            else:
                result = writer.sync({family: plan for family, (plan, _) in wanted.items()})
        except ApplyError:
            self._count_failure(is_partial)
            self._is_sound = False
            raise
        took = self._clock() - began
        changes = []
        for family, (_, keys) in wanted.items():
            plan, before = result.plans[family], self._applied.get(family)
            changed = keys if before is not None else tuple(plan.servers)
            change = PlanChange(before or Plan(family, plan.settings), plan, changed)
            changes.append(change)
            self._applied[family] = plan
            self._pending[family].clear()
            self._observe(change, result.written, took, is_partial)
        self._note_refused(result.refused)
        if result.refused:
            self._count_failure(is_partial)
        self._is_sound = True
        if not is_partial:  # a full write has compared everything
            self._audited_at = self._checked_at = self._clock()
        return changes

    def _finish(self) -> None:
        """Tell that everything known is in the kernel."""
        if not self._is_announced:  # healthy is who has nothing else standing that would answer in place of this mode
            self._is_announced = True
            self._first_written()
        self._health.written(self._clock())
        for family in self._planners:
            self._metrics.nothing_pending(family)
        self._note_triggers()

    def _note_refused(self, refused: dict[Suspect, str]) -> None:
        for (family, key), reason in refused.items():
            log.error("the kernel refused a Service port; all others work", extra=logs.fields(port=key, reason=reason))
            about = self.cluster.told_of(key.service)
            self._events.emit("Quarantined", f"{key}: its rules were refused: {reason}"[:1000], about)
            self._refused[family][key] = self._planners[family].plan.servers.get(key)
        for family, kept in self._refused.items():
            self._metrics.quarantined.labels(family.value).set(len(kept))

    def _count_failure(self, is_partial: bool) -> None:
        for family in self._planners:
            if self._mode.name == "iptables":
                self._metrics.iptables_failures.labels(family.value).inc()
                if is_partial:
                    self._metrics.iptables_partial_failures.labels(family.value).inc()
            elif self._mode.name == "nftables":
                self._metrics.nftables_failures.labels(family.value).inc()

    def _observe(self, change: PlanChange, written: Written, took: float, is_partial: bool) -> None:
        family, plan, changed = change.new.family, change.new, change.keys
        metrics, label = self._metrics, family.value
        metrics.sync_seconds.labels(label).observe(took)
        (metrics.partial_sync_seconds if is_partial else metrics.full_sync_seconds).labels(label).observe(took)
        metrics.last_sync.labels(label).set(time.time())
        metrics.servers.labels(label).set(len(plan.servers))
        metrics.services.set(len(self.cluster.services))
        if isinstance(self._mode, CountsRules):
            metrics.iptables_last.labels("nat", label).set(written.objects)
            for (of, table), count in self._mode.rule_counts().items():
                metrics.iptables_total.labels(table, of.value).set(count)
        for policy, count in self._lacking[family].follow(plan, changed).items():
            metrics.no_local_endpoints.labels(policy, label).set(count)
        log.debug(
            "written",
            extra=logs.fields(
                family=label,
                partial=is_partial,
                objects=written.objects,
                render_ms=round(written.render_seconds * 1000, 1),
                apply_ms=round(written.apply_seconds * 1000, 1),
                total_ms=round(took * 1000, 1),
            ),
        )

    def _note_triggers(self) -> None:
        stamps, self._triggers = self._triggers, []
        for stamp in stamps:
            seconds = seconds_since(stamp, time.time())
            if seconds is not None:
                for family in self._planners:
                    self._metrics.programming_seconds.labels(family.value).observe(seconds)

    def _look(self, now: float) -> None:
        """Look whether the kernel still holds what was written: the cheap way often, the thorough way now and then."""
        if not self._is_sound:
            return
        is_due = self._settings.audit_seconds > 0 and now - self._audited_at >= self._audit_pause
        if not is_due and now - self._checked_at >= TAMPER_SECONDS:
            self._checked_at = now
            if self._mode.tampered():
                self._metrics.tampered.inc()
                log.warning("our rules were changed by somebody else: comparing all of them with the plan")
                is_due = True
        if is_due:
            self._audit()

    def _audit(self) -> None:
        began = self._clock()
        try:
            drift = self._mode.audit()
        except ApplyError:
            self._is_sound = False
            raise
        self._metrics.audits.inc()
        self._metrics.drift.inc(len(drift.found))
        for key, what in drift.found[:20]:
            log.warning("repaired what differed from the plan", extra=logs.fields(port=key or "-", what=what))
        if len(drift.found) > 20:
            log.warning("repaired more of the same", extra=logs.fields(count=len(drift.found) - 20))
        self._audited_at = self._checked_at = self._clock()
        self._audit_pause = max(self._settings.audit_seconds, _AUDIT_SHARE * (self._audited_at - began))


def seconds_since(stamp: str, now: float) -> float | None:
    """Return the seconds from an RFC 3339 time to `now` (seconds since the epoch); None where it is none."""
    try:
        return max(0.0, now - datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp())
    except ValueError:
        return None
