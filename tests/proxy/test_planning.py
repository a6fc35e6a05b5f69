"""What must be true of traffic: policies, masquerade, ranges, claims; and that a plan knows nothing of its history."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from proxy.cluster import Cluster
from proxy.endpoints import Place
from proxy.plan import (
    Family,
    LocalDetector,
    LocalKind,
    NodeSettings,
    Outcome,
    OutcomeKind,
    Packet,
    Plan,
    ServerKey,
    verdict,
)
from proxy.planning import Planner, Surroundings, build
from pynet.objects import Object, Ref, ref_of
from pynet.sources import Batch
from support.objects import endpoint, piece, service

PODS = LocalDetector(LocalKind.CIDR, ("10.180.0.0/16",))
NODE, POD, OUTSIDE = "192.168.0.2", "10.180.0.1", "203.0.113.130"
LOOPBACK = "127.0.0.1"
CLUSTER_IP, BALANCER, EXTERNAL = "172.30.1.1", "5.6.7.8", "192.168.99.11"
LOCAL, REMOTE = "10.180.0.1", "10.180.1.1"


def settings(detector: LocalDetector = PODS, **more: Any) -> NodeSettings:
    return NodeSettings("n1", detector, **more)


def cluster(**spec: Any) -> list[Object]:
    spec = {"type": "LoadBalancer", "externalIPs": [EXTERNAL], "ingress": [{"ip": BALANCER}], **spec}
    endpoints = spec.pop("endpoints", (endpoint(LOCAL, "n1"), endpoint(REMOTE, "n2")))
    made = service("web", CLUSTER_IP, {"name": "http", "port": 80, "nodePort": 3001}, **spec)
    return [made, piece("web", *endpoints)]


def outcome(plan: Plan, source: str, destination: str, port: int = 80) -> Outcome:
    interface = {POD: "cni0", OUTSIDE: "eth0"}.get(source, "")
    return verdict(plan, Packet(source, destination, "TCP", port, interface), {NODE, "192.168.0.3"})


def told(plan: Plan, source: str, destination: str, port: int = 80) -> str:
    """Return an outcome as text: endpoints by place, `+` for masquerade that is not due to hairpin."""
    found = outcome(plan, source, destination, port)
    if found.kind is not OutcomeKind.FORWARD:
        return found.kind.value
    places = " ".join(sorted({LOCAL: "local", REMOTE: "remote"}[c.endpoint.address] for c in found.choices))
    others = [choice for choice in found.choices if choice.endpoint.address != source]
    return places + ("+" if others and all(choice.masquerade for choice in others) else "")


BOTH, BOTH_MASQ = "local remote", "local remote+"
SETUPS = {
    "base": settings(),
    "no detector": settings(LocalDetector()),
    "masquerade-all": settings(masquerade_all=True),
    "both": settings(LocalDetector(), masquerade_all=True),
}
SOURCES = {"pod": POD, "node": NODE, "outside": OUTSIDE}
TARGETS = {
    "clusterIP": (CLUSTER_IP, 80),
    "nodePort": (NODE, 3001),
    "balancer": (BALANCER, 80),
    "external": (EXTERNAL, 80),
}


def expected(setup: str, source: str, target: str, external: str, internal: str) -> str:
    """Return what the truth table of masquerade and short-circuits says (kube-proxy's InternalExternalMasquerade)."""
    has_detector, is_all = setup in ("base", "masquerade-all"), setup in ("masquerade-all", "both")
    is_pod = source == "pod" and has_detector
    if target == "clusterIP":
        masquerade = is_all or (has_detector and not is_pod)
        return ("local" if internal == "Local" else BOTH) + ("+" if masquerade else "")
    if external == "Cluster":
        return BOTH_MASQ
    if is_pod:
        return BOTH
    return BOTH_MASQ if source == "node" else "local"


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("external", "internal"), [("Cluster", "Cluster"), ("Local", "Cluster"), ("Cluster", "Local")])
@pytest.mark.parametrize("source", SOURCES)
def test_masquerade_and_policies(setup: str, source: str, target: str, external: str, internal: str) -> None:
    # The pod's own endpoint is elsewhere, so that hairpin plays no part.
    endpoints = (endpoint(LOCAL, "n1"), endpoint(REMOTE, "n2"))
    objects = cluster(externalTrafficPolicy=external, internalTrafficPolicy=internal, endpoints=endpoints)
    plan = build(objects, Family.V4, SETUPS[setup])
    address, port = TARGETS[target]
    source_address = "10.180.0.77" if source == "pod" else SOURCES[source]
    packet = Packet(source_address, address, "TCP", port, "" if source == "node" else "eth9")
    found = verdict(plan, packet, {NODE})
    places = " ".join(sorted({LOCAL: "local", REMOTE: "remote"}[c.endpoint.address] for c in found.choices))
    seen = places + ("+" if found.choices and all(c.masquerade for c in found.choices) else "")
    assert seen == expected(setup, source, target, external, internal)


