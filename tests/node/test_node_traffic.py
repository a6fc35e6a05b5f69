"""Pods' packets between nodes and to the outside, on one subnet and across a router, while agents and rules change."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import Names, Namespace
from support.nodes import Cluster, Machine, pings, seen_from, serve
from support.waiting import until

pytestmark = pytest.mark.root


class Routed:
    """Nodes n1 and n2 on one subnet, n3 on another; a pod on each."""

    def __init__(self, names: Names, folder: Path) -> None:
        cluster = Cluster(names, folder, 3, far=1)
        self.cluster, self.router = cluster, cluster.router
        self.n1, self.n2, self.n3 = cluster.nodes
        for machine in cluster.nodes:
            machine.publish()
        self.pods = {machine.name: cluster.pod(machine) for machine in cluster.nodes}
        for machine in cluster.nodes:
            machine.start("--resync-period=1s")
            serve(self.pods[machine.name], f"10.244.{machine.number}.5")
        serve(self.router, "203.0.113.1")


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    names = Names()
    try:
        yield Routed(names, tmp_path_factory.mktemp("routed"))
    finally:
        names.close()


PATHS = [
    # from the pod of → to the pod of, its address as n3's or n2's pod sees it
    ("n1", "n2", "10.244.1.5"),
    ("n1", "n3", "10.244.1.5"),
    ("n3", "n1", "10.244.3.5"),
    ("n3", "n2", "10.244.3.5"),
]


@pytest.mark.parametrize(("source", "target", "seen"), PATHS)
def test_pods_reach_each_other_untranslated(routed: Routed, source: str, target: str, seen: str) -> None:
    assert seen_from(routed.pods[source], f"10.244.{target[1]}.5") == seen


@pytest.mark.parametrize(("source", "target"), [("n1", "n2"), ("n1", "n3"), ("n3", "n1")])
def test_pods_reach_each_other_over_ipv6(routed: Routed, source: str, target: str) -> None:
    assert pings(routed.pods[source], f"fd00:244:{target[1]}::5")


def test_nodes_reach_pods_of_other_nodes(routed: Routed) -> None:
    """Over VXLAN the node's packets need a source that leads back by VXLAN: the device's own."""
    assert seen_from(routed.n1.space, "10.244.2.5") == "192.168.1.1"
    assert seen_from(routed.n1.space, "10.244.3.5") == "10.244.1.0"
    assert pings(routed.n1.space, "fd00:244:3::5")


def test_pods_reach_nodes_untranslated(routed: Routed) -> None:
    assert pings(routed.pods["n1"], "192.168.1.2")
    assert pings(routed.pods["n1"], "192.168.2.3")


def test_pods_leave_the_cluster_under_their_node_s_address(routed: Routed) -> None:
    assert seen_from(routed.pods["n1"], "203.0.113.1") == "192.168.1.1"
    assert seen_from(routed.pods["n3"], "203.0.113.1") == "192.168.2.3"
    assert pings(routed.pods["n1"], "2001:db8::1"), "the outside knows no pod: IPv6 was not masqueraded"


def test_packets_between_subnets_are_cut_to_what_vxlan_leaves(routed: Routed) -> None:
    pod = routed.pods["n1"]
    assert pings(pod, "10.244.2.5", "-M", "do", "-s", "1472")
    assert pings(pod, "10.244.3.5", "-M", "do", "-s", "1422")
    too_big = pod.run("ping", "-n", "-c", "1", "-W", "3", "-M", "do", "-s", "1472", "10.244.3.5", check=False)
    assert re.search(r"[Ff]rag(mentation)? needed.*mtu ?= ?1450|message too long, mtu: 1450", too_big + "\n"), too_big
    pod.run("ip", "route", "flush", "cache")
    # TCP learns it all the same
    assert seen_from(pod, "10.244.3.5") == "10.244.1.5"


def test_packets_to_nobody_s_pods_are_refused_at_once(routed: Routed) -> None:
    said = routed.pods["n1"].run("ping", "-n", "-c", "1", "-W", "5", "10.244.99.9", check=False)
    assert "From 10.244.1.1" in said and "Unreachable" in said
    said = routed.pods["n1"].run("ping", "-n", "-c", "1", "-W", "5", "fd00:244:99::9", check=False)
    assert "Unreachable" in said or "unreachable" in said


@pytest.mark.parametrize("backend", ["legacy", "nft"])
def test_a_forward_policy_of_drop_lets_pods_pass(routed: Routed, backend: str) -> None:
    machine, tool = routed.n1, f"iptables-{backend}"
    machine.space.run(tool, "-P", "FORWARD", "DROP")
    try:
        # as Docker does it while we run: found at the next look
        until("pods pass", lambda: pings(routed.pods["n1"], "10.244.3.5"), 30)
        assert seen_from(routed.pods["n2"], "10.244.1.5") == "10.244.2.5"
        assert seen_from(routed.pods["n1"], "203.0.113.1") == "192.168.1.1"
        assert "-A FORWARD" in machine.space.run(tool, "-S", "FORWARD")
    finally:
        machine.space.run(tool, "-P", "FORWARD", "ACCEPT")


def test_a_flushed_masquerade_is_written_anew(routed: Routed) -> None:
    space = routed.n2.space
    space.run("nft", "flush", "chain", "inet", "pynet-node", "postrouting")
    until("masqueraded again", lambda: "goto outside4" in space.run("nft", "list", "table", "inet", "pynet-node"))
    space.run("nft", "delete", "table", "inet", "pynet-node")
    until("table again", lambda: "goto outside4" in space.run("nft", "list", "ruleset"))
    space.run("nft", "add", "element", "inet", "pynet-node", "direct4", "{ 203.0.113.0/24 }")
    until("element gone", lambda: "203.0.113" not in space.run("nft", "list", "table", "inet", "pynet-node"))
    assert seen_from(routed.pods["n2"], "203.0.113.1") == "192.168.1.2"


class Pinging:
    """A ping every 10 ms, until asked how many were lost."""

    def __init__(self, space: Namespace, address: str, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._ping = space.start("ping", "-n", "-i", "0.01", "-W", "2", address, stdout=file)
        until("first answer", lambda: "bytes from" in log.read_text())

    def lost(self) -> int:
        self._ping.send_signal(signal.SIGINT)
        self._ping.wait(10)
        sent, received = re.findall(r"(\d+) packets transmitted, (\d+) received", self._log.read_text())[0]
        # the last one may still be on its way when ping ends
        return max(0, int(sent) - int(received) - 1)


@pytest.mark.parametrize("target", ["10.244.2.5", "10.244.3.5"])
def test_no_packet_is_lost_while_agents_are_killed_and_started(routed: Routed, target: str, tmp_path: Path) -> None:
    ping = Pinging(routed.pods["n1"], target, tmp_path / "ping")
    other = routed.n2 if target.startswith("10.244.2.") else routed.n3
    for machine, number in ((routed.n1, signal.SIGKILL), (other, signal.SIGTERM), (routed.n1, signal.SIGTERM)):
        machine.stop(number)
        machine.start("--resync-period=1s")
    assert ping.lost() == 0


def test_no_packet_is_lost_while_a_node_is_renamed_and_others_come_and_go(routed: Routed, tmp_path: Path) -> None:
    near = Pinging(routed.pods["n1"], "10.244.2.5", tmp_path / "near")
    far = Pinging(routed.pods["n1"], "10.244.3.5", tmp_path / "far")
    extra = Machine(routed.n1.space, 40, 1, routed.cluster.folder, routed.cluster.manifests)
    try:
        for _ in range(3):
            extra.publish()
            until("came", lambda: "10.244.40.0/24" in routed.n1.ways())
            extra.withdraw()
            until("went", lambda: "10.244.40.0/24" not in routed.n1.ways())
        routed.n2.publish(name="renamed")
        until("renamed", lambda: "renamed" in {each["node"] for each in routed.n1.status()["peers"]})
    finally:
        routed.n2.publish()
    until("named", lambda: "n2" in {each["node"] for each in routed.n1.status()["peers"]})
    assert near.lost() == 0
    assert far.lost() == 0


def test_a_partition_heals_by_itself(routed: Routed) -> None:
    routed.router.run("ip", "link", "set", "p3", "down")
    assert not pings(routed.pods["n1"], "10.244.3.5", "-W", "1")
    routed.n3.ip_command("link", "set", "eth0", "down")
    until("n3 knows", lambda: routed.n3.peers().get("10.244.1.0/24") == "none")
    routed.n3.ip_command("link", "set", "eth0", "up")
    routed.router.run("ip", "link", "set", "p3", "up")
    # a link that goes down takes IPv6 addresses and routes along; a network manager would put them back
    routed.n3.ip_command("route", "replace", "default", "via", "192.168.2.254")
    routed.n3.ip_command("address", "replace", f"{routed.n3.ip6}/64", "dev", "eth0", "nodad")
    routed.n3.ip_command("route", "replace", "default", "via", "fd01:2::fe")
    until("healed", lambda: pings(routed.pods["n1"], "10.244.3.5"))
    until("healed back", lambda: routed.n3.peers().get("10.244.1.0/24") == "vxlan")
    assert seen_from(routed.pods["n3"], "10.244.1.5") == "10.244.3.5"


def test_a_node_that_moves_to_another_subnet_is_reached_there(netns: Names, tmp_path: Path) -> None:
    cluster = Cluster(netns, tmp_path, 2)
    one, two = cluster.nodes
    pod = {machine.name: cluster.pod(machine) for machine in cluster.nodes}
    for machine in cluster.nodes:
        machine.publish()
        machine.start()
    assert pings(pod["n1"], "10.244.2.5")
    cluster.router.run("ip", "link", "set", "p2", "master", "br2")
    two.ip_command("address", "flush", "dev", "eth0", "scope", "global")
    two.ip_command("address", "add", "192.168.2.2/24", "dev", "eth0")
    two.ip_command("route", "add", "default", "via", "192.168.2.254")
    two.publish(ips=["192.168.2.2"])
    until("VXLAN", lambda: one.peers().get("10.244.2.0/24") == two.peers().get("10.244.1.0/24") == "vxlan")
    until("reached", lambda: pings(pod["n1"], "10.244.2.5"))
    assert pings(pod["n2"], "10.244.1.5")


def test_a_node_that_sees_the_other_on_link_but_is_seen_behind_a_router(netns: Names, tmp_path: Path) -> None:
    """Prefixes that differ: one direction goes by VXLAN, the other direct; reverse path filters must not mind."""
    cluster = Cluster(netns, tmp_path, 2)
    one, two = cluster.nodes
    pod = {machine.name: cluster.pod(machine) for machine in cluster.nodes}
    two.ip_command("address", "flush", "dev", "eth0", "scope", "global")
    two.ip_command("address", "add", "192.168.1.2/32", "dev", "eth0")
    two.ip_command("route", "add", "192.168.1.254", "dev", "eth0")
    two.ip_command("route", "add", "default", "via", "192.168.1.254")
    for machine in cluster.nodes:
        machine.space.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.eth0.rp_filter=1")
        machine.publish(cidrs=[machine.cidr], ips=[machine.ip])
        machine.start()
    assert (one.peers(), two.peers()) == ({"10.244.2.0/24": "direct"}, {"10.244.1.0/24": "vxlan"})
    until("reached", lambda: pings(pod["n1"], "10.244.2.5"))
    assert pings(pod["n2"], "10.244.1.5")


@pytest.mark.parametrize("way", ["nftables", "iptables"])
def test_what_is_masqueraded(netns: Names, tmp_path: Path, way: str) -> None:
    cluster = Cluster(netns, tmp_path, 1)
    (machine,) = cluster.nodes
    pod = cluster.pod(machine)
    machine.publish()
    router = cluster.router
    # the router knows the pods, so that what is not masqueraded is answered too
    router.run("ip", "route", "add", "10.244.1.0/24", "via", "192.168.1.1")
    for address in ("203.0.113.9", "198.51.100.9", "169.254.9.9", "10.244.9.9"):
        router.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        serve(router, address)
    machine.ip_command("route", "add", "169.254.9.9/32", "via", "192.168.1.254")
    machine.ip_command("route", "add", "10.244.9.9/32", "via", "192.168.1.254")
    machine.start(f"--masquerade={way}", "--non-masquerade-cidrs=198.51.100.0/24", "--resync-period=1s")
    assert machine.status()["masquerade"] == way
    assert seen_from(pod, "203.0.113.9") == "192.168.1.1"
    assert seen_from(pod, "198.51.100.9") == "10.244.1.5"
    assert seen_from(pod, "169.254.9.9") == "10.244.1.5"
    assert seen_from(pod, "10.244.9.9") == "10.244.1.5", "an address of the cluster CIDR"
    nodes = {**machine.manifest(name="other", cidrs=[], ips=["203.0.113.9"])}
    (machine.manifests / "other.json").write_text(json.dumps(nodes))
    until("a node's address", lambda: seen_from(pod, "203.0.113.9") == "10.244.1.5")
    (machine.manifests / "other.json").unlink()
    until("a node no more", lambda: seen_from(pod, "203.0.113.9") == "192.168.1.1")
    if way == "iptables":
        machine.space.run("iptables", "-t", "nat", "-F", "PYNET-NODE-MASQ")
        until("repaired", lambda: seen_from(pod, "203.0.113.9") == "192.168.1.1")
        assert "pynet-node" not in machine.space.run("nft", "list", "tables")
    machine.stop()
    machine.start("--masquerade=off")
    assert seen_from(pod, "203.0.113.9") == "10.244.1.5"
    assert "pynet-node" not in machine.space.run("nft", "list", "tables")
    assert "PYNET-NODE" not in machine.space.run("iptables-save") + machine.space.run("ipset", "save")


def test_agents_assign_pod_cidrs_that_all_of_them_know(netns: Names, tmp_path: Path) -> None:
    cluster = Cluster(netns, tmp_path, 2)
    one, two = cluster.nodes
    flags = ("--allocate-node-cidrs", "--node-cidr-mask-size=26")
    for machine in cluster.nodes:
        machine.publish(cidrs=[], ips=[machine.ip])
        machine.start(*flags, cluster="10.100.0.0/16", ready=False)

    def cidr(machine: Machine) -> str:
        until("a pod CIDR", lambda: machine.status().get("node", {}).get("podCIDRs"))
        found: str = machine.status()["node"]["podCIDRs"][0]
        return found

    mine, theirs = cidr(one), cidr(two)
    assert mine != theirs
    assert mine.endswith("/26") and theirs.endswith("/26")
    until("routes", lambda: (one.ways(), two.ways()) == ({theirs: "192.168.1.2 eth0"}, {mine: "192.168.1.1 eth0"}))
    three = Machine(one.space, 3, 1, cluster.folder, cluster.manifests)
    three.publish(cidrs=[], ips=[three.ip])
    until("the third", lambda: len(one.ways()) == 2 and len(two.ways()) == 2)
    assert (cidr(one), cidr(two)) == (mine, theirs), "a new node moved another"
    for machine in cluster.nodes:
        machine.stop(signal.SIGKILL)
        machine.start(*flags, cluster="10.100.0.0/16")
    assert (cidr(one), cidr(two)) == (mine, theirs)
    two.stop()
    two.start(cluster="10.100.0.0/16")
    assert (cidr(two), two.ways()[mine]) == (theirs, "192.168.1.1 eth0"), (
        "an agent that assigns nothing does not see it"
    )
    three.publish(cidrs=[mine], ips=[three.ip])
    until("a Node's own CIDR goes first", lambda: one.ways().get(mine) or cidr(one) != mine)
