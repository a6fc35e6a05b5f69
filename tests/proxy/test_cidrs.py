"""ServiceCIDRs: which networks they name, which packets that concerns, and what is kept of a bad one."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.cidrs import networks_of
from proxy.cluster import Cluster
from proxy.config import Settings, surroundings
from proxy.plan import Family, OutcomeKind, Packet, Plan, verdict
from proxy.planning import Planner
from pynet.objects import BadObject, Ref, ServiceCIDR, decode
from pynet.sources import Batch
from support.objects import endpoint, piece, service

NODE = "192.168.0.2"
DROP, PASS, REJECT, FORWARD = OutcomeKind.DROP, OutcomeKind.PASS, OutcomeKind.REJECT, OutcomeKind.FORWARD


def cidr(*networks: str, name: str = "kubernetes", **metadata: Any) -> ServiceCIDR:
    document = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name, **metadata},
        "spec": {"cidrs": list(networks)},
        "status": {"conditions": [{"type": "Ready", "status": "False"}]},
    }
    made = decode(document, "test")
    assert isinstance(made, ServiceCIDR)
    return made


def of_node(cluster: Cluster, family: Family = Family.V4) -> tuple[str, ...]:
    return surroundings(Settings(node_name="n1"), family, cluster.node, cluster.service_cidrs).settings.service_cidrs


def test_all_of_them_count_in_each_family_without_overlaps() -> None:
    cluster = Cluster("n1")
    leaving = cidr("10.100.0.0/25", "10.100.0.128/25", name="leaving", deletionTimestamp="2026-01-01T00:00:00Z")
    assert cluster.apply(Batch(upserts=(cidr("10.96.0.0/12", "fd00:96::5/112"), leaving))).around
    assert of_node(cluster) == ("10.96.0.0/12",)
    assert of_node(cluster, Family.V6) == ("fd00:96::/112",)
    assert cluster.apply(Batch(deletes=(Ref("ServiceCIDR", "", "kubernetes"),))).around
    assert of_node(cluster) == ("10.100.0.0/24",)
    assert not cluster.apply(Batch(upserts=(leaving,), replaced=frozenset({"ServiceCIDR"}))).around
    restored = Cluster("n1")
    assert restored.restore(cluster.snapshot())
    assert of_node(restored) == ("10.100.0.0/24",)
    assert cluster.apply(Batch(replaced=frozenset({"ServiceCIDR"}))).around
    assert of_node(cluster) == ()


@pytest.mark.parametrize(
    ("networks", "field"),
    [
        (["10.96.0.0/16", "10.97.0.0"], "spec.cidrs[1]"),
        (["10.96.0.0/33"], "spec.cidrs[0]"),
        (["everything"], "spec.cidrs[0]"),
        (["0.0.0.0/0"], "spec.cidrs[0]"),
        (["::/0"], "spec.cidrs[0]"),
        (["127.0.0.0/8"], "spec.cidrs[0]"),
        (["224.0.0.0/8"], "spec.cidrs[0]"),
        ([f"10.{n % 250}.{n // 250}.0/24" for n in range(1001)], "spec.cidrs"),
    ],
)
def test_a_bad_one_names_its_field_and_leaves_the_last_good_one(networks: list[str], field: str) -> None:
    with pytest.raises(BadObject) as error:
        networks_of(cidr(*networks))
    assert error.value.field == field
    cluster = Cluster("n1")
    cluster.apply(Batch(upserts=(cidr("10.96.0.0/16"),)))
    touched = cluster.apply(Batch(upserts=(cidr(*networks),)))
    assert not touched.around
    assert [bad.field for bad, _ in touched.bad] == [field]
    assert of_node(cluster) == ("10.96.0.0/16",)


@pytest.mark.parametrize(
    ("destination", "port", "expected"),
    [
        ("10.96.0.10", 80, FORWARD),
        ("10.96.0.10", 81, REJECT),
        ("10.96.0.11", 80, DROP),
        ("10.96.0.12", 80, FORWARD),  # an external IP in there
        ("10.96.0.12", 81, DROP),
        ("10.96.1.1", 80, PASS),  # the node's own address, by mistake in there
        ("10.96.1.1", 30080, FORWARD),
        ("10.95.255.255", 80, PASS),
    ],
)
def test_what_nobody_has_is_dropped(destination: str, port: int, expected: OutcomeKind) -> None:
    cluster = Cluster("n1")
    web = service("web", "10.96.0.10", {"name": "http", "port": 80, "nodePort": 30080}, externalIPs=["10.96.0.12"])
    cluster.apply(Batch(upserts=(web, piece("web", endpoint("10.96.2.2")), cidr("10.96.0.0/16"))))
    planner = Planner(Family.V4, surroundings(Settings(node_name="n1"), Family.V4, None, cluster.service_cidrs))
    plan: Plan = planner.update(cluster, cluster.services).new
    for source in ("10.244.1.5", NODE):
        packet = Packet(source, destination, "TCP", port, "" if source == NODE else "cni0")
        assert verdict(plan, packet, {NODE, "10.96.1.1"}).kind is expected
