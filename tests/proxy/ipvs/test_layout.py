"""A Service port in IPVS's words, steps between two states, differences of sets, the constant rules. No kernel."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.modes.ipvs import layout, rules, sets
from proxy.modes.ipvs.drains import Drains
from proxy.modes.ipvs.layout import Ground, Wanted
from proxy.modes.ipvs.steps import Do, Live, Step, steps
from proxy.plan import (
    Action,
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    LocalKind,
    NodeSettings,
    ServerKey,
    Verdict,
    VirtualServer,
)
from pynet.ipvs import SCHED_FALLBACK, Destination, DestinationId, Service, ServiceId

CLUSTER, LOCAL, DROP, REJECT = (
    Verdict(action) for action in (Action.CLUSTER, Action.LOCAL, Action.DROP, Action.REJECT)
)
MASQUERADED = Verdict(Action.CLUSTER, masquerade=True)
SETTINGS = NodeSettings(detector=LocalDetector(LocalKind.CIDR, ("10.244.0.0/16",)))
GROUND = Ground(Family.V4, SETTINGS, ("192.168.0.1", "192.168.1.1"))
NEAR, FAR = Endpoint("10.244.1.2", 8080, local=True), Endpoint("10.244.2.2", 8080)
CLUSTER_IP = Frontend(FrontendKind.CLUSTER_IP, "10.96.0.1", 80, CLUSTER, MASQUERADED, MASQUERADED)
KEY = ServerKey("default/web", "http", "TCP")
WEB = VirtualServer(KEY, (CLUSTER_IP,), (NEAR, FAR), (NEAR,))
VIP = ServiceId(4, "10.96.0.1", 80, "TCP")


def with_frontend(*frontends: Frontend, **more: object) -> VirtualServer:
    return msgspec.structs.replace(WEB, frontends=frontends, **more)


def test_a_cluster_ip() -> None:
    piece = layout.piece(GROUND, WEB)
    weights = {DestinationId("10.244.1.2", 8080): 1, DestinationId("10.244.2.2", 8080): 1}
    assert piece.services == {VIP: Wanted(Service("rr"), weights, 3600.0)}
    assert piece.entries == dict.fromkeys(("SERVERS", "MASQ-NODE", "MASQ-OUT"), ("10.96.0.1,tcp:80",))
    assert piece.addresses == ("10.96.0.1",)


def test_a_node_port_is_on_every_address_of_the_node_and_not_on_our_link() -> None:
    port = Frontend(FrontendKind.NODE_PORT, "", 30080, MASQUERADED, MASQUERADED, MASQUERADED)
    piece = layout.piece(GROUND, with_frontend(port))
    assert [str(name) for name in piece.services] == ["TCP 192.168.0.1:30080", "TCP 192.168.1.1:30080"]
    assert piece.addresses == ()
    narrow = msgspec.structs.replace(SETTINGS, node_port_addresses=("192.168.1.0/24",))
    piece = layout.piece(msgspec.structs.replace(GROUND, settings=narrow), with_frontend(port))
    assert [str(name) for name in piece.services] == ["TCP 192.168.1.1:30080"]


def test_policy_local_has_the_outside_on_the_address_and_the_others_on_a_mark() -> None:
    port = Frontend(FrontendKind.LOAD_BALANCER, "203.0.113.1", 80, CLUSTER, MASQUERADED, LOCAL)
    server = with_frontend(port)
    assert layout.needs_mark(server)
    piece = layout.piece(GROUND, server, 0x8001)
    address, mark = ServiceId(4, "203.0.113.1", 80, "TCP"), ServiceId(4, mark=0x8001)
    assert {name: {d.address for d in one.destinations} for name, one in piece.services.items()} == {
        address: {"10.244.1.2"},
        mark: {"10.244.1.2", "10.244.2.2"},
    }
    assert piece.entries == {"SERVERS": ("203.0.113.1,tcp:80",), "SPLIT": ("203.0.113.1,tcp:80 skbmark 0x8001",)}


def test_affinity_is_persistence_on_an_address_and_a_hash_on_a_mark() -> None:
    port = Frontend(FrontendKind.NODE_PORT, "", 30080, CLUSTER, MASQUERADED, LOCAL)
    piece = layout.piece(GROUND, with_frontend(port, affinity_seconds=60), 0x8001)
    assert piece.services[ServiceId(4, "192.168.0.1", 30080, "TCP")].service == Service("rr", 60)
    assert piece.services[ServiceId(4, mark=0x8001)].service == Service("mh", 0, SCHED_FALLBACK)


@pytest.mark.parametrize(
    ("verdicts", "sets_of", "has_server"),
    [
        ((CLUSTER, MASQUERADED, DROP), {"DROP-OUT", "MASQ-NODE", "SERVERS"}, True),
        ((DROP, DROP, DROP), {"DROP-POD", "DROP-NODE", "DROP-OUT", "SERVERS"}, False),
        ((REJECT, REJECT, REJECT), {"REJECT", "SERVERS"}, False),
    ],
)
def test_what_is_not_forwarded(verdicts: tuple[Verdict, ...], sets_of: set[str], has_server: bool) -> None:
    frontend = Frontend(FrontendKind.CLUSTER_IP, "10.96.0.1", 80, *verdicts)
    piece = layout.piece(GROUND, with_frontend(frontend))
    assert piece.entries.keys() == sets_of
    assert bool(piece.services[VIP].destinations) is has_server


def test_source_ranges_are_spelled_as_ipset_prints_them() -> None:
    ranged = msgspec.structs.replace(CLUSTER_IP, source_ranges=("10.0.0.0/8", "192.0.2.1/32"))
    entries = layout.piece(GROUND, with_frontend(ranged)).entries
    assert entries["RANGES"] == ("10.96.0.1,tcp:80,10.0.0.0/8", "10.96.0.1,tcp:80,192.0.2.1")


@pytest.mark.parametrize(
    ("named", "weights", "lacking", "scheduler", "flags"),
    [
        ("random", (1, 1), (), "rr", 0),
        ("wlc", (1, 1), (), "wlc", 0),
        ("wlc", (1, 1), ("wlc",), "rr", 0),
        ("random", (1, 3), (), "wrr", 0),
        ("lc", (1, 3), (), "wlc", 0),
        ("mh", (1, 1), (), "mh", SCHED_FALLBACK),
        ("nonsense", (1, 1), (), "rr", 0),
    ],
)
def test_schedulers(named: str, weights: tuple[int, int], lacking: tuple[str, ...], scheduler: str, flags: int) -> None:
    endpoints = tuple(Endpoint(f"10.244.1.{n}", 80, weight=w) for n, w in enumerate(weights))
    server = msgspec.structs.replace(WEB, scheduler=named, cluster=endpoints)
    piece = layout.piece(msgspec.structs.replace(GROUND, lacking=frozenset(lacking)), server)
    assert piece.services[VIP].service == Service(scheduler, 0, flags)
    assert set(piece.services[VIP].destinations.values()) == set(weights)


@pytest.mark.parametrize(
    ("protocol", "removal", "scheduler", "seconds"),
    [
        ("TCP", "keep", "rr", 3600.0),
        ("TCP", "drain:30", "rr", 30.0),
        ("TCP", "reset", "rr", 0.0),
        ("UDP", "keep", "rr", 0.0),
        ("UDP", "drain:30", "rr", 0.0),
        ("SCTP", "keep", "rr", 3600.0),
        ("TCP", "keep", "dh", 0.0),
    ],
)
def test_how_long_an_endpoint_drains(protocol: str, removal: str, scheduler: str, seconds: float) -> None:
    key = msgspec.structs.replace(KEY, protocol=protocol)
    server = msgspec.structs.replace(WEB, key=key, removal=removal, scheduler=scheduler)
    (wanted,) = layout.piece(GROUND, server).services.values()
    assert wanted.drain_seconds == seconds
    assert not wanted.answering


def test_a_reset_waits_for_an_endpoint_that_answers_still() -> None:
    ending = Endpoint("10.244.2.9", 8080)
    for protocol, seconds in (("TCP", 3600.0), ("UDP", 0.0)):
        key = ServerKey("default/web", "", protocol)
        server = msgspec.structs.replace(WEB, key=key, removal="reset", draining=(ending,))
        (wanted,) = layout.piece(GROUND, server).services.values()
        assert wanted.seconds_of(DestinationId("10.244.2.9", 8080)) == seconds
        assert wanted.seconds_of(DestinationId("10.244.2.8", 8080)) == 0.0


def test_foreign_servers_and_taken_addresses_are_left_out() -> None:
    assert layout.piece(msgspec.structs.replace(GROUND, foreign=frozenset({VIP})), WEB) == layout.NOTHING
    port = Frontend(FrontendKind.NODE_PORT, "", 30080, CLUSTER, CLUSTER, CLUSTER)
    taken = frozenset({ServiceId(4, "192.168.0.1", 30080, "TCP")})
    piece = layout.piece(msgspec.structs.replace(GROUND, taken=taken), with_frontend(port))
    assert [str(name) for name in piece.services] == ["TCP 192.168.1.1:30080"]


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)), st.sampled_from([0x4000, 0x10, 0x80000000, 1]))
def test_marks_stay_are_unique_and_leave_the_masquerade_bit_alone(old: set[int], new: set[int], bit: int) -> None:
    settings = msgspec.structs.replace(SETTINGS, masquerade_mark=bit)
    keys = {number: ServerKey(f"default/s{number}", "", "TCP") for number in old | new}
    first = layout.assigned_marks(settings, {}, (keys[n] for n in old))
    second = layout.assigned_marks(settings, first, (keys[n] for n in new))
    assert second.keys() == {keys[n] for n in new} and len(set(second.values())) == len(second)
    assert all(second[keys[n]] == first[keys[n]] for n in old & new)
    assert all(mark & layout.split_bit(settings) and not mark & bit and mark < 1 << 32 for mark in second.values())


A, B = DestinationId("10.0.0.1", 80), DestinationId("10.0.0.2", 80)
RR = Service("rr")


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        (None, Wanted(RR, {A: 1}), [Step(Do.ADD_SERVICE, VIP, RR), Step(Do.ADD, VIP, None, A, 1)]),
        (None, Wanted(RR, {}), []),
        (Live(RR, {A: 1}), Wanted(RR, {A: 1}), []),
        (Live(RR, {A: 1}), Wanted(RR, {A: 2}), [Step(Do.SET, VIP, None, A, 2)]),
        (Live(RR, {A: 1}), Wanted(Service("wlc"), {A: 1}), [Step(Do.SET_SERVICE, VIP, Service("wlc"))]),
        (Live(RR, {A: 1}), None, [Step(Do.DELETE_SERVICE, VIP)]),
        (Live(RR, {A: 1, B: 1}), Wanted(RR, {A: 1}), [Step(Do.DELETE, VIP, None, B)]),
        (Live(RR, {A: 1, B: 1}), Wanted(RR, {A: 1}, 9.0), [Step(Do.SET, VIP, None, B, 0, 9.0)]),
        (Live(RR, {A: 1, B: 0}), Wanted(RR, {A: 1}, 9.0), []),  # it drains already
        (Live(RR, {A: 1, B: 0}), Wanted(RR, {A: 1, B: 1}, 9.0), [Step(Do.SET, VIP, None, B, 1)]),  # taken back
        (Live(RR, {A: 1}), Wanted(RR, {}, 9.0), [Step(Do.SET, VIP, None, A, 0, 9.0)]),  # stays while it drains
        # reset, and it terminates but answers still; then it is gone
        (Live(RR, {A: 1, B: 1}), Wanted(RR, {A: 1}, 0.0, frozenset({B}), 9.0), [Step(Do.SET, VIP, None, B, 0, 9.0)]),
        (Live(RR, {A: 1, B: 0}), Wanted(RR, {A: 1}, 0.0), [Step(Do.DELETE, VIP, None, B)]),
        (Live(RR, {A: 1}), Wanted(RR, {}), [Step(Do.DELETE_SERVICE, VIP)]),
    ],
)
def test_steps(have: Live | None, want: Wanted | None, expected: list[Step]) -> None:
    assert steps({VIP: have} if have else {}, {VIP: want} if want else {}) == expected


def test_drains_end_without_connections_or_at_their_deadline() -> None:
    drains = Drains()
    drains.begin(VIP, A, 100)
    drains.begin(VIP, B, 100)
    drains.begin(VIP, B, 999)  # keeps its deadline
    kernel = {A: Destination(0), B: Destination(0, active=1)}
    assert drains.due(lambda _: kernel, 10) == [(VIP, A)]
    drains.end(VIP, A)
    assert drains.due(lambda _: kernel, 99) == []
    assert drains.due(lambda _: kernel, 100) == [(VIP, B)]
    assert drains.due(lambda _: {}, 100) == [] and drains.of(VIP) == ()


def test_the_sets_difference_adds_before_it_removes_and_replaces_what_an_entry_carries() -> None:
    have = {"SPLIT": frozenset({"10.0.0.1,tcp:80 skbmark 0x8001", "10.0.0.2,tcp:80 skbmark 0x8002"})}
    want = {"SPLIT": frozenset({"10.0.0.1,tcp:80 skbmark 0x8003"})}
    assert sets.differences(Family.V4, have, want) == (
        ["add PYNET-SPLIT 10.0.0.1,tcp:80 skbmark 0x8003 -exist"],
        ["del PYNET-SPLIT 10.0.0.2,tcp:80 -exist"],
    )
    assert sets.marks_of(have["SPLIT"]) == {"10.0.0.1,tcp:80": 0x8001, "10.0.0.2,tcp:80": 0x8002}


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("kind", list(LocalKind))
def test_rules_are_constant_and_every_jump_leads_somewhere(family: Family, kind: LocalKind) -> None:
    detector = LocalDetector(kind, ("10.244.0.0/16",) if kind is LocalKind.CIDR else (), "cni0")
    tables = rules.chains(family, msgspec.structs.replace(SETTINGS, detector=detector))
    named = {layout.set_name(family, suffix) for suffix in layout.SETS}
    for table, chains in tables.items():
        text = rules.render(table, chains)
        words = text.split()
        targets = {words[i + 1] for i, word in enumerate(words) if word in ("-j", "-g")}
        assert {target for target in targets if target.startswith("PYNET-")} <= chains.keys()
        assert {words[i + 1] for i, w in enumerate(words) if w in ("--match-set", "--map-set")} <= named
        assert {ours for t, _, ours in rules.JUMPS if t == table} <= chains.keys()
        assert rules.parsed(text)[0] == chains


def test_names_fit() -> None:
    assert all(len(name) <= 31 for name in layout.all_set_names()) and len(layout.LINK) <= 15
    assert all(len(ours) <= 28 for _, _, ours in rules.JUMPS)
