"""What the agent decides about each peer: the way, its route, and the reason that it gives."""

from __future__ import annotations

import msgspec
import pytest

from cni.node.changes import difference
from cni.node.routes import (
    PROTOCOL,
    Fib,
    Settings,
    link_local,
    unclaimed,
    vtep_mac,
    wanted,
)
from pynet.netstate import Forwarding, Link, LinkAddress, Neighbour, NetState, Route, Vxlan
from support.wanted import (
    ADDRESSES,
    ADMIN,
    CONNECTED,
    DEFAULT,
    ETH0,
    HERE,
    KERNEL,
    LINKS,
    OWN,
    decided,
    members,
    node,
    only,
)

WAYS = [
    # peer's address, pod CIDR, backend → how, and words of the reason
    ("192.168.1.2", "10.244.2.0/24", "auto", "direct", "on link: eth0 has 192.168.1.0/24"),
    ("192.168.1.2", "10.244.2.0/24", "host-gw", "direct", "on link"),
    ("192.168.1.2", "10.244.2.0/24", "vxlan", "vxlan", "the backend is vxlan"),
    ("192.168.2.2", "10.244.2.0/24", "auto", "vxlan", "behind 192.168.1.254"),
    ("192.168.2.2", "10.244.2.0/24", "host-gw", "none", "behind 192.168.1.254, and the backend is host-gw"),
    ("192.168.2.2", "10.244.2.0/24", "vxlan", "vxlan", "the backend is vxlan"),
    ("fd01::2", "fd00:2::/64", "auto", "direct", "on link: eth0 has fd01::/64"),
    ("fd02::2", "fd00:2::/64", "auto", "vxlan", "behind fd01::fe"),
    ("fd02::2", "fd00:2::/64", "host-gw", "none", "host-gw"),
    ("192.168.1.2", "fd00:2::/64", "auto", "vxlan", "no IPv6 address"),
    ("192.168.1.2", "fd00:2::/64", "host-gw", "none", "no IPv6 address, and the backend is host-gw"),
    ("fd01::2", "10.244.2.0/24", "auto", "vxlan", "no IPv4 address"),
    ((), "10.244.2.0/24", "auto", "none", "no address"),
]


@pytest.mark.parametrize(("ip", "cidr", "backend", "how", "why"), WAYS)
def test_the_way_to_a_peer(ip: str, cidr: str, backend: str, how: str, why: str) -> None:
    reach = only(decided(node("peer", cidr, ip=ip), backend=backend))
    assert (reach.how, reach.cidr) == (how, cidr)
    assert why in reach.reason
    assert bool(reach.routes) == (how != "none")


def test_a_direct_route_goes_by_the_peers_address_and_says_our_own() -> None:
    want = decided(node("peer", "10.244.2.0/24", "fd00:2::/64", ip=("192.168.1.2", "fd01::2")))
    assert want.routes == (
        Route(
            "10.244.2.0/24", via="192.168.1.2", dev="eth0", src="192.168.1.1", mtu=1500, advmss=1460, protocol=PROTOCOL
        ),
        Route("fd00:2::/64", via="fd01::2", dev="eth0", metric=1024, mtu=1500, advmss=1440, protocol=PROTOCOL),
    )
    assert want.neighbours == want.forwarding == ()
    assert want.pod_mtu == 1500


def test_an_overlay_peer_gets_one_neighbour_and_one_forwarding_entry() -> None:
    want = decided(node("peer", "10.244.2.0/24", ip="192.168.2.2"))
    mac = "02:70:c0:a8:02:02"
    assert want.routes == (
        Route(
            "10.244.2.0/24", via="10.244.2.0", dev="pynet-vx4", mtu=1450, advmss=1410, onlink=True, protocol=PROTOCOL
        ),
    )
    assert want.neighbours == (Neighbour("pynet-vx4", "10.244.2.0", mac),)
    assert want.forwarding == (Forwarding("pynet-vx4", mac, "192.168.2.2"),)
    (device,) = want.devices
    assert device.vxlan == Vxlan(112, 4789, "192.168.1.1")
    assert (device.name, device.mac, device.mtu) == ("pynet-vx4", "02:70:c0:a8:01:01", 1450)
    assert device.addresses == ("10.244.1.0/32", "fd00:1::/128")
    assert want.pod_mtu == 1450


