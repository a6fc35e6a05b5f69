"""A cluster that knows IPv6 alone: nodes' addresses, pod CIDRs, and the underlay that VXLAN crosses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import Names, Namespace
from support.nodes import Cluster, Machine, pings, seen_from, serve
from support.waiting import until

pytestmark = pytest.mark.root


class Six:
    """Nodes n1 and n2 on one subnet, n3 on another, without any IPv4; a pod on each."""

    def __init__(self, names: Names, folder: Path) -> None:
        cluster = Cluster(names, folder, 3, far=1)
        self.router = cluster.router
        self.n1, self.n2, self.n3 = cluster.nodes
        self.pods: dict[str, Namespace] = {}
        for machine in cluster.nodes:
            machine.ip_command("-4", "address", "flush", "dev", "eth0")
            machine.publish(cidrs=[machine.cidr6], ips=[machine.ip6])
            self.pods[machine.name] = pod = cluster.pod(machine)
            for space, dev in ((machine.space, "pynet0"), (pod, "eth0")):
                space.run("ip", "-4", "address", "flush", "dev", dev)
        for machine in cluster.nodes:
            machine.start("--resync-period=1s", cluster="fd00:244::/32")
            serve(self.pods[machine.name], f"fd00:244:{machine.number}::5")
        serve(self.router, "2001:db8::1")


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Six]:
    names = Names()
    try:
        yield Six(names, tmp_path_factory.mktemp("six"))
    finally:
        names.close()


def test_the_same_subnet_goes_direct_and_another_by_vxlan_over_ipv6(six: Six) -> None:
    assert six.n1.peers() == {"fd00:244:2::/64": "direct", "fd00:244:3::/64": "vxlan"}
    assert six.n1.ways(6)["fd00:244:2::/64"] == "fd01:1::2 eth0"
    assert six.n1.ways(6)["fd00:244:3::/64"].endswith(" pynet-vx6")
    assert "pynet-vx4" not in six.n1.ip_command("link")
    (device,) = json.loads(six.n1.ip_command("-j", "-d", "link", "show", "pynet-vx6"))
    assert (device["mtu"], device["linkinfo"]["info_data"]["local6"]) == (1430, "fd01:1::1")
    assert six.n1.routes(6)["fd00:244:3::/64"]["metrics"] == [{"mtu": 1430, "advmss": 1370}]
    assert six.n1.routes(6)["fd00:244::/32"]["type"] == "unreachable"
    assert six.n1.problems() == ""


@pytest.mark.parametrize(("source", "target"), [("n1", "n2"), ("n1", "n3"), ("n3", "n1"), ("n3", "n2")])
def test_pods_reach_each_other_untranslated(six: Six, source: str, target: str) -> None:
    assert seen_from(six.pods[source], f"fd00:244:{target[1]}::5") == f"fd00:244:{source[1]}::5"


def test_nodes_reach_pods_and_pods_reach_nodes(six: Six) -> None:
    assert seen_from(six.n1.space, "fd00:244:2::5") == "fd01:1::1"
    assert seen_from(six.n1.space, "fd00:244:3::5") == "fd00:244:1::"
    assert pings(six.pods["n1"], "fd01:1::2")
    assert pings(six.pods["n1"], "fd01:2::3")


def test_pods_leave_under_their_node_s_address(six: Six) -> None:
    assert seen_from(six.pods["n1"], "2001:db8::1") == "fd01:1::1"
    assert seen_from(six.pods["n3"], "2001:db8::1") == "fd01:2::3"


def test_packets_by_vxlan_are_70_bytes_shorter(six: Six) -> None:
    pod = six.pods["n1"]
    assert pings(pod, "fd00:244:2::5", "-M", "do", "-s", "1452")
    assert pings(pod, "fd00:244:3::5", "-M", "do", "-s", "1382")
    said = pod.run("ping", "-n", "-c", "1", "-W", "3", "-M", "do", "-s", "1383", "fd00:244:3::5", check=False)
    assert re.search(r"mtu[ =:]+1430", said), said
    plugin = json.loads((six.n1.conf / "10-pynet.conflist").read_text())["plugins"][0]
    assert plugin["mtu"] == 1430
    assert plugin["ipam"]["ranges"] == [[{"subnet": "fd00:244:1::/64"}]]


def test_unclaimed_pods_are_refused(six: Six) -> None:
    said = six.pods["n1"].run("ping", "-n", "-c", "1", "-W", "5", "fd00:244:99::9", check=False)
    assert "nreachable" in said


def test_with_vxlan_for_all_the_neighbour_of_the_subnet_goes_by_it_too(six: Six) -> None:
    nodes: list[Machine] = [six.n1, six.n2, six.n3]
    for machine in nodes:
        machine.stop()
        machine.start("--backend=vxlan", cluster="fd00:244::/32")
    try:
        assert set(six.n1.peers().values()) == {"vxlan"}
        until("reached", lambda: pings(six.pods["n1"], "fd00:244:2::5"))
        assert seen_from(six.pods["n3"], "fd00:244:1::5") == "fd00:244:3::5"
    finally:
        for machine in nodes:
            machine.stop()
            machine.start("--resync-period=1s", cluster="fd00:244::/32")
    until("direct again", lambda: pings(six.pods["n1"], "fd00:244:2::5"))
