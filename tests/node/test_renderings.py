"""Texts that the agent writes: the masquerade's rules, the network configuration, the status; and what it reads."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from cni.node import acceptance, conflist, main
from cni.node.masquerade import Masquerade, masquerade, nft_changes, nft_table
from cni.node.nodes import Problem
from cni.node.routes import Underlay
from cni.node.status import NodeFile, Peer, Status, Writer, load, render


def test_the_masquerade_s_sets_are_merged() -> None:
    found = masquerade(
        ["10.244.1.0/24", "fd00:1::/64"],
        ["10.244.0.0/16", "10.244.1.0/24", "192.168.1.2", "192.168.1.3", "fd00::/16", "fd00:1::/64"],
    )
    assert found == Masquerade(
        pods4=("10.244.1.0/24",),
        pods6=("fd00:1::/64",),
        direct4=("10.244.0.0/16", "192.168.1.2/31"),
        direct6=("fd00::/16",),
    )


def test_the_masquerade_is_a_constant_number_of_rules() -> None:
    few = nft_table(Masquerade(("10.244.1.0/24",), (), ("10.244.0.0/16",), ()))
    many = nft_table(Masquerade(("10.244.1.0/24",), (), tuple(f"10.{n}.0.0/16" for n in range(250)), ()))
    assert len(few.splitlines()) == len(many.splitlines())
    assert few.startswith("add table inet pynet-node\ndelete table inet pynet-node\ntable inet pynet-node {\n")
    lines = [line.strip() for line in few.splitlines()]
    start = lines.index("chain postrouting {")
    assert lines[start : start + 10] == [
        "chain postrouting {",
        "type nat hook postrouting priority srcnat + 10; policy accept;",
        "ip saddr @pods4 ip daddr != @direct4 goto outside4",
        "ip6 saddr @pods6 ip6 daddr != @direct6 goto outside6",
        "}",
        "chain outside4 {",
        "ip daddr 224.0.0.0/4 return",
        "fib daddr type local return",
        "masquerade fully-random",
        "}",
    ]


def test_a_node_more_is_an_element_more() -> None:
    before = Masquerade(("10.244.1.0/24",), (), ("10.244.2.0/24", "10.244.4.0/24"), ())
    after = Masquerade(("10.244.1.0/24",), (), ("10.244.2.0/24", "10.244.6.0/24"), ("fd00::/64",))
    assert nft_changes(before, after) == (
        "delete element inet pynet-node direct4 { 10.244.4.0/24 }\n"
        "add element inet pynet-node direct4 { 10.244.6.0/24 }\n"
        "add element inet pynet-node direct6 { fd00::/64 }\n"
    )
    assert nft_changes(before, before) == ""


def test_the_network_configuration_leaves_the_masquerade_to_the_agent(tmp_path: Path) -> None:
    content = conflist.conflist(("10.244.1.0/24", "fd00:1::/64"), 1450, "pynet0", Path("/run/pynet"))
    (plugin,) = content["plugins"]
    assert (plugin["type"], plugin["ipMasq"], plugin["mtu"]) == ("pynet-cni", False, 1450)
    assert plugin["stateDir"] == "/run/pynet"
    assert plugin["ipam"]["ranges"] == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:1::/64"}]]
    assert plugin["capabilities"] == {"portMappings": True, "bandwidth": True}
    assert plugin["isDefaultGateway"] and plugin["hairpinMode"]
    assert content["cniVersion"] in content["cniVersions"]


def test_two_pod_cidrs_of_a_family_are_one_range_set() -> None:
    """A pod gets one address of each set."""
    assert conflist.ranges(("10.1.0.0/24", "fd00::/64", "10.2.0.0/24")) == [
        [{"subnet": "10.1.0.0/24"}, {"subnet": "10.2.0.0/24"}],
        [{"subnet": "fd00::/64"}],
    ]


def test_the_network_configuration_is_put_there_by_rename_and_for_root_only(tmp_path: Path) -> None:
    folder = tmp_path / "net.d"
    content = conflist.conflist(("10.244.1.0/24",), 1450, "pynet0", tmp_path)
    assert conflist.write(folder, content)
    path = folder / conflist.NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == content
    first = path.stat().st_ino
    assert not conflist.write(folder, content), "the same is not written again"
    assert path.stat().st_ino == first
    assert conflist.write(folder, {**content, "name": "other"})
    assert path.stat().st_ino != first, "written in place: a runtime would not see it"
    path.chmod(0o644)
    assert conflist.write(folder, {**content, "name": "other"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == [conflist.NAME]
    assert conflist.remove(folder) and not conflist.remove(folder)


def test_configurations_that_a_runtime_takes_first_are_found(tmp_path: Path) -> None:
    for name in ("05-other.conf", "10-flannel.conflist", "99-loopback.conf", "00-notes.txt"):
        (tmp_path / name).write_text("{}")
    assert conflist.preferred_over_ours(tmp_path) == ["05-other.conf", "10-flannel.conflist"]


CLOSED = [
    # FORWARD's rules → where a jump has to stand: 0 at the end, a number: before that rule, None: nowhere
    (["-P FORWARD ACCEPT"], None),
    (["-P FORWARD DROP"], 0),
    (["-P FORWARD DROP", "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-FORWARD"], 0),
    (["-P FORWARD ACCEPT", "-A FORWARD -i a -j ACCEPT", "-A FORWARD -j REJECT --reject-with icmp-host-prohibited"], 2),
    (["-P FORWARD ACCEPT", '-A FORWARD -m comment --comment "the rest" -j DROP'], 1),
    (["-P FORWARD ACCEPT", "-A FORWARD -i eth1 -j DROP"], None),
    ([], None),
]


@pytest.mark.parametrize(("rules", "at"), CLOSED)
def test_a_closed_forward_chain_is_known(rules: list[str], at: int | None) -> None:
    assert acceptance.position(rules) == at


def test_what_passes_is_what_pods_send_and_get() -> None:
    assert acceptance.accepting(("10.244.0.0/16", "fd00::/16"), 4) == [
        "-A PYNET-PODS -s 10.244.0.0/16 -j ACCEPT",
        "-A PYNET-PODS -d 10.244.0.0/16 -j ACCEPT",
    ]


def status() -> Status:
    return Status(
        node=NodeFile("own", ("10.244.1.0/24",), 1450, "pynet0", (Underlay("192.168.1.1", "eth0", 1500),)),
        pid=7,
        backend="auto",
        masquerade="nftables",
        peers=(
            Peer("near", "192.168.1.2", "10.244.2.0/24", "direct", "eth0", "192.168.1.2", 1500, "it is on link"),
            Peer("gone", "", "10.244.3.0/24", "none", "", "", 0, "the Node has no address"),
        ),
        problems=(Problem("Node x", "spec.podCIDRs: nonsense"),),
        routes_wanted=3,
        routes_present=2,
    )


def test_the_status_says_who_is_reached_how_and_why() -> None:
    text = render(status(), alive=False)
    assert "NOT RUNNING" in text
    assert "2 of 3 present (proto 112)" in text
    assert "near  192.168.1.2  10.244.2.0/24  direct  192.168.1.2  eth0  1500  it is on link" in text
    assert "gone  -            10.244.3.0/24  none    -            -     -     the Node has no address" in text
    assert "Node x: spec.podCIDRs: nonsense" in text
    assert "running, pid 7" in render(status(), alive=True)


def test_the_status_survives_the_file(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    Writer(tmp_path).write(status())
    assert load(tmp_path) == status()
    assert json.loads((tmp_path / "node.json").read_text())["podCIDRs"] == ["10.244.1.0/24"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1m30s", 90), ("500ms", 0.5), ("2h", 7200), ("1.5s", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert main._duration(text) == seconds


FLAGS = [
    (["--vxlan-vni", "0"], "--vxlan-vni"),
    (["--vxlan-vni", "16777216"], "--vxlan-vni"),
    (["--vxlan-port", "65536"], "--vxlan-port"),
    (["--cluster-cidr", "10.244.0.1/16"], "has host bits set"),
    (["--resync-period", "soon"], "is no duration"),
    (["--resync-period", "0"], "above zero"),
    (["--backend", "ipip"], "invalid choice"),
    (["--allocate-node-cidrs"], "needs --cluster-cidr"),
    (["--allocate-node-cidrs", "--cluster-cidr", "10.0.0.0/16", "--node-cidr-mask-size", "12"], "mask-size 12"),
    (
        ["--allocate-node-cidrs", "--cluster-cidr", "10.0.0.0/16,fd00::/48", "--node-cidr-mask-size", "24"],
        "for one family",
    ),
]


@pytest.mark.parametrize(("flags", "said"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_bad_flags_are_refused_by_name(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main._serve(["--manifests", str(tmp_path), "--state-dir", str(tmp_path), *flags])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_source_the_way_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main._serve(["--state-dir", str(tmp_path)])
    assert "--manifests DIR or --kubeconfig FILE" in capsys.readouterr().err
