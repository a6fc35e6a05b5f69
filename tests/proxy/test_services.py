"""What a Service asks for, field by field; and what is refused, with the field named."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.plan import Family
from proxy.services import canonical_address, canonical_network, facts_of
from pynet.objects import BadObject
from support.objects import service


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", (Family.V4, "10.0.0.1")),
        ("010.000.0.01", (Family.V4, "10.0.0.1")),  # as the API reads it: decimal
        ("FD00::0001", (Family.V6, "fd00::1")),
        ("::ffff:10.0.0.1", (Family.V4, "10.0.0.1")),
        ("10.0.0.256", None),
        ("10.0.0", None),
        ("10.0.0.1 ", None),
        ("10.0.0.1\n-j ACCEPT", None),
        ("fe80::1%eth0", None),
        ("", None),
    ],
)
def test_addresses_are_spelled_one_way(text: str, expected: object) -> None:
    assert canonical_address(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 192.168.1.5/24 ", (Family.V4, "192.168.1.0/24")),
        ("0.0.0.0/0", (Family.V4, "0.0.0.0/0")),
        ("fd00::1/64", (Family.V6, "fd00::/64")),
        ("10.0.0.0", None),
        ("10.0.0.0/33", None),
        ("10.0.0.0/-1", None),
    ],
)
def test_networks_are_spelled_one_way(text: str, expected: object) -> None:
    assert canonical_network(text) == expected


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(service(ip="None"), id="headless"),
        pytest.param(service(ip=""), id="no address yet"),
        pytest.param(service(type="ExternalName", externalName="example.org"), id="ExternalName with an address"),
        pytest.param(service(labels={"service.kubernetes.io/service-proxy-name": "mine"}), id="another proxy's"),
    ],
)
def test_left_alone(made: Any) -> None:
    assert facts_of(made) is None


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"ip": "10.0.0.300"}, "spec.clusterIP"),
        ({"clusterIPs": ["10.96.0.10", "x"]}, "spec.clusterIPs[1]"),
        ({"externalIPs": ["1.2.3"]}, "spec.externalIPs[0]"),
        ({"ingress": [{"ip": "nope"}]}, "status.loadBalancer.ingress[0]"),
        ({"loadBalancerSourceRanges": ["10.0.0.0/8", "10.0.0.0"]}, "spec.loadBalancerSourceRanges[1]"),
        ({"clusterIP": "127.0.0.1", "clusterIPs": ["127.0.0.1"]}, "spec.clusterIPs[0]"),
        ({"externalIPs": ["203.0.113.1", "224.0.0.1"]}, "spec.externalIPs[1]"),
        ({"externalIPs": ["::"]}, "spec.externalIPs[0]"),
        ({"sessionAffinity": "Cookie"}, "spec.sessionAffinity"),
        (
            {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}},
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
        ({"externalTrafficPolicy": "local"}, "spec.externalTrafficPolicy"),
        ({"internalTrafficPolicy": "X"}, "spec.internalTrafficPolicy"),
        ({"annotations": {"pynet/scheduler": "rr -j ACCEPT"}}, "metadata.annotations[pynet/scheduler]"),
        ({"annotations": {"pynet/scheduler": "fastest"}}, "metadata.annotations[pynet/scheduler]"),
        ({"annotations": {"pynet/removal": "drain"}}, "metadata.annotations[pynet/removal]"),
        ({"annotations": {"pynet/weights": "10.0.0.1=0"}}, "metadata.annotations[pynet/weights]"),
        ({"externalIPs": ["10.0.0.1"] * 1001}, "spec.externalIPs"),
    ],
)
def test_bad_fields_are_named(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(BadObject) as caught:
        facts_of(service(**spec))
    assert caught.value.field == field
    assert "default/web" in caught.value.where


@pytest.mark.parametrize(
    ("port", "field"),
    [
        ({"port": 0}, "spec.ports[0].port"),
        ({"port": 65536}, "spec.ports[0].port"),
        ({"port": 80, "nodePort": -1}, "spec.ports[0].nodePort"),
        ({"port": 80, "protocol": "ICMP"}, "spec.ports[0].protocol"),
        ({"port": 80, "protocol": "tcp"}, "spec.ports[0].protocol"),
    ],
)
def test_bad_ports_are_named(port: dict[str, Any], field: str) -> None:
    with pytest.raises(BadObject) as caught:
        facts_of(service("web", "10.96.0.10", port))
    assert caught.value.field == field


def test_two_ports_of_one_name_and_protocol_are_refused() -> None:
    with pytest.raises(BadObject, match="earlier port"):
        facts_of(service("web", "10.96.0.10", {"name": "a", "port": 80}, {"name": "a", "port": 81}))


def test_dual_stack_has_ports_in_both_families() -> None:
    facts = facts_of(service(clusterIPs=["10.96.0.10", "fd00:96::10"], externalIPs=["192.0.2.1", "2001:db8::1"]))
    assert facts is not None
    assert {family: (ports[0].cluster_ip, ports[0].external_ips) for family, ports in facts.ports.items()} == {
        Family.V4: ("10.96.0.10", ("192.0.2.1",)),
        Family.V6: ("fd00:96::10", ("2001:db8::1",)),
    }


@pytest.mark.parametrize(
    ("ingress", "expected"),
    [
        ([{"ip": "192.0.2.1"}], ("192.0.2.1",)),
        ([{"ip": "192.0.2.1", "ipMode": "VIP"}], ("192.0.2.1",)),
        ([{"ip": "192.0.2.1", "ipMode": "Proxy"}], ()),
        ([{"hostname": "lb.example"}], ()),
    ],
)
def test_load_balancer_addresses(ingress: list[dict[str, str]], expected: tuple[str, ...]) -> None:
    facts = facts_of(service(ingress=ingress))
    assert facts is not None
    assert facts.ports[Family.V4][0].load_balancer_ips == expected


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        (["10.0.0.0/8"], {Family.V4: ("10.0.0.0/8",)}),
        ([" 10.0.0.0/8 ", "fd00::/8"], {Family.V4: ("10.0.0.0/8",), Family.V6: ("fd00::/8",)}),
        (["10.0.0.0/8", "0.0.0.0/0"], {}),
        ([], {}),
    ],
)
def test_source_ranges(ranges: list[str], expected: object) -> None:
    facts = facts_of(service(loadBalancerSourceRanges=ranges))
    assert facts is not None
    assert facts.source_ranges == expected


def test_health_check_port_needs_load_balancer_and_local_policy() -> None:
    asked = {"healthCheckNodePort": 32000}
    with_both = facts_of(service(type="LoadBalancer", externalTrafficPolicy="Local", **asked))
    without = facts_of(service(type="LoadBalancer", **asked))
    assert with_both is not None
    assert without is not None
    assert (with_both.health_check_node_port, without.health_check_node_port) == (32000, 0)


def test_affinity_lasts_three_hours_by_default() -> None:
    facts = facts_of(service(sessionAffinity="ClientIP"))
    assert facts is not None
    assert facts.affinity_seconds == 10800