def test_both_nodes_agree_on_macs_and_numbers() -> None:
    """What one node sends to has to be what the other one is."""
    there = NetState(
        (Link(2, "ens3", 1500, True),),
        (LinkAddress("ens3", "192.168.2.2", 24),),
        (
            Route("192.168.2.0/24", dev="ens3", protocol=KERNEL),
            Route("0.0.0.0/0", via="192.168.2.254", dev="ens3", protocol=ADMIN),
        ),
    )
    peer = node("peer", "10.244.2.0/24", ip="192.168.2.2")
    ours = decided(peer, vni=7, port=8472)
    theirs = wanted(members(OWN, peer), Settings("peer", vni=7, port=8472), there)
    assert ours.forwarding[0].mac == theirs.devices[0].mac
    assert theirs.forwarding[0].mac == ours.devices[0].mac
    assert ours.forwarding[0].remote == theirs.devices[0].vxlan.local
    assert f"{ours.routes[0].via}/32" in theirs.devices[0].addresses
    assert {device.vxlan.vni for device in ours.devices + theirs.devices} == {7}


@pytest.mark.parametrize(
    ("here", "there", "family"),
    [
        (("192.168.1.1", "fd01::1"), ("192.168.2.2", "fd02::2"), 4),
        (("fd01::1", "192.168.1.1"), ("fd02::2", "192.168.2.2"), 6),
        (("192.168.1.1", "fd01::1"), ("fd02::2", "192.168.2.2"), 4),
        (("fd01::1", "192.168.1.1"), ("192.168.2.2", "fd02::2"), 4),
        (("192.168.1.1", "fd01::1"), ("fd02::2",), 6),
        (("fd01::1",), ("192.168.2.2", "fd02::2"), 6),
        (("192.168.1.1",), ("fd02::2",), 0),
    ],
)
def test_two_nodes_agree_on_the_underlay_of_their_vxlan(
    here: tuple[str, ...], there: tuple[str, ...], family: int
) -> None:
    """Whatever the order of their addresses: each has the device by which the other one sends."""
    one, two = node("own", "10.244.1.0/24", ip=here), node("peer", "10.244.2.0/24", ip=there)
    moved = {"192.168.1.1": "192.168.2.2", "fd01::1": "fd02::2"}
    far = msgspec.structs.replace(
        HERE,
        addresses=tuple(LinkAddress(a.dev, moved.get(a.address, a.address), a.length) for a in ADDRESSES),
        routes=DEFAULT,
    )
    ours = decided(two, own=one)
    theirs = wanted(members(one, two), Settings("peer"), far)
    expected = f"pynet-vx{family}" if family else ""
    assert [reach.dev for want in (ours, theirs) for reach in want.reaches] == [expected] * 2
    if family:
        assert all(expected in {device.name for device in want.devices} for want in (ours, theirs))


def test_over_an_ipv6_underlay_vxlan_takes_70_bytes_and_a_device_of_its_own() -> None:
    own = node("own", "fd00:1::/64", ip="fd01::1")
    want = decided(node("peer", "fd00:2::/64", ip="fd02::2"), own=own)
    mac = vtep_mac("fd02::2")
    assert want.pod_mtu == 1430
    assert [device.name for device in want.devices] == ["pynet-vx6"]
    assert want.devices[0].vxlan.local == "fd01::1"
    assert want.routes[0] == Route(
        "fd00:2::/64", via=link_local(mac), dev="pynet-vx6", metric=1024, mtu=1430, advmss=1370, protocol=PROTOCOL
    )
    assert want.forwarding == (Forwarding("pynet-vx6", mac, "fd02::2"),)


def test_a_peer_of_the_other_family_gets_the_second_device() -> None:
    want = decided(node("four", "10.244.2.0/24", ip="192.168.2.2"), node("six", "fd00:3::/64", ip="fd02::2"))
    assert [device.name for device in want.devices] == ["pynet-vx4", "pynet-vx6"]
    assert want.pod_mtu == 1430


def test_the_link_local_address_is_the_one_of_rfc_4291() -> None:
    assert link_local("34:56:78:9a:bc:de") == "fe80::3656:78ff:fe9a:bcde"


@pytest.mark.parametrize(
    ("backend", "peers", "mtu"),
    [
        ("auto", ("192.168.1.2",), 1500),
        ("auto", ("192.168.1.2", "192.168.2.2"), 1450),
        ("auto", (), 1500),
        ("host-gw", ("192.168.2.2",), 1500),
        ("vxlan", (), 1450),
        ("vxlan", ("192.168.1.2",), 1450),
    ],
)
def test_pods_get_the_mtu_that_fits_every_way_in_use(backend: str, peers: tuple[str, ...], mtu: int) -> None:
    peer_nodes = [node(f"n{number}", f"10.244.{number + 2}.0/24", ip=ip) for number, ip in enumerate(peers)]
    own = node("own", "10.244.1.0/24", ip="192.168.1.1")
    assert decided(*peer_nodes, own=own, backend=backend).pod_mtu == mtu