def test_hairpin_is_masqueraded() -> None:
    plan = build(cluster(), Family.V4, settings())
    choices = {choice.endpoint.address: choice.masquerade for choice in outcome(plan, LOCAL, CLUSTER_IP).choices}
    assert choices == {LOCAL: True, REMOTE: False}


ENDING = endpoint(LOCAL, "n1", ready=False, serving=True, terminating=True)


@pytest.mark.parametrize(
    ("endpoints", "external", "internal", "to_cluster_ip", "from_outside"),
    [
        ((), "Cluster", "Cluster", "reject", "reject"),
        ((), "Local", "Local", "reject", "reject"),
        ((endpoint(LOCAL, "n1", ready=False),), "Local", "Local", "reject", "reject"),
        ((endpoint(REMOTE, "n2"),), "Local", "Cluster", "remote+", "drop"),
        ((endpoint(REMOTE, "n2"),), "Cluster", "Local", "drop", "remote+"),
        ((endpoint(REMOTE, "n2"),), "Local", "Local", "drop", "drop"),
        ((ENDING, endpoint(REMOTE, "n2")), "Local", "Cluster", "remote+", "local"),
        ((ENDING,), "Cluster", "Cluster", "local+", "local+"),
    ],
)
def test_reject_and_drop(
    endpoints: tuple[Any, ...], external: str, internal: str, to_cluster_ip: str, from_outside: str
) -> None:
    objects = cluster(externalTrafficPolicy=external, internalTrafficPolicy=internal, endpoints=endpoints)
    plan = build(objects, Family.V4, settings())
    assert told(plan, OUTSIDE, CLUSTER_IP) == to_cluster_ip
    for address, port in ((NODE, 3001), (BALANCER, 80), (EXTERNAL, 80)):
        assert told(plan, OUTSIDE, address, port) == from_outside


def test_internal_local_policy_does_not_touch_other_addresses() -> None:
    plan = build(cluster(internalTrafficPolicy="Local"), Family.V4, settings())
    assert told(plan, POD, CLUSTER_IP) == "local"
    assert told(plan, OUTSIDE, NODE, 3001) == BOTH_MASQ


@pytest.mark.parametrize(
    ("source", "target", "ranges", "node_ips", "expected"),
    [
        ("203.0.113.130", BALANCER, ["203.0.113.0/25"], (), "drop"),
        ("203.0.113.5", BALANCER, ["203.0.113.0/25"], (), BOTH_MASQ),
        ("203.0.113.130", BALANCER, ["203.0.113.0/25", "0.0.0.0/0"], (), BOTH_MASQ),
        ("203.0.113.130", BALANCER, ["fd00::/8"], (), BOTH_MASQ),  # restricts the other family only
        ("203.0.113.130", EXTERNAL, ["203.0.113.0/25"], (), BOTH_MASQ),
        ("203.0.113.130", NODE, ["203.0.113.0/25"], (), BOTH_MASQ),
        (BALANCER, BALANCER, ["203.0.113.0/25"], (), "drop"),
        (BALANCER, BALANCER, ["192.168.0.0/24"], (NODE,), BOTH_MASQ),  # looped back on a node that is allowed
    ],
)
def test_source_ranges(source: str, target: str, ranges: list[str], node_ips: tuple[str, ...], expected: str) -> None:
    plan = build(cluster(loadBalancerSourceRanges=ranges), Family.V4, settings(), node_ips=node_ips)
    found = verdict(plan, Packet(source, target, "TCP", 3001 if target == NODE else 80, "eth0"), {NODE})
    assert (found.kind is OutcomeKind.DROP) == (expected == "drop")


