"""What the lane promises its tests: a kernel with IPVS, dummy links, VLAN filtering bridges, and netfilter."""

from __future__ import annotations

import os

import pytest

from support.netns import Names

pytestmark = [pytest.mark.vm, pytest.mark.root]


def test_the_guest_is_root_with_its_own_kernel() -> None:
    assert os.geteuid() == 0
    assert "amd64" in os.uname().release


def test_ipvs_answers_in_a_namespace(netns: Names) -> None:
    node = netns("node")
    node.run("ipvsadm", "-A", "-t", "192.0.2.1:80", "-s", "rr")
    assert "192.0.2.1:80 rr" in node.run("ipvsadm", "-Ln")


@pytest.mark.parametrize(
    "link",
    [
        ("dummy",),
        ("bridge", "vlan_filtering", "1"),
        ("ifb",),
        ("vxlan", "id", "7", "dstport", "8472"),
    ],
    ids=lambda words: words[0],
)
def test_link_types(netns: Names, link: tuple[str, ...]) -> None:
    netns("node").run("ip", "link", "add", "x", "type", *link)


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy", "ip6tables-nft"])
def test_iptables_nat(netns: Names, program: str) -> None:
    node = netns("node")
    node.run(program, "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    node.run(program, "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "REJECT")


def test_ipset_and_nftables(netns: Names) -> None:
    node = netns("node")
    node.run("ipset", "create", "x", "hash:ip,port,ip")
    node.run("nft", "add table ip x; add chain ip x y { type nat hook prerouting priority -100; }")
