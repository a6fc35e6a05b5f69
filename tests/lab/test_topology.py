"""Which addresses a lab's machines get: by index, the same each time, never shared."""

from __future__ import annotations

import ipaddress

import pytest

from netnslab import topology


@pytest.mark.parametrize("name", topology.names())
def test_every_topology_is_read(name):
    assert topology.load(name).about


@pytest.mark.parametrize("name", topology.names())
@pytest.mark.parametrize("ipv6", [False, True])
def test_no_two_machines_share_an_address_or_a_pod_cidr(name, ipv6):
    shape = topology.load(name)
    indices = range(1, topology.LIMIT + 1)
    machines = [topology.node_addresses(shape, index, ipv6) for index in indices]
    machines.append(topology.client_addresses(shape, ipv6))
    machines += [topology.gateways(shape, subnet, ipv6) for subnet in shape.subnets]
    addresses = [address for each in machines for address in each.values()]
    assert len(set(addresses)) == len(addresses)
    cidrs = [cidr for index in indices for cidr in topology.pod_cidrs(shape, index, ipv6)]
    assert len(set(cidrs)) == len(cidrs)


def test_pod_cidrs_are_inside_the_cluster_s_range_first_family_first():
    shape = topology.load("flat")
    assert topology.pod_cidrs(shape, 2, True) == ("10.244.2.0/24", "fd00:10:244:2::/64")
    for cidr, whole in zip(topology.pod_cidrs(shape, 180, True), topology.cluster_cidrs(shape, True), strict=True):
        assert ipaddress.ip_network(cidr).subnet_of(ipaddress.ip_network(whole))  # type: ignore[arg-type]


def test_nodes_are_dealt_over_the_subnets_in_turn():
    shape = topology.load("routed")
    assert [topology.node_subnet(shape, index) for index in (1, 2, 3)] == ["red", "blue", "red"]


GOOD = "{about: x, ranges: {pods: {IPv4: 10.0.0.0/8}, services: {IPv4: 10.96.0.0/16}}, subnets: {a: {IPv4: 192.168.0.0/24}}, nodes: {count: 2, subnets: [a]}, client: a}"  # noqa: E501


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("client: a", "client: b"), "client: no subnet 'b'"),
        (GOOD.replace("[a]", "[a, c]"), "nodes.subnets: no subnet 'c'"),
        (GOOD.replace("services: {IPv4: 10.96.0.0/16}", ""), "ranges.services: missing"),
        (GOOD.replace("count: 2", "count: two"), "nodes.count"),
        ("{", "t.yaml"),
    ],
)
def test_a_topology_that_cannot_be_used_is_refused_by_field(text, says):
    with pytest.raises(topology.TopologyError, match=says.replace("[", r"\[")):
        topology.parse(text, "t.yaml")


def test_an_unknown_topology_is_refused_with_those_there_are():
    with pytest.raises(topology.TopologyError, match="flat"):
        topology.load("ring")


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("77", {"IPv4": "172.31.2.77", "IPv6": "fd00:31:2::4d"}),
        ("172.31.2.9", {"IPv4": "172.31.2.9"}),
        ("fd00:31:2::9", {"IPv6": "fd00:31:2::9"}),
        ("172.31.0.77", "172.31.0.77 is not in blue: 172.31.2.0/24, fd00:31:2::/64"),
        ("here", "'here' is no address, and no host number of blue"),
        ("700", "'700' is no address, and no host number of blue"),
    ],
)
def test_a_node_s_other_addresses_are_of_its_own_subnet(word, found):
    shape = topology.load("routed")
    if isinstance(found, dict):
        assert topology.addresses_named(shape, "blue", word, True) == found
        return
    with pytest.raises(topology.TopologyError, match=found):
        topology.addresses_named(shape, "blue", word, True)
