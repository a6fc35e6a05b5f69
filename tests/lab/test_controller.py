"""What the cluster's own controllers would make of Services and pods."""

from __future__ import annotations

import pytest

from netnslab import controller
from netnslab.state import Attachment, PodPort, PodRecord

RANGES = {
    "services": {"IPv4": "10.96.0.0/16", "IPv6": "fd00:96::/112"},
    "load-balancers": {"IPv4": "172.31.100.0/24", "IPv6": "fd00:100::/112"},
}
NOW = "2026-11-21T12:00:00.000000Z"
ZONES = {"node1": "zone-a", "node2": "zone-b"}


def service(name="web", **spec):
    ports = spec.pop("ports", [{"port": 80}])
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {**spec, "ports": ports}}


def pod(name, node="node1", address="10.244.1.2", labels=None, ports=(), **changes):
    ips = [{"address": f"{each}/24"} for each in ([address] if isinstance(address, str) else address)]
    return PodRecord(
        name, "default", node, f"lab-{name}", "0", labels or {"app": "web"}, tuple(ports),
        attachment=Attachment((), {"ips": ips}), **changes,
    )  # fmt: skip


def stored(given, existing=None, others=(), families=("IPv4",)):
    return controller.service_defaults(given, existing, list(others), RANGES, families)


def test_a_service_gets_an_address_of_the_range_and_the_api_s_defaults():
    spec = stored(service())["spec"]
    assert spec["type"] == "ClusterIP"
    assert spec["clusterIP"].startswith("10.96.")
    assert spec["clusterIPs"] == [spec["clusterIP"]]
    assert spec["ipFamilies"] == ["IPv4"]
    assert spec["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    assert "nodePort" not in spec["ports"][0]


def test_allocations_stay_when_a_service_is_applied_again():
    first = stored(service(type="NodePort"))
    again = stored(service(type="NodePort", sessionAffinity="ClientIP"), existing=first)
    assert again["spec"]["clusterIP"] == first["spec"]["clusterIP"]
    assert again["spec"]["ports"][0]["nodePort"] == first["spec"]["ports"][0]["nodePort"]
    assert again["spec"]["sessionAffinity"] == "ClientIP"


def test_a_node_port_goes_when_the_type_no_longer_has_one():
    first = stored(service(type="NodePort"))
    assert "nodePort" not in stored(service(), existing=first)["spec"]["ports"][0]


def test_no_two_services_share_an_address_or_a_node_port():
    made: list[dict] = []
    for number in range(200):
        made.append(stored(service(f"s{number}", type="NodePort"), others=made))
    assert len({each["spec"]["clusterIP"] for each in made}) == 200
    assert len({each["spec"]["ports"][0]["nodePort"] for each in made}) == 200


@pytest.mark.parametrize(
    ("given", "others", "says"),
    [
        (
            service(clusterIP="10.96.0.9"),
            [stored(service("a", clusterIP="10.96.0.9"))],
            "10.96.0.9: provided IP is already allocated",
        ),
        (
            service(type="NodePort", ports=[{"port": 1, "nodePort": 30000}]),
            [stored(service("a", type="NodePort", ports=[{"port": 2, "nodePort": 30000}]))],
            r"spec.ports\[0\].nodePort: Invalid value: 30000: provided port is already",
        ),
        (service(ipFamilies=["IPv6"]), [], r'spec.ipFamilies\[0\]: Invalid value: "IPv6"'),
        (service(type="Server"), [], 'spec.type: Unsupported value: "Server"'),
        (service("Bad_Name"), [], "metadata.name: Invalid value"),
        (service(ports=[{"port": 99999}]), [], r"spec.ports\[0\].port: Invalid value: 99999"),
        (service(ports=[{"port": "http"}]), [], r"spec.ports\[0\].port"),
    ],
)
def test_what_the_api_would_refuse_is_refused_by_field(given, others, says):
    with pytest.raises(controller.BadManifest, match=says):
        stored(given, others=others)


def test_the_same_node_port_may_serve_two_protocols():
    ports = [
        {"name": "tcp", "port": 53, "nodePort": 30053},
        {"name": "udp", "port": 53, "protocol": "UDP", "nodePort": 30053},
    ]
    assert len(stored(service(type="NodePort", ports=ports))["spec"]["ports"]) == 2


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        ({}, ["IPv4"]),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"]),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, ["IPv6", "IPv4"]),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"]),
        ({"clusterIP": "fd00:96::7"}, ["IPv6"]),
    ],
)
def test_families_follow_the_policy(spec, families):
    got = stored(service(**spec), families=("IPv4", "IPv6"))["spec"]
    assert got["ipFamilies"] == families
    assert [controller.family_of(address) for address in got["clusterIPs"]] == families


def test_a_load_balancer_gets_an_address_and_with_policy_local_a_health_port():
    got = stored(service(type="LoadBalancer", externalTrafficPolicy="Local"))
    assert got["status"]["loadBalancer"]["ingress"][0]["ip"].startswith("172.31.100.")
    assert got["spec"]["healthCheckNodePort"]
    assert got["spec"]["ports"][0]["nodePort"]
    assert stored(service(type="LoadBalancer"), existing=got)["status"] == got["status"]


def slices(given, pods, families=("IPv4",)):
    return controller.slices_of(stored(given, families=families), pods, ZONES, NOW)