@pytest.mark.parametrize(
    ("more", "address", "served"),
    [
        ({}, NODE, True),
        ({}, "192.168.0.3", True),
        ({}, LOOPBACK, True),
        ({}, OUTSIDE, False),
        ({"localhost_node_ports": False}, LOOPBACK, False),
        ({"node_port_addresses": ("192.168.0.3/32",)}, NODE, False),
        ({"node_port_addresses": ("192.168.0.3/32",)}, "192.168.0.3", True),
        ({"node_port_addresses": ("192.168.0.3/32",)}, LOOPBACK, False),
        ({"node_port_addresses": ("127.0.0.0/8",)}, LOOPBACK, True),
    ],
)
def test_node_port_addresses(more: dict[str, Any], address: str, served: bool) -> None:
    plan = build(cluster(), Family.V4, settings(**more))
    found = outcome(plan, NODE, address, 3001)
    assert (found.kind is OutcomeKind.FORWARD) == served


def test_other_ports_and_protocols_of_a_cluster_ip_are_refused_and_others_pass() -> None:
    plan = build(cluster(), Family.V4, settings())
    assert told(plan, POD, CLUSTER_IP, 81) == "reject"
    assert verdict(plan, Packet(POD, CLUSTER_IP, "UDP", 80)).kind is OutcomeKind.REJECT
    assert told(plan, POD, BALANCER, 81) == "pass"
    assert told(plan, POD, "172.30.9.9") == "pass"


def test_the_older_service_keeps_a_contested_address_and_gives_it_back() -> None:
    state = Cluster("n1")
    planner = Planner(Family.V4, Surroundings(settings(), Place("n1")))
    young = service("young", "10.0.0.1", externalIPs=[EXTERNAL], created="2026-01-02T00:00:00Z")
    old = service("old", "10.0.0.2", externalIPs=[EXTERNAL], created="2026-01-01T00:00:00Z")
    objects = (young, piece("young", LOCAL))
    planner.update(state, state.apply(Batch(upserts=objects)).services)

    def owner() -> str | None:
        found = outcome(planner.plan, OUTSIDE, EXTERNAL)
        return found.key.service if found.key else None

    assert (owner(), planner.contests) == ("default/young", [])
    change = planner.update(state, state.apply(Batch(upserts=(old, piece("old", REMOTE)))).services)
    assert owner() == "default/old"
    assert {key.service for key in change.keys} == {"default/old", "default/young"}
    assert [str(contest) for contest in planner.contests] == [
        f"default/young:http/TCP: {EXTERNAL}:80 belongs to the older default/old:http/TCP"
    ]
    planner.update(state, state.apply(Batch(deletes=(ref_of(old),))).services)
    assert (owner(), planner.contests) == ("default/young", [])


def test_bad_objects_leave_what_was_known() -> None:
    state = Cluster("n1")
    state.apply(Batch(upserts=tuple(cluster())))
    touched = state.apply(Batch(upserts=(service("web", "10.0.0.1", {"port": 0}), service("ok", "10.0.0.9"))))
    assert [bad.field for bad, _ in touched.bad] == ["spec.ports[0].port"]
    assert touched.services == {"default/ok"}
    assert state.services["default/web"].ports[Family.V4][0].cluster_ip == CLUSTER_IP