def test_a_smaller_link_makes_smaller_packets() -> None:
    small = msgspec.structs.replace(HERE, links=(LINKS[0], msgspec.structs.replace(ETH0, mtu=1400)))
    want = decided(
        node("near", "10.244.2.0/24", ip="192.168.1.2"), node("far", "10.244.3.0/24", ip="192.168.2.2"), state=small
    )
    assert [(route.mtu, route.advmss) for route in want.routes] == [(1350, 1310), (1400, 1360)]


def test_an_mtu_on_the_way_to_one_peer_counts_for_that_peer() -> None:
    tunnel = Route("192.168.2.0/24", via="192.168.1.253", dev="eth0", mtu=1300, protocol=ADMIN)
    state = msgspec.structs.replace(HERE, routes=(*HERE.routes, tunnel))
    want = decided(
        node("a", "10.244.2.0/24", ip="192.168.2.2"), node("b", "10.244.3.0/24", ip="192.168.3.3"), state=state
    )
    assert [route.mtu for route in want.routes] == [1250, 1450]


def test_the_cluster_s_unclaimed_space_is_unreachable() -> None:
    want = decided(cluster_cidrs=("10.244.0.0/16", "fd00::/16"))
    assert want.routes == (
        Route("10.244.0.0/16", "unreachable", metric=4096, protocol=PROTOCOL),
        Route("fd00::/16", "unreachable", metric=4096, protocol=PROTOCOL),
    )
    assert list(want.routes) == unclaimed(("10.244.0.0/16", "fd00::/16"))


@pytest.mark.parametrize(
    ("cluster", "made"),
    [
        ("192.168.0.0/16", False),  # the node of another subnet would be cut off
        ("192.168.0.0/22", False),
        ("192.168.3.0/24", True),
    ],
)
def test_the_unclaimed_space_holds_no_node_that_only_a_wider_route_reaches(cluster: str, made: bool) -> None:
    far = node("far", "10.244.2.0/24", ip="192.168.2.2")
    want = decided(far, cluster_cidrs=(cluster,))
    assert (cluster in {route.dst for route in want.routes}) == made
    said = [each.reason for each in want.problems if each.object == f"--cluster-cidr {cluster}"]
    assert bool(said) == (not made)
    assert made or said[0].startswith("an unreachable route for it would cut off the node 192.168.2.2")


def test_a_default_route_without_a_next_hop_makes_nobody_a_neighbour() -> None:
    """A tunnel's or a modem's: the peer is somewhere behind it."""
    state = msgspec.structs.replace(HERE, routes=(*CONNECTED, Route("0.0.0.0/0", dev="eth0", protocol=ADMIN)))
    assert only(decided(node("peer", "10.244.2.0/24", ip="192.168.2.2"), state=state)).how == "vxlan"


def test_external_addresses_serve_where_there_is_no_internal_one() -> None:
    assert only(decided(node("peer", "10.244.2.0/24", external="192.168.1.9"))).via == "192.168.1.9"
    both = node("peer", "10.244.2.0/24", ip="192.168.1.2", external="203.0.113.9")
    assert only(decided(both)).via == "192.168.1.2"


def test_a_node_that_is_this_machine_under_another_name_is_no_peer() -> None:
    reach = only(decided(node("renamed", "10.244.2.0/24", ip="192.168.1.1")))
    assert reach.how == "none"
    assert "this machine's own" in reach.reason


def test_without_a_node_of_our_own_the_others_are_reached_all_the_same() -> None:
    want = wanted(members(node("peer", "10.244.2.0/24", ip="192.168.1.2")), Settings("own"), HERE)
    assert [route.dst for route in want.routes] == ["10.244.2.0/24"]
    assert want.pod_cidrs == ()
    assert "Node own: there is none" in " ".join(f"{each.object}: {each.reason}" for each in want.problems)


def test_a_peer_that_nothing_leads_to_gets_no_route() -> None:
    state = msgspec.structs.replace(HERE, routes=CONNECTED)
    reach = only(decided(node("peer", "10.244.2.0/24", ip="192.168.2.2"), state=state))
    assert (reach.how, reach.reason) == ("none", "this node has no route to 192.168.2.2")


def test_without_vxlan_in_the_kernel_direct_peers_are_served() -> None:
    want = decided(
        node("near", "10.244.2.0/24", ip="192.168.1.2"), node("far", "10.244.3.0/24", ip="192.168.2.2"), vxlan=False
    )
    assert [route.dst for route in want.routes] == ["10.244.2.0/24"]
    assert want.devices == ()
    assert "no VXLAN" in want.reaches[0].reason


