"""Which endpoints are chosen: kube-proxy's CategorizeEndpoints, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.endpoints import Place, facts_of_endpoints, facts_of_slice, found_for, ready_local_count, select, serving
from pynet.objects import BadObject, EndpointAddress, EndpointPort, Endpoints, EndpointSubset, Metadata, SliceEndpoint
from support.objects import endpoint, piece

HERE = Place("n1", "zone-a")
A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def chosen(*endpoints: SliceEndpoint, cluster: bool = True, local: bool = True) -> tuple[str, str, bool]:
    """Return the last digits of the cluster list and of the local list, and whether anything usable exists."""
    facts = facts_of_slice(piece("web", *endpoints))
    assert facts is not None
    found = select(found_for([facts], "http", "TCP"), HERE, uses_cluster=cluster, uses_local=local)
    digits = ["".join(e.address[-1] for e in part) for part in (found.cluster, found.local)]
    return digits[0], digits[1], found.exists


def ending(address: str, node: str | None = None, serving: bool = True) -> SliceEndpoint:
    return endpoint(address, node, ready=False, serving=serving, terminating=True)


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        pytest.param([], ("", "", False), id="none"),
        pytest.param([endpoint(A, "n1"), endpoint(B, "n2")], ("12", "1", True), id="ready here and there"),
        pytest.param([endpoint(A, "n2"), endpoint(B)], ("12", "", True), id="none local"),
        pytest.param([endpoint(A, "n1", ready=False), endpoint(B, "n2")], ("2", "", True), id="unready is not used"),
        pytest.param([endpoint(A, "n1", ready=False)], ("", "", False), id="unready alone is nothing"),
        pytest.param([ending(A, "n1"), endpoint(B, "n2")], ("2", "1", True), id="local terminating, remote ready"),
        pytest.param([endpoint(A, "n1"), ending(B, "n2")], ("1", "1", True), id="remote terminating, local ready"),
        pytest.param([ending(A, "n1"), ending(B, "n2")], ("12", "1", True), id="only terminating"),
        pytest.param([ending(A, "n2")], ("1", "", True), id="only remote terminating"),
        pytest.param([ending(A, "n1", serving=False)], ("", "", False), id="terminating, not serving"),
        pytest.param([ending(A, "n1"), endpoint(B, "n1")], ("2", "2", True), id="ready beats terminating"),
        pytest.param(
            [endpoint(A, "n1", ready=True, serving=True, terminating=True)], ("1", "1", True),
            id="publishNotReadyAddresses: ready while terminating",
        ),
    ],
)  # fmt: skip
def test_readiness_and_termination(endpoints: list[SliceEndpoint], expected: tuple[str, str, bool]) -> None:
    assert chosen(*endpoints) == expected


def zones(address: str, *names: str, node: str | None = "n2", **more: Any) -> SliceEndpoint:
    return endpoint(address, node, zones=names, **more)


def nodes(address: str, *names: str, node: str | None = "n2", **more: Any) -> SliceEndpoint:
    return endpoint(address, node, nodes=names, zones=("zone-a",), **more)


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        pytest.param([zones(A, "zone-a"), zones(B, "zone-b")], "1", id="same zone"),
        pytest.param([zones(A, "zone-b"), zones(B, "zone-b")], "12", id="no hint names our zone"),
        pytest.param([zones(A, "zone-a"), endpoint(B)], "12", id="one without hints"),
        pytest.param([zones(A, "zone-a"), endpoint(B, ready=False)], "1", id="an unready one needs no hint"),
        pytest.param([zones(A, "zone-a", ready=False), zones(B, "zone-b")], "2", id="only an unready one is near"),
        pytest.param([zones(A, "zone-a", "zone-b"), zones(B, "zone-b")], "1", id="several zones"),
        pytest.param([nodes(A, "n1"), nodes(B, "n2")], "1", id="same node before same zone"),
        pytest.param([nodes(A, "n3"), nodes(B, "n2")], "12", id="no hint names our node: the zone's"),
        pytest.param([nodes(A, "n1"), zones(B, "zone-a")], "12", id="one without a node hint: the zone's"),
        pytest.param([zones(A, "zone-a", ready=False, terminating=True), ], "1", id="terminating: topology ignored"),
    ],
)  # fmt: skip
def test_topology(endpoints: list[SliceEndpoint], expected: str) -> None:
    assert chosen(*endpoints, local=False)[0] == expected


def test_hints_do_not_narrow_the_local_list() -> None:
    assert chosen(zones(A, "zone-b", node="n1"), zones(B, "zone-a")) == ("2", "1", True)


def test_local_only_lists_nothing_for_the_cluster() -> None:
    assert chosen(endpoint(A, "n1"), endpoint(B, "n2"), cluster=False) == ("", "1", True)
    assert chosen(endpoint(B, "n2"), cluster=False) == ("", "", True)


def test_slices_join_and_the_one_that_is_not_terminating_counts() -> None:
    first = facts_of_slice(piece("web", ending(A, "n1"), endpoint(B)))
    second = facts_of_slice(piece("web", endpoint(A, "n1"), endpoint(C), name="web-2"))
    assert first is not None
    assert second is not None
    for slices in ([first, second], [second, first]):
        found = found_for(slices, "http", "TCP")
        assert sorted(found) == [(A, 8080), (B, 8080), (C, 8080)]
        assert not found[A, 8080].terminating


def test_ports_are_joined_by_name_and_protocol() -> None:
    facts = facts_of_slice(piece("web", A, ports=(("http", "TCP", 8080), ("http", "UDP", 8081), ("x", "TCP", 1))))
    assert facts is not None
    assert [*found_for([facts], "http", "UDP")] == [(A, 8081)]
    assert [*found_for([facts], "", "TCP")] == []


def test_named_target_ports_may_differ_between_slices() -> None:
    slices = [facts_of_slice(piece("web", address, ports=(("http", "TCP", number),)))
              for address, number in ((A, 8080), (B, 9090))]  # fmt: skip
    assert sorted(found_for([s for s in slices if s], "http", "TCP")) == [(A, 8080), (B, 9090)]


def test_what_still_serves_and_what_a_health_check_counts() -> None:
    facts = facts_of_slice(piece("web", endpoint(A, "n1"), ending(B, "n1"), ending(C, "n1", serving=False)))
    assert facts is not None
    found = found_for([facts], "http", "TCP")
    assert serving(found) == {(A, 8080), (B, 8080)}
    assert ready_local_count([found, found], "n1") == 1


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (piece("web", "x"), "endpoints[0].addresses[0]"),
        (piece("web", "fd00::1"), "endpoints[0].addresses[0]"),
        (piece("web", A, kind="IPv5"), "addressType"),
        (piece("web", A, ports=(("http", "TCP", 70000),)), "ports[0].port"),
        (piece("web", A, ports=(("http", "ICMP", 80),)), "ports[0].protocol"),
    ],
)
def test_bad_slices_are_named(made: Any, field: str) -> None:
    with pytest.raises(BadObject) as caught:
        facts_of_slice(made)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("address", "is_bad"),
    [
        *[(bad, True) for bad in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.1.1", "224.0.0.1", "239.1.1.1")],
        *[
            (bad, True)
            for bad in ("::1", "::", "0:0::1", "fe80::1", "febf::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1")
        ],
        *[(good, False) for good in ("10.0.0.1", "192.0.2.1", "169.253.1.1", "223.0.0.1", "240.0.0.1", "12.7.0.1")],
        *[(good, False) for good in ("fd00::1", "2001:db8::1", "fec0::1", "::2", "::1:1", "fe00::1")],
    ],
)
def test_addresses_that_the_api_refuses_are_refused(address: str, is_bad: bool) -> None:
    kind = "IPv6" if ":" in address and "." not in address else "IPv4"
    subset = EndpointSubset((EndpointAddress(address),), None, (EndpointPort(8080, "http"),))
    v1 = Endpoints(Metadata(name="web", namespace="default"), (subset,))
    if not is_bad:
        assert facts_of_slice(piece("web", address, kind=kind))
        assert facts_of_endpoints(v1)
        return
    with pytest.raises(BadObject, match=r"EndpointSlice default/web-1: endpoints\[0\]\.addresses\[0\]: .*loopback"):
        facts_of_slice(piece("web", address, kind=kind))
    with pytest.raises(BadObject, match=r"Endpoints default/web: subsets\[0\]\.addresses: .*loopback"):
        facts_of_endpoints(v1)


def test_names_and_domains_are_left_alone() -> None:
    assert facts_of_slice(piece("web", "example.org", kind="FQDN")) is None
    facts = facts_of_slice(piece("web", A, ports=(("http", "TCP", 0),)))
    assert facts is not None
    assert facts.ports == ()


def test_v1_endpoints_are_read_as_slices() -> None:
    subset = EndpointSubset((EndpointAddress(A, "n1"),), (EndpointAddress(B),), (EndpointPort(8080, "http"),))
    found = found_for(
        facts_of_endpoints(Endpoints(Metadata(name="web", namespace="default"), (subset,))), "http", "TCP"
    )
    assert {key: candidate.ready for key, candidate in found.items()} == {(A, 8080): True, (B, 8080): False}
