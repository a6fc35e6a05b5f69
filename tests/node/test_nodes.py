"""What Nodes say of themselves: which of it counts, and what is told of the rest."""

from __future__ import annotations

import msgspec
import pytest

from pynet.netstate import LinkAddress
from pynet.objects import Node
from support.wanted import ADDRESSES, HERE, decided, node, only


def test_an_ipv4_mapped_address_is_read_as_ipv4() -> None:
    assert only(decided(node("peer", "10.244.2.0/24", ip="::ffff:192.168.1.2"))).via == "192.168.1.2"


def test_one_pod_cidr_named_twice_is_one() -> None:
    want = decided(node("peer", "10.244.2.0/24", "10.244.2.0/24", ip="192.168.1.2"))
    assert [route.dst for route in want.routes] == ["10.244.2.0/24"]
    assert want.problems == ()


def test_an_address_that_only_moves_through_a_peer_is_not_what_reaches_it() -> None:
    """A virtual address that this machine took over while the peer's Node still lists it."""
    state = msgspec.structs.replace(HERE, addresses=(*ADDRESSES, LinkAddress("eth0", "192.168.1.200", 32)))
    peer = node("peer", "10.244.2.0/24", ip=("192.168.1.2", "192.168.1.200"))
    assert only(decided(peer, state=state)).how == "direct"


PROBLEM_ROWS = [
    # the peers' pod CIDRs and addresses → who gets a route, and words of the problem
    (
        "a CIDR of two nodes counts for the one made last",
        [
            node("old", "10.244.2.0/24", ip="192.168.1.2", created="2026-01-01T00:00:00Z"),
            node("new", "10.244.2.0/24", ip="192.168.1.3", created="2026-02-01T00:00:00Z"),
        ],
        {"10.244.2.0/24": "192.168.1.3"},
        "Node old: spec.podCIDRs: 10.244.2.0/24 overlaps with 10.244.2.0/24 of Node new",
    ),
    (
        "without times, for the first by name",
        [node("b", "10.244.2.0/24", ip="192.168.1.2"), node("a", "10.244.2.0/23", ip="192.168.1.3")],
        {"10.244.2.0/23": "192.168.1.3"},
        "Node b: spec.podCIDRs: 10.244.2.0/24 overlaps with 10.244.2.0/23 of Node a",
    ),
    (
        "our own CIDR is nobody else's",
        [node("peer", "10.244.0.0/16", ip="192.168.1.2", created="2026-02-01T00:00:00Z")],
        {},
        "Node peer: spec.podCIDRs: 10.244.0.0/16 overlaps with 10.244.1.0/24 of Node own",
    ),
    (
        "a CIDR that holds a node's address would cut it off",
        [node("peer", "192.168.0.0/16", ip="192.168.1.2")],
        {},
        "Node peer: spec.podCIDRs: 192.168.0.0/16 holds a node's address",
    ),
    (
        "everything is no pod CIDR",
        [node("peer", "0.0.0.0/0", ip="192.168.1.2")],
        {},
        "Node peer: spec.podCIDRs: 0.0.0.0/0 holds addresses of 0.0.0.0/8, which no pod can have",
    ),
    (
        "nor is everything of the family that no node has an address of",
        [node("peer", "::/0", "10.244.2.0/24", ip="192.168.1.2")],
        {"10.244.2.0/24": "192.168.1.2"},
        "Node peer: spec.podCIDRs: ::/0 holds addresses of ::/8, which no pod can have",
    ),
    (
        "IPv4-mapped pods",
        [node("peer", "::ffff:10.244.2.0/120", ip="192.168.1.2")],
        {},
        "Node peer: spec.podCIDRs: ::ffff:10.244.2.0/120 holds addresses of ::/8, which no pod can have",
    ),
    (
        "host bits",
        [node("peer", "10.244.2.5/24", ip="192.168.1.2")],
        {},
        "Node peer: spec.podCIDRs: 10.244.2.5/24 has host bits set",
    ),
    (
        "nonsense beside sense",
        [node("peer", "pods", "10.244.2.0/24", ip="192.168.1.2")],
        {"10.244.2.0/24": "192.168.1.2"},
        "Node peer: spec.podCIDRs: 'pods' does not appear to be",
    ),
    (
        "an address that is none",
        [node("peer", "10.244.2.0/24", ip="192.168.1")],
        {},
        "Node peer: status.addresses: InternalIP '192.168.1' is no IP address",
    ),
    (
        "an address with a scope, beside a good one",
        [node("peer", "10.244.2.0/24", "fd00:2::/64", ip=("fe80::1%eth0", "fd01::2", "192.168.1.2"))],
        {"10.244.2.0/24": "192.168.1.2", "fd00:2::/64": "fd01::2"},
        "Node peer: status.addresses: InternalIP 'fe80::1%eth0' is link-local",
    ),
    *(
        (
            f"{address} is no node's address",
            [node("peer", "10.244.2.0/24", ip=(address, "192.168.1.2"))],
            {"10.244.2.0/24": "192.168.1.2"},
            f"Node peer: status.addresses: InternalIP '{address}' is no address of a node",
        )
        for address in ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1")
    ),
]


@pytest.mark.parametrize(
    ("peers", "ways", "problem"), [row[1:] for row in PROBLEM_ROWS], ids=[r[0] for r in PROBLEM_ROWS]
)
def test_what_nodes_say_wrongly_is_told_and_left_out(peers: list[Node], ways: dict[str, str], problem: str) -> None:
    want = decided(*peers)
    assert {route.dst: route.via for route in want.routes} == ways
    assert any(problem in f"{each.object}: {each.reason}" for each in want.problems)
    # a CIDR that is left out counts for no masquerade either
    if "spec.podCIDRs" in problem:
        assert {claim.cidr for claim in want.claims} == {*ways, *want.pod_cidrs}