def test_a_foreign_link_of_our_device_s_name_is_not_used() -> None:
    state = msgspec.structs.replace(HERE, links=(*LINKS, Link(9, "pynet-vx4", 1500, True, "dummy")))
    want = decided(node("far", "10.244.3.0/24", ip="192.168.2.2"), state=state)
    assert want.devices == want.routes == ()
    assert "foreign link" in want.reaches[0].reason


FOREIGN = [
    # a foreign route → is ours left out, and what is said
    (Route("10.244.2.0/24", via="192.168.1.77", dev="eth0", protocol=ADMIN), True, "foreign route is in the way"),
    (Route("10.244.2.0/24", via="192.168.1.77", dev="eth0", metric=50, protocol=ADMIN), False, None),
    (Route("10.244.2.0/24", "blackhole", protocol=ADMIN), True, "foreign route is in the way: blackhole"),
    (Route("10.244.2.0/24", dev="docker0", protocol=KERNEL), True, "in the way"),
    (Route("10.244.2.128/25", dev="docker0", protocol=KERNEL), False, "takes a part of 10.244.2.0/24 of Node peer"),
    (Route("10.244.0.0/16", via="192.168.1.77", dev="eth0", protocol=ADMIN), False, None),
    (Route("10.244.1.0/24", dev="pynet0", protocol=KERNEL), False, None),
]


@pytest.mark.parametrize(("foreign", "left_out", "said"), FOREIGN)
def test_foreign_routes_are_never_touched_and_told_when_in_the_way(
    foreign: Route, left_out: bool, said: str | None
) -> None:
    state = msgspec.structs.replace(HERE, routes=(*HERE.routes, foreign))
    want = decided(node("peer", "10.244.2.0/24", ip="192.168.1.2"), state=state)
    assert ("10.244.2.0/24" not in [route.dst for route in want.routes]) == left_out
    assert [said in problem.reason for problem in want.problems] == ([True] if said else [])
    changes = difference(want, state)
    assert foreign not in (*changes.delete_routes, *changes.replace_routes)
    if left_out:
        assert only(want).how == "none"


def test_a_foreign_route_that_leads_to_the_peer_serves() -> None:
    same = Route("10.244.2.0/24", via="192.168.1.2", dev="eth0", protocol=ADMIN)
    state = msgspec.structs.replace(HERE, routes=(*HERE.routes, same))
    reach = only(decided(node("peer", "10.244.2.0/24", ip="192.168.1.2"), state=state))
    assert (reach.how, reach.routes) == ("direct", ())
    assert "a foreign route already leads there" in reach.reason


def test_a_foreign_route_for_all_pods_goes_before_our_unreachable_one() -> None:
    foreign = Route("10.244.0.0/16", via="192.168.1.77", dev="eth0", metric=100, protocol=ADMIN)
    state = msgspec.structs.replace(HERE, routes=(*HERE.routes, foreign))
    assert decided(state=state, cluster_cidrs=("10.244.0.0/16",)).routes == ()


def test_our_own_routes_do_not_decide_what_is_on_link() -> None:
    """A peer's address inside of a CIDR that we route would else seem to be behind that."""
    ours = Route("192.168.2.0/24", via="192.168.1.9", dev="eth0", protocol=PROTOCOL)
    state = msgspec.structs.replace(HERE, routes=(*HERE.routes, ours))
    assert only(decided(node("peer", "10.244.2.0/24", ip="192.168.2.2"), state=state)).how == "vxlan"


LOOKUPS = [
    ("10.1.2.3", "10.1.2.0/24"),
    ("10.1.3.3", "10.1.0.0/16"),
    ("10.9.9.9", "0.0.0.0/0"),
    ("fd00::1", "fd00::/64"),
    ("fd01::1", None),
    ("10.7.0.1", "0.0.0.0/0"),
]


@pytest.mark.parametrize(("address", "found"), LOOKUPS)
def test_the_longest_prefix_decides(address: str, found: str | None) -> None:
    fib = Fib(
        [
            Route("0.0.0.0/0", via="10.0.0.1", dev="a"),
            Route("10.1.0.0/16", dev="a"),
            Route("10.1.2.0/24", dev="b", metric=5),
            Route("10.1.2.0/24", dev="c", metric=7),
            Route("10.7.0.0/16", "throw"),
            Route("fd00::/64", dev="a"),
        ]
    )
    route = fib.lookup(address)
    assert (route.dst if route else None) == found
    if found == "10.1.2.0/24":
        assert route is not None and route.dev == "b"
