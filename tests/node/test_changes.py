"""The way from any state of the kernel to the wanted one: it arrives, and touches nothing of others'."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cni.node.changes import Changes, difference
from cni.node.routes import PROTOCOL, Wanted
from pynet.netstate import Forwarding, Neighbour, NetState, Route


def applied(state: NetState, changes: Changes) -> NetState:
    """Return what a kernel makes of the changes; one route a destination and metric, as IPv4's tables have it."""
    routes = {(route.dst, route.metric): route for route in state.routes}
    for route in changes.replace_routes:
        assert (route.dst, route.metric) in routes, f"nothing to replace: {route}"
        routes[route.dst, route.metric] = route
    for route in changes.delete_routes:
        assert routes.pop((route.dst, route.metric)) == route
    for route in changes.add_routes:
        assert (route.dst, route.metric) not in routes, f"File exists: {route}"
        routes[route.dst, route.metric] = route
    neighbours = {(entry.dev, entry.address): entry for entry in state.neighbours}
    forwarding = set(state.forwarding)
    for entry in changes.add:
        if isinstance(entry, Neighbour):
            neighbours[entry.dev, entry.address] = entry
        else:
            forwarding.add(entry)
    for entry in changes.delete:
        if isinstance(entry, Neighbour):
            assert neighbours.pop((entry.dev, entry.address)) == entry
        else:
            forwarding.remove(entry)
    return NetState((), (), tuple(routes.values()), tuple(neighbours.values()), tuple(forwarding))


DST = st.sampled_from([f"10.244.{number}.0/24" for number in range(6)])
OURS = st.builds(
    Route,
    dst=DST,
    via=st.sampled_from(["192.168.1.2", "192.168.1.3"]),
    dev=st.sampled_from(["eth0", "pynet-vx4"]),
    mtu=st.sampled_from([1450, 1500]),
    protocol=st.just(PROTOCOL),
)
UNREACHABLE = st.builds(Route, dst=DST, type=st.just("unreachable"), metric=st.just(4096), protocol=st.just(PROTOCOL))
FOREIGN = st.builds(
    Route, dst=DST, via=st.just("192.168.1.9"), dev=st.just("eth0"), metric=st.just(7), protocol=st.just(4)
)
ROUTES = st.lists(st.one_of(OURS, UNREACHABLE), unique_by=lambda route: (route.dst, route.metric), max_size=8)
MACS = st.sampled_from(["02:70:00:00:00:01", "02:70:00:00:00:02"])
NEIGHBOURS = st.lists(
    st.builds(Neighbour, st.just("pynet-vx4"), st.sampled_from(["10.244.0.0", "10.244.1.0"]), MACS),
    unique_by=lambda entry: entry.address,
)
FORWARDING = st.lists(
    st.builds(Forwarding, st.just("pynet-vx4"), MACS, st.sampled_from(["192.168.2.2", "192.168.2.3"])), unique=True
)


@settings(deadline=None)
@given(ROUTES, NEIGHBOURS, FORWARDING, ROUTES, st.lists(FOREIGN, unique=True), NEIGHBOURS, FORWARDING)
def test_every_state_leads_to_the_wanted_one(
    routes: list[Route],
    neighbours: list[Neighbour],
    forwarding: list[Forwarding],
    present: list[Route],
    foreign: list[Route],
    there: list[Neighbour],
    entries: list[Forwarding],
) -> None:
    want = Wanted(routes=tuple(routes), neighbours=tuple(neighbours), forwarding=tuple(forwarding))
    before = NetState((), (), (*present, *foreign), tuple(there), tuple(entries))
    after = applied(before, difference(want, before))
    assert set(after.routes) == {*routes, *foreign}
    assert set(after.neighbours) == set(neighbours)
    assert set(after.forwarding) == set(forwarding)
    assert not difference(want, after), "a second look finds work"


def test_a_way_that_moves_is_replaced_and_never_missing() -> None:
    before = Route("10.244.2.0/24", via="192.168.1.2", dev="eth0", protocol=PROTOCOL)
    after = Route("10.244.2.0/24", via="10.244.2.0", dev="pynet-vx4", onlink=True, protocol=PROTOCOL)
    changes = difference(Wanted(routes=(after,)), NetState(routes=(before,)))
    assert changes == Changes(replace_routes=(after,))


def test_a_route_of_ours_with_several_next_hops_is_taken_down_first() -> None:
    """Replacing one of IPv6's siblings would leave the others."""
    odd = Route("fd00:2::/64", via="multipath", metric=1024, protocol=PROTOCOL)
    right = Route("fd00:2::/64", via="fd01::2", dev="eth0", metric=1024, protocol=PROTOCOL)
    changes = difference(Wanted(routes=(right,)), NetState(routes=(odd,)))
    assert (changes.delete_routes, changes.add_routes) == ((odd,), (right,))
