"""When the engine writes, what it does after failures, and whom it tells; with a fake mode that keeps what it gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from proxy.cluster import KINDS, Cluster
from proxy.config import Settings
from proxy.engine import Engine, seconds_since
from proxy.health import Health
from proxy.metrics import Metrics
from proxy.modes import ApplyError, Drift, Written
from proxy.plan import Family, Plan, PlanChange, ServerKey
from proxy.snapshot import StateFile
from pynet.objects import Metadata, Node, NodeSpec, Object, Ref, Service, Taint
from pynet.sources import Batch
from support.objects import endpoint, piece, service


class Kernel:
    """A mode that keeps plans, refuses Services named `bad…`, and may blame them by name."""

    name = "iptables"

    def __init__(self, *, blames: bool = False) -> None:
        self.held: dict[Family, Plan] = {}
        self.calls: list[str] = []
        self.broken = ""
        self.is_tampered = False
        self._blames = blames

    def _check(self, plans: Sequence[Plan]) -> None:
        if self.broken:
            raise ApplyError(self.broken)
        bad = [key for plan in plans for key in plan.servers if "/bad" in key.service]
        if bad:
            raise ApplyError("refused", bad[:1] if self._blames else ())

    def sync(self, plans: Sequence[Plan]) -> Written:
        self.calls.append("sync")
        self._check(plans)
        self.held = {plan.family: plan for plan in plans}
        return Written(1)

    def update(self, changes: Sequence[PlanChange]) -> Written:
        self.calls.append("update")
        self._check([change.new for change in changes])
        for change in changes:
            held = self.held[change.old.family]
            assert held == change.old
            assert {
                k for k in held.servers | change.new.servers if held.servers.get(k) != change.new.servers.get(k)
            } <= {*change.keys}
            self.held[change.new.family] = change.new
        return Written(1)

    def audit(self) -> Drift:
        self.calls.append("audit")
        self.is_tampered = False
        return Drift(((None, "something"),))

    def tampered(self) -> bool:
        return self.is_tampered

    def cleanup(self) -> None:
        self.held = {}


class Recorder:
    """A follower."""

    def __init__(self) -> None:
        self.seen: list[tuple[set[ServerKey], set[str]]] = []

    def follow(self, cluster: object, changes: Sequence[PlanChange], services: set[str]) -> None:
        self.seen.append(({key for change in changes for key in change.keys}, set(services)))

    def tick(self, now: float) -> None:
        pass


class Bench:
    """An engine with everything around it, and a clock that tests set."""

    def __init__(self, kernel: Kernel | None = None, state: StateFile | None = None) -> None:
        self.now = 1000.0
        self.kernel = kernel or Kernel()
        self.recorder = Recorder()
        self.metrics = Metrics()
        self.announced = 0
        self.told: list[tuple[str, str, str]] = []
        self.health = Health([Family.V4], 30, lambda: self.engine.cluster.node, clock=lambda: self.now)
        self.engine = Engine(
            Settings(node_name="n1"),
            self.kernel,
            [Family.V4],
            KINDS,
            self.metrics,
            request=lambda: None,
            events=self,
            health=self.health,
            followers=[self.recorder],
            snapshots=state,
            first_written=self._announce,
            clock=lambda: self.now,
        )

    def emit(self, reason: str, message: str, about: Object | Ref | None = None, severity: str = "Warning") -> None:
        assert isinstance(about, Service)
        self.told.append((reason, about.metadata.name, about.metadata.uid))

    def close(self) -> None:
        """As an Event's way has it."""

    def _announce(self) -> None:
        self.announced += 1
        self.was_healthy = self.health.is_healthy()

    def tell(self, *objects: Object, deletes: tuple[Ref, ...] = (), replaced: frozenset[str] = frozenset()) -> None:
        self.engine.deliver(Batch(upserts=objects, deletes=deletes, replaced=replaced))
        self.engine.work()

    def start(self, *objects: Object) -> None:
        self.tell(*objects, replaced=KINDS)

    @property
    def services(self) -> set[str]:
        return {key.service.partition("/")[2] for plan in self.kernel.held.values() for key in plan.servers}

    def count(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


def web(name: str = "web", number: int = 1) -> tuple[Object, Object]:
    return service(name, f"10.0.0.{number}"), piece(name, f"10.1.0.{number}")


def test_nothing_is_written_before_every_kind_was_delivered() -> None:
    bench = Bench()
    for kind in sorted(KINDS):
        assert bench.kernel.calls == []
        assert bench.health.healthz().status == 503
        bench.tell(*(web() if kind == "EndpointSlice" else ()), replaced=frozenset({kind}))
    assert bench.kernel.calls == ["sync"]
    assert bench.health.healthz().status == 200
    assert bench.announced == 1


def test_events_on_a_service_carry_its_uid() -> None:
    """`kubectl describe` asks for a Service's Events by its uid."""

    def known(name: str, uid: str, *ports: dict[str, object]) -> Object:
        made = service(name, "10.0.0.9", *ports)
        return replace(made, metadata=replace(made.metadata, uid=uid))

    bench = Bench()
    bench.start(known("first", "1"), known("second", "2"), known("bad", "3"), known("worse", "4", {"port": 0}))
    assert sorted(bench.told) == [
        ("AddressInUse", "first", "1"),
        ("AddressInUse", "second", "2"),
        ("Quarantined", "bad", "3"),
        ("Quarantined", "worse", "4"),
    ]


def test_an_empty_cluster_is_written_and_healthy_too() -> None:
    bench = Bench()
    bench.start()
    assert bench.kernel.calls == ["sync"]
    assert (bench.health.healthz().status, bench.announced) == (200, 1)


def test_changes_are_updates_of_what_changed_and_batches_join() -> None:
    bench = Bench()
    bench.start(*web("a", 1), *web("b", 2))
    bench.engine.deliver(Batch(upserts=(piece("a", "10.1.0.9"),)))
    bench.engine.deliver(Batch(upserts=(piece("b", "10.1.0.8"),)))
    bench.engine.work()
    bench.engine.work()
    assert bench.kernel.calls == ["sync", "update"]
    assert {key.service for key in bench.recorder.seen[-1][0]} == {"default/a", "default/b"}


def test_followers_hear_of_objects_that_change_no_plan() -> None:
    bench = Bench()
    bench.start(*web())
    bench.tell(piece("web", "10.1.0.1", name="web-2"))  # the same endpoint, in one more slice
    assert bench.kernel.calls == ["sync"]
    assert bench.recorder.seen[-1] == (set(), {"default/web"})


def test_a_deleted_service_goes() -> None:
    bench = Bench()
    bench.start(*web("a", 1), *web("b", 2))
    bench.tell(deletes=(Ref("Service", "default", "a"),))
    assert bench.services == {"b"}
    bench.start(*web("c", 3))
    assert bench.services == {"c"}, "a replacing batch forgets what it does not name"


def test_a_failure_is_raised_and_the_next_write_is_whole() -> None:
    bench = Bench()
    bench.start(*web())
    bench.kernel.broken = "the lock is held"
    bench.engine.deliver(Batch(upserts=(piece("web", "10.1.0.9"),)))
    with pytest.raises(ApplyError):
        bench.engine.work()
    bench.now += 61
    assert bench.health.healthz().status == 503
    bench.kernel.broken = ""
    bench.engine.work()
    assert bench.kernel.calls[-1] == "sync"
    assert bench.health.healthz().status == 200
    assert [e.address for plan in bench.kernel.held.values() for s in plan.servers.values() for e in s.cluster] == [
        "10.1.0.9"
    ]


@pytest.mark.parametrize("blames", [True, False], ids=["named by the tool", "found by halving"])
def test_a_refused_service_is_set_aside_at_the_start(blames: bool) -> None:
    bench = Bench(Kernel(blames=blames))
    good = [each for n in range(20) for each in web(f"good{n}", n)]
    bench.start(*good, *web("bad1", 101), *web("bad2", 102))
    assert bench.services == {f"good{n}" for n in range(20)}
    assert bench.metrics.registry.get_sample_value("pyproxy_quarantined_service_ports", {"ip_family": "IPv4"}) == 2
    assert bench.health.healthz().status == 200


@pytest.mark.parametrize("blames", [True, False], ids=["named by the tool", "found by halving"])
def test_a_refused_service_is_set_aside_later_and_others_go_on(blames: bool) -> None:
    bench = Bench(Kernel(blames=blames))
    bench.start(*web("good1", 1))
    bench.tell(*web("bad", 9), *web("good2", 2), *web("good3", 3))
    assert bench.services == {"good1", "good2", "good3"}
    failures = "kubeproxy_sync_proxy_rules_iptables_restore_failures_total"
    assert bench.metrics.registry.get_sample_value(failures, {"ip_family": "IPv4"}) == 1
    calls = len(bench.kernel.calls)
    bench.tell(*web("good4", 4))
    assert bench.services == {"good1", "good2", "good3", "good4"}
    assert bench.kernel.calls[calls:] == ["update"], "what was refused is not tried again at each change"
    bench.tell(deletes=(Ref("Service", "default", "bad"),))
    assert bench.metrics.registry.get_sample_value("pyproxy_quarantined_service_ports", {"ip_family": "IPv4"}) == 0


def test_tampering_leads_to_an_audit() -> None:
    bench = Bench()
    bench.start(*web())
    bench.kernel.is_tampered = True
    bench.engine.work()
    assert bench.kernel.calls == ["sync"]
    bench.now += 2
    bench.engine.work()
    assert bench.kernel.calls == ["sync", "audit"]
    assert bench.count("pyproxy_drift_total") == 1


def test_audits_come_by_themselves() -> None:
    bench = Bench()
    bench.start(*web())
    bench.now += 61
    bench.engine.work()
    assert bench.kernel.calls == ["sync", "audit"]


def test_bad_objects_are_counted_and_skipped() -> None:
    bench = Bench()
    bench.start(*web("a", 1), service("b", "10.0.0.2", {"port": 0}))
    assert bench.services == {"a"}
    assert bench.count("pyproxy_bad_objects_total") == 1


def test_a_silent_source_is_replaced_by_the_state_file_and_then_corrects_it(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state")
    bench = Bench(state=file)
    bench.start(*web("a", 1), *web("b", 2))
    later = Bench(state=StateFile(tmp_path / "state"))
    later.engine.work()
    assert later.kernel.calls == [], "a source has some seconds to speak"
    later.now += 4
    later.engine.work()
    assert later.services == {"a", "b"}
    later.start(*web("b", 2))
    assert later.services == {"b"}


@pytest.mark.parametrize("harm", [b"", b"x" * 500], ids=["cut short", "overwritten"])
def test_a_damaged_state_file_is_not_believed(tmp_path: Path, harm: bytes) -> None:
    bench = Bench(state=StateFile(tmp_path / "state"))
    bench.start(*web())
    data = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(harm or data[:-3])
    later = Bench(state=StateFile(tmp_path / "state"))
    later.now += 4
    later.engine.work()
    assert later.kernel.calls == []


def test_a_state_file_of_another_version_is_named_once_and_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    StateFile(tmp_path / "state").store(lambda: b"\x81\xa7version\x00", 1, 0.0)
    later = Bench(state=StateFile(tmp_path / "state"))
    for _ in range(5):
        later.now += 4
        later.engine.work()
    assert later.kernel.calls == []
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["state file is another version's"]
    later.start(*web())
    assert later.services == {"web"}


def test_a_state_file_of_another_node_says_nothing_of_this_one(tmp_path: Path) -> None:
    other = Cluster("n9")
    other.apply(Batch((*web(), Node(metadata=Metadata(name="n9", labels={"topology.kubernetes.io/zone": "far"})))))
    StateFile(tmp_path / "state").store(other.snapshot, 1, 0.0)
    later = Bench(state=StateFile(tmp_path / "state"))
    later.now += 4
    later.engine.work()
    assert later.services == {"web"}
    assert later.engine.cluster.node is None


def test_healthy_is_who_has_removed_the_other_modes() -> None:
    bench = Bench()
    bench.start(*web())
    assert bench.announced == 1
    assert not bench.was_healthy
    assert bench.health.is_healthy()


def test_seconds_since_a_trigger() -> None:
    assert seconds_since("1970-01-01T00:00:10Z", 15.0) == 5
    assert seconds_since("1970-01-01T00:00:10.5Z", 10.0) == 0
    assert seconds_since("yesterday", 15.0) is None


def test_trigger_times_are_measured() -> None:
    bench = Bench()
    bench.start(*web())
    bench.tell(piece("web", "10.1.0.7", trigger="2026-01-01T00:00:00Z"))
    name = "kubeproxy_network_programming_duration_seconds_count"
    assert bench.metrics.registry.get_sample_value(name, {"ip_family": "IPv4"}) == 1


def test_health_is_told_as_kube_proxy_tells_it() -> None:
    """Fresh `lastUpdated` while all is well; a node that is going is told by /healthz alone."""
    bench = Bench()
    bench.start(*web())
    well = bench.health.healthz()
    body = json.loads(well.body)
    assert (well.status, well.content_type, dict(well.headers)["X-Content-Type-Options"]) == (
        200, "application/json", "nosniff",
    )  # fmt: skip
    assert body["lastUpdated"] == body["currentTime"] and body["nodeEligible"] is True
    assert body["status"]["IPv4"]["healthy"] is True and body["status"]["IPv4"]["lastUpdated"] <= body["currentTime"]
    assert "nodeEligible" not in json.loads(bench.health.livez().body)
    for metadata, spec in (
        (Metadata(name="n1", deletion_timestamp="2026-01-01T00:00:00Z"), NodeSpec()),
        (Metadata(name="n1"), NodeSpec(taints=(Taint("ToBeDeletedByClusterAutoscaler", effect="NoSchedule"),))),
    ):
        bench.tell(Node(metadata, spec))
        gone = bench.health.healthz()
        assert (gone.status, json.loads(gone.body)["nodeEligible"]) == (503, False)
        assert json.loads(gone.body)["lastUpdated"] < json.loads(gone.body)["currentTime"]
        assert bench.health.livez().status == 200
    bench.tell(Node(Metadata(name="n1"), NodeSpec()))
    assert bench.health.healthz().status == 200


def test_ports_without_a_local_endpoint_are_counted_as_they_come_and_go() -> None:
    bench = Bench()

    def lacking(policy: str) -> float | None:
        return bench.metrics.registry.get_sample_value(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total", {"traffic_policy": policy, "ip_family": "IPv4"}
        )

    bench.start(service("a", "10.0.0.1", internalTrafficPolicy="Local"), piece("a", endpoint("10.1.0.1", "n2")))
    assert (lacking("internal"), lacking("external")) == (1, 0)
    bench.tell(service("b", "10.0.0.2", internalTrafficPolicy="Local"), piece("b", endpoint("10.1.0.2", "n2")))
    assert lacking("internal") == 2
    bench.tell(piece("a", endpoint("10.1.0.3", "n1")))
    assert lacking("internal") == 1
    bench.tell(deletes=(Ref("Service", "default", "b"),))
    assert lacking("internal") == 0