def test_endpoints_are_read_only_without_a_slice() -> None:
    from pynet.objects import EndpointAddress, EndpointPort, Endpoints, EndpointSubset, Metadata

    subset = EndpointSubset((EndpointAddress(REMOTE),), None, (EndpointPort(8080, "http"),))
    legacy = Endpoints(Metadata(name="web", namespace="default"), (subset,))
    made, slices = cluster(endpoints=(endpoint(LOCAL, "n1"),))
    assert told(build([made, legacy], Family.V4, settings()), OUTSIDE, CLUSTER_IP) == "remote+"
    assert told(build([made, legacy, slices], Family.V4, settings()), OUTSIDE, CLUSTER_IP) == "local+"


def test_a_change_shares_all_else() -> None:
    state = Cluster("n1")
    planner = Planner(Family.V4, Surroundings(settings(), Place("n1")))
    others = [service(f"s{n}", f"10.0.0.{n}") for n in range(1, 4)]
    planner.update(state, state.apply(Batch(upserts=(*cluster(), *others))).services)
    before = planner.plan
    change = planner.update(state, state.apply(Batch(upserts=(piece("web", LOCAL),))).services)
    assert change.keys == (ServerKey("default/web", "http", "TCP"),)
    assert all(before.servers[key] is change.new.servers[key] for key in before.servers if key not in change.keys)
    assert planner.update(state, ["default/web"]).keys == ()


NAMES = ("a", "b", "c")


@st.composite
def objects(draw: st.DrawFn) -> Object:
    name = draw(st.sampled_from(NAMES))
    if draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from([LOCAL, REMOTE, "10.180.2.1"]), unique=True, max_size=3))
        made = [
            endpoint(address, draw(st.sampled_from(["n1", "n2"])), ready=draw(st.booleans()),
                     terminating=draw(st.booleans()))
            for address in chosen
        ]  # fmt: skip
        return piece(name, *made, name=f"{name}-{draw(st.integers(1, 2))}")
    return service(
        name,
        draw(st.sampled_from(["10.0.0.1", "10.0.0.2", "None"])),
        {"name": "http", "port": draw(st.sampled_from([80, 81])), "nodePort": draw(st.sampled_from([0, 30080]))},
        created=draw(st.sampled_from([None, "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])),
        externalIPs=draw(st.sampled_from([[], [EXTERNAL], ["10.0.0.2"]])),
        externalTrafficPolicy=draw(st.sampled_from(["Cluster", "Local"])),
        internalTrafficPolicy=draw(st.sampled_from(["Cluster", "Local"])),
    )


@hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.lists(objects() | st.sampled_from([Ref("Service", "default", name) for name in NAMES])
                 | st.sampled_from([Ref("EndpointSlice", "default", f"{name}-1") for name in NAMES]), max_size=3),
        max_size=8,
    )
)  # fmt: skip
def test_a_plan_does_not_depend_on_its_history(history: list[list[Any]]) -> None:
    state = Cluster("n1")
    around = Surroundings(settings(), Place("n1"))
    planner = Planner(Family.V4, around)
    for step in history:
        batch = Batch(
            upserts=tuple(each for each in step if not isinstance(each, Ref)),
            deletes=tuple(each for each in step if isinstance(each, Ref)),
        )
        before = planner.plan
        change = planner.update(state, state.apply(batch).services)
        differing = {
            key
            for key in before.servers.keys() | change.new.servers.keys()
            if before.servers.get(key) != change.new.servers.get(key)
        }
        assert set(change.keys) == differing
    fresh = Planner(Family.V4, around)
    fresh.update(state, state.services)
    assert planner.plan.servers == fresh.plan.servers
    assert planner.contests == fresh.contests
    restored = Cluster("n1")
    assert restored.restore(state.snapshot())
    again = Planner(Family.V4, around)
    again.update(restored, restored.services)
    assert again.plan.servers == planner.plan.servers