def test_an_endpoint_says_where_it_is_and_how_it_is():
    (made,) = slices(service(selector={"app": "web"}), [pod("a"), pod("b", "node2", "10.244.2.2", ready=False)])
    assert made["addressType"] == "IPv4"
    assert made["metadata"]["labels"][controller.SERVICE_NAME] == "web"
    assert made["metadata"]["annotations"] == {controller.TRIGGER_TIME: NOW}
    assert made["ports"] == [{"name": "", "protocol": "TCP", "port": 80}]
    assert [(each["addresses"], each["nodeName"], each["zone"]) for each in made["endpoints"]] == [
        (["10.244.1.2"], "node1", "zone-a"),
        (["10.244.2.2"], "node2", "zone-b"),
    ]
    assert [each["conditions"]["ready"] for each in made["endpoints"]] == [True, False]


@pytest.mark.parametrize(
    ("changes", "spec", "conditions"),
    [
        ({}, {}, {"ready": True, "serving": True, "terminating": False}),
        ({"ready": False}, {}, {"ready": False, "serving": False, "terminating": False}),
        ({"terminating": True}, {}, {"ready": False, "serving": True, "terminating": True}),
        ({"ready": False, "terminating": True}, {}, {"ready": False, "serving": False, "terminating": True}),
        (
            {"ready": False},
            {"publishNotReadyAddresses": True},
            {"ready": True, "serving": True, "terminating": False},
        ),
    ],
)
def test_conditions(changes, spec, conditions):
    (made,) = slices(service(selector={"app": "web"}, **spec), [pod("a", **changes)])
    assert made["endpoints"][0]["conditions"] == conditions


def test_only_pods_with_all_labels_of_the_selector_in_the_namespace_and_wired_are_endpoints():
    chosen = service(selector={"app": "web", "tier": "front"})
    pods = [
        pod("both", labels={"app": "web", "tier": "front", "more": "x"}),
        pod("one", labels={"app": "web"}),
        PodRecord("x", "other", "node1", "n", "0", {"app": "web", "tier": "front"}, ()),
        PodRecord("y", "default", "node1", "n", "0", {"app": "web", "tier": "front"}, ()),
    ]
    (made,) = slices(chosen, pods)
    assert [each["targetRef"]["name"] for each in made["endpoints"]] == ["both"]


def test_named_target_ports_are_resolved_per_pod_so_pods_that_differ_are_in_different_slices():
    given = service(selector={"app": "web"}, ports=[{"name": "http", "port": 80, "targetPort": "web"}])
    old = pod("old", ports=[PodPort("tcp", 8080, "web")])
    new = pod("new", address="10.244.1.3", ports=[PodPort("tcp", 9090, "web"), PodPort("udp", 1, "web")])
    without = pod("none", address="10.244.1.4")
    made = slices(given, [old, new, without])
    got = {each["endpoints"][0]["targetRef"]["name"]: [port["port"] for port in each["ports"]] for each in made}
    assert got == {"old": [8080], "new": [9090], "none": []}
    assert len({each["metadata"]["name"] for each in made}) == 3


def test_a_slice_has_at_most_100_endpoints_and_there_is_one_set_per_family():
    given = service(selector={"app": "web"}, ipFamilyPolicy="PreferDualStack")
    pods = [pod(f"p{n}", address=(f"10.244.1.{n}", f"fd00::{n}")) for n in range(1, 151)]
    made = slices(given, pods, ("IPv4", "IPv6"))
    sizes = sorted((each["addressType"], len(each["endpoints"])) for each in made)
    assert sizes == [("IPv4", 50), ("IPv4", 100), ("IPv6", 50), ("IPv6", 100)]


def test_a_service_without_pods_has_an_empty_slice_and_one_without_selector_none():
    (made,) = slices(service(selector={"app": "nobody"}), [pod("a")])
    assert made["endpoints"] == []
    assert slices(service(), [pod("a")]) == []


def test_a_headless_service_s_slices_say_so():
    (made,) = slices(service(selector={"app": "web"}, clusterIP="None"), [pod("a")])
    assert controller.HEADLESS in made["metadata"]["labels"]


@pytest.mark.parametrize(
    ("distribution", "hints"),
    [
        ("PreferClose", {"forZones": [{"name": "zone-a"}]}),
        ("PreferSameZone", {"forZones": [{"name": "zone-a"}]}),
        ("PreferSameNode", {"forNodes": [{"name": "node1"}], "forZones": [{"name": "zone-a"}]}),
    ],
)
def test_hints_follow_the_traffic_distribution(distribution, hints):
    (made,) = slices(service(selector={"app": "web"}, trafficDistribution=distribution), [pod("a")])
    assert made["endpoints"][0]["hints"] == hints


def test_a_slice_that_differs_only_in_time_is_the_same():
    given = stored(service(selector={"app": "web"}))
    (early,) = controller.slices_of(given, [pod("a")], ZONES, NOW)
    (late,) = controller.slices_of(given, [pod("a")], ZONES, "2027-01-01T00:00:00Z")
    (other,) = controller.slices_of(given, [pod("b")], ZONES, NOW)
    assert controller.same_but_for_time(early, late)
    assert not controller.same_but_for_time(early, other)
    assert not controller.same_but_for_time(None, late)
