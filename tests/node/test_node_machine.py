"""What the agent makes of its own machine: sysctls, the FORWARD chain, files for the runtime."""

from __future__ import annotations

import json
import os
import re

import pytest

from cni.node.glance import glance
from pynet.kernel import netns as netns_of
from pynet.kernel.nfnetlink import Nfnetlink
from support.netns import Names, Namespace, programs
from support.nodes import Machine
from support.peers import far, near
from support.waiting import until

pytestmark = pytest.mark.root


def test_sysctls_are_set_and_each_change_is_logged(own: Machine) -> None:
    far(own, 3)
    own.space.run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
    own.space.run("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=1", "net.ipv4.conf.all.rp_filter=1")
    own.space.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0", check=False)
    own.start()
    values = own.space.run(
        "sysctl", "-n", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.eth0.accept_ra",
        "net.ipv4.conf.eth0.rp_filter", "net.ipv4.conf.pynet-vx4.rp_filter", "net.ipv4.conf.all.rp_filter",
    )  # fmt: skip
    assert values.split() == ["1", "1", "2", "2", "2", "1"]
    log = own.log.read_text()
    assert 'msg="sysctl changed" name=net.ipv4.ip_forward was=0 now=1' in log
    assert 'msg="sysctl changed" name=net.ipv4.conf.eth0.rp_filter was=' in log
    bridged = own.space.run("sysctl", "-n", "net.bridge.bridge-nf-call-iptables", check=False).strip()
    assert bridged in ("", "1")


def test_the_node_s_files(own: Machine) -> None:
    near(own, 2)
    own.start()
    conflist = own.conf / "10-pynet.conflist"
    (plugin,) = json.loads(conflist.read_text())["plugins"]
    assert (plugin["mtu"], plugin["ipMasq"], plugin["stateDir"]) == (1500, False, str(own.state))
    assert conflist.stat().st_mode & 0o777 == 0o600
    facts = json.loads((own.state / "node.json").read_text())
    assert (facts["name"], facts["podCIDRs"], facts["mtu"]) == ("n1", [own.cidr, own.cidr6], 1500)
    inode = conflist.stat().st_ino
    far(own, 3)
    until("MTU for VXLAN", lambda: json.loads(conflist.read_text())["plugins"][0]["mtu"] == 1450)
    assert conflist.stat().st_ino != inode, "written in place"
    own.ip_command("link", "set", "eth0", "mtu", "1400")
    until("MTU of the link", lambda: json.loads(conflist.read_text())["plugins"][0]["mtu"] == 1350)
    assert own.routes()["10.244.2.0/24"]["metrics"] == [{"mtu": 1400, "advmss": 1360}]
    own.publish(cidrs=["10.244.9.0/24"])
    until("new CIDR", lambda: "10.244.9.0/24" in conflist.read_text())


def test_a_node_without_a_pod_cidr_routes_and_says_what_is_missing(own: Machine) -> None:
    own.publish(cidrs=[])
    near(own, 2)
    own.start()
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
    assert not own.conf.exists()
    assert "Node n1: spec.podCIDRs: this node has none" in own.problems()
    own.publish()
    until("configuration", lambda: (own.conf / "10-pynet.conflist").exists())


def test_a_pod_cidr_without_room_is_told_and_configures_nothing(own: Machine) -> None:
    own.publish(cidrs=["10.244.1.0/31", "fd00:244:1::/128"])
    own.start()
    assert "Node n1: spec.podCIDRs: 10.244.1.0/31 has no room for a pod" in own.problems()
    assert not own.conf.exists()
    assert own.get("/metrics")[0] == 200
    own.publish(cidrs=["10.244.1.0/31", "10.244.9.0/24", "10.244.8.0/30", "fd00:244:1::/64"])
    until("configuration", lambda: (own.conf / "10-pynet.conflist").exists())
    plugin = json.loads((own.conf / "10-pynet.conflist").read_text())["plugins"][0]
    assert plugin["ipam"]["ranges"] == [
        [{"subnet": "10.244.9.0/24"}, {"subnet": "10.244.8.0/30"}],
        [{"subnet": "fd00:244:1::/64"}],
    ]


FORWARD = ["-P FORWARD DROP", "-A FORWARD -j REJECT"]


@pytest.mark.parametrize("closed", FORWARD)
@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"])
def test_a_glance_sees_a_forward_chain_that_was_closed(netns: Names, tool: str, closed: str) -> None:
    space = netns("host")
    opened = netns_of.open_path(space.path)
    with netns_of.inside(opened):
        kernel = Nfnetlink()
        untouched = glance(kernel)
        assert tables_of(space) == ("", "", ""), "looking makes tables"
        space.run(tool, "-P", "FORWARD", "ACCEPT")
        before = glance(kernel)
        assert before == glance(kernel)
        space.run(tool, *closed.split())
        assert glance(kernel) not in (untouched, before)
        kernel.close()
    os.close(opened)


def tables_of(space: Namespace) -> tuple[str, ...]:
    """Return the tables of nftables and of legacy iptables."""
    return (
        space.run("nft", "list", "tables"),
        space.run("cat", "/proc/net/ip_tables_names"),
        space.run("cat", "/proc/net/ip6_tables_names"),
    )


@pytest.mark.parametrize("masquerade", ["auto", "iptables"])
def test_the_agent_makes_no_table_of_the_other_back_end(own: Machine, masquerade: str) -> None:
    own.space.run("iptables-nft", "-P", "FORWARD", "ACCEPT")
    near(own, 2)
    own.start(f"--masquerade={masquerade}")
    own.stop()
    clean = ("--cleanup", f"--state-dir={own.state}", f"--cni-conf-dir={own.conf}")
    assert tables_of(own.space)[1:] == ("", "")
    own.space.run(str(programs() / "pynetd"), *clean)
    assert tables_of(own.space)[1:] == ("", "")


def test_a_forward_chain_closed_while_the_agent_runs_lets_pods_pass(own: Machine) -> None:
    own.start("--resync-period=1h")
    own.space.run("iptables", "-P", "FORWARD", "DROP")
    own.space.run("iptables", "-A", "FORWARD", "-j", "DROP")
    rules = ["-P FORWARD DROP", '-A FORWARD -m comment --comment "pynetd: pods" -j PYNET-PODS', "-A FORWARD -j DROP"]
    until("opened", lambda: own.space.run("iptables", "-S", "FORWARD").splitlines() == rules)
    assert "-A PYNET-PODS -s 10.244.0.0/16 -j ACCEPT" in own.space.run("iptables", "-S", "PYNET-PODS")


@pytest.mark.parametrize(
    ("masquerade", "flush"),
    [
        ("nftables", "nft flush ruleset"),
        ("nftables", "nft flush chain inet pynet-node postrouting"),
        ("iptables", "iptables-nft -t nat -F"),
    ],
)
def test_a_masquerade_that_somebody_flushes_is_back(own: Machine, masquerade: str, flush: str) -> None:
    own.start(f"--masquerade={masquerade}", "--resync-period=1h")

    def rules() -> str:
        return re.sub(r"counter packets \d+ bytes \d+", "", own.space.run("nft", "list", "ruleset"))

    before = rules()
    assert "masquerade" in before or "MASQUERADE" in before
    own.space.run(*flush.split())
    until("back", lambda: rules() == before)
