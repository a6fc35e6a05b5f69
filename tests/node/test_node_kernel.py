"""One node's agent on a real kernel: routes, devices and files as Nodes and other hands change them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import Server
from pynet.kernel import netns as netns_of
from support.netns import Names, Namespace, programs
from support.nodes import Cluster, Machine, until, write

pytestmark = pytest.mark.root


@pytest.fixture
def own(netns: Names, tmp_path: Path) -> Iterator[Machine]:
    """The node n1, beside a router; its agent is not started yet."""
    (machine,) = Cluster(netns, tmp_path, 1).nodes
    machine.publish()
    yield machine
    if machine.agent is not None:
        machine.stop()


def peer(own: Machine, name: str, *, cidrs: list[str], ips: list[str]) -> None:
    """Publish another Node."""
    write(own.manifests / f"{name}.yaml", yaml.safe_dump(own.manifest(name=name, cidrs=cidrs, ips=ips)))


def near(own: Machine, number: int, name: str = "") -> None:
    cidrs = [f"10.244.{number}.0/24", f"fd00:244:{number}::/64"]
    peer(own, name or f"n{number}", cidrs=cidrs, ips=[f"192.168.1.{number}", f"fd01:1::{number}"])


def ways_are(own: Machine, expected: dict[str, str], family: int = 4) -> None:
    until(f"ways {expected} (now {own.ways(family)})", lambda: own.ways(family) == expected)


def events_of(own: Machine) -> Callable[[], str]:
    """Watch the namespace's routes from here on; the function returns what happened to them until now."""
    log = own.state.with_name("events")
    with log.open("w") as file:
        own.space.start("ip", "-N", "monitor", "route", stdout=file)
    numbers = itertools.count(1)

    def marked() -> bool:
        number = next(numbers)
        own.ip_command("route", "add", "blackhole", f"198.51.100.{number}/32")
        # the first ones may go by before the monitor listens
        return f"198.51.100.{number}" in log.read_text() or f"198.51.100.{number - 1} " in log.read_text()

    def happened() -> str:
        until("the monitor sees", marked)
        return "".join(line for line in log.read_text().splitlines(True) if " proto 112 " in line)

    happened()
    return happened


def test_routes_follow_the_nodes(own: Machine) -> None:
    near(own, 2)
    own.start()
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
    assert own.ways(6) == {"fd00:244:2::/64": "fd01:1::2 eth0"}
    assert own.routes()["10.244.2.0/24"]["prefsrc"] == "192.168.1.1"
    assert own.routes()["10.244.0.0/16"]["type"] == "unreachable"
    assert own.routes(6)["fd00:244::/32"]["type"] == "unreachable"
    near(own, 3)
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0", "10.244.3.0/24": "192.168.1.3 eth0"})
    (own.manifests / "n2.yaml").unlink()
    ways_are(own, {"10.244.3.0/24": "192.168.1.3 eth0"})
    ways_are(own, {"fd00:244:3::/64": "fd01:1::3 eth0"}, 6)


def test_a_node_that_changes_its_cidr_or_its_address_is_followed(own: Machine) -> None:
    near(own, 2)
    own.start()
    peer(own, "n2", cidrs=["10.244.7.0/24"], ips=["192.168.1.2"])
    ways_are(own, {"10.244.7.0/24": "192.168.1.2 eth0"})
    assert own.ways(6) == {}
    peer(own, "n2", cidrs=["10.244.7.0/24"], ips=["192.168.1.77"])
    ways_are(own, {"10.244.7.0/24": "192.168.1.77 eth0"})
    peer(own, "n2", cidrs=["10.244.7.0/24"], ips=["192.168.9.2"])
    until("VXLAN", lambda: own.peers() == {"10.244.7.0/24": "vxlan"})
    peer(own, "n2", cidrs=["10.244.7.0/24"], ips=["192.168.1.2"])
    ways_are(own, {"10.244.7.0/24": "192.168.1.2 eth0"})
    until("no entry left", lambda: "192.168.9.2" not in own.space.run("bridge", "fdb", "show", "dev", "pynet-vx4"))
    assert "10.244.7.0" not in own.ip_command("neighbour", "show", "dev", "pynet-vx4")


def test_a_renamed_node_s_route_is_never_missing(own: Machine) -> None:
    near(own, 2)
    own.start()
    happened = events_of(own)
    write(
        own.manifests / "n2.yaml",
        yaml.safe_dump(own.manifest(name="other", cidrs=["10.244.2.0/24"], ips=["192.168.1.2"])),
    )
    until("renamed", lambda: "other" in [each["node"] for each in own.status()["peers"]])
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
    assert "10.244.2.0/24" not in happened()


def test_what_a_crashed_run_left_is_mended_at_start(own: Machine) -> None:
    near(own, 2)
    near(own, 3)
    stale = [
        ["10.244.2.0/24", "via", "192.168.1.99"],  # of a node that has another address by now
        ["10.244.50.0/24", "via", "192.168.1.50"],  # of a node that is gone
        ["192.0.2.0/24", "via", "192.168.1.50"],  # of a pod CIDR of another time
        ["unreachable", "10.99.0.0/16", "metric", "4096"],  # of another cluster CIDR
    ]
    for words in stale:
        own.ip_command("route", "add", *words, "proto", "112")
    own.ip_command("route", "add", "10.244.60.0/24", "via", "192.168.1.60", "proto", "static")
    own.ip_command("link", "add", "pynet-vx6", "type", "vxlan", "id", "9", "dstport", "4789", "local", "fd01:1::1")
    own.start()
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0", "10.244.3.0/24": "192.168.1.3 eth0"}
    assert set(own.routes()) == {"10.244.2.0/24", "10.244.3.0/24", "10.244.0.0/16"}
    assert "10.244.60.0/24" in own.routes(protocol="static"), "a foreign route was removed"
    until("the stale device is gone", lambda: "pynet-vx6" not in own.ip_command("link"))


def test_a_deleted_or_changed_route_is_put_right(own: Machine) -> None:
    near(own, 2)
    own.start("--resync-period=1h")
    own.ip_command("route", "del", "10.244.2.0/24")
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})
    own.ip_command("-6", "route", "del", "fd00:244:2::/64")
    ways_are(own, {"fd00:244:2::/64": "fd01:1::2 eth0"}, 6)
    own.ip_command("route", "replace", "10.244.2.0/24", "via", "192.168.1.66", "proto", "112")
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})
    own.ip_command("route", "add", "10.244.200.0/24", "via", "192.168.1.66", "proto", "112")
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})
    own.ip_command("route", "del", "unreachable", "10.244.0.0/16")
    until("the unreachable route", lambda: "10.244.0.0/16" in own.routes())
    until("counted", lambda: own.metric("pynetd_routes_repaired_total") >= 5)


def test_the_underlay_s_neighbours_are_none_of_our_business(own: Machine) -> None:
    """They change all the time on a busy node: each change would be a look at everything."""
    near(own, 2)
    own.start("--resync-period=1h", "--log-level=debug")
    for number in range(5):
        words = ["192.168.1.2", "lladdr", f"02:00:00:00:00:0{number}", "dev", "eth0", "nud", "reachable"]
        own.ip_command("neighbour", "replace", *words)
    own.ip_command("route", "del", "10.244.2.0/24")
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})
    assert "what='route'" in own.log.read_text()
    assert "what='neighbour'" not in own.log.read_text()


def test_a_foreign_route_in_the_way_stays_and_is_told(own: Machine) -> None:
    near(own, 2)
    foreign = ["10.244.2.0/24", "via", "192.168.1.200", "proto", "static"]
    own.ip_command("route", "add", *foreign)
    own.start()
    assert own.routes(protocol="static")["10.244.2.0/24"]["gateway"] == "192.168.1.200"
    assert "10.244.2.0/24" not in own.routes()
    assert "route 10.244.2.0/24: a foreign route is in the way: 10.244.2.0/24 via 192.168.1.200" in own.problems()
    assert own.metric("pynetd_foreign_routes") == 1
    assert own.log.read_text().count("a foreign route is in the way") == 1, "told once"
    own.ip_command("route", "del", *foreign)
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})
    own.ip_command("route", "add", "10.244.2.128/25", "via", "192.168.1.200")
    until("a part", lambda: "takes a part of 10.244.2.0/24 of Node n2" in own.problems())
    assert own.peers()["10.244.2.0/24"] == "direct"


def test_a_link_that_fails_and_heals(own: Machine) -> None:
    """The kernel takes the routes of a link that goes down, and tells nobody of it."""
    near(own, 2)
    own.start("--resync-period=1h")
    own.ip_command("link", "set", "eth0", "down")
    until("nothing leads there", lambda: own.peers().get("10.244.2.0/24") == "none")
    assert own.ways() == {}
    assert "10.244.0.0/16" in own.routes(), "pods' packets wander"
    own.ip_command("link", "set", "eth0", "up")
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})


def test_this_node_s_own_new_address_is_followed(own: Machine) -> None:
    near(own, 2)
    own.space.run("sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1")
    own.start()
    own.ip_command("address", "add", "192.168.1.101/24", "dev", "eth0")
    own.publish(ips=["192.168.1.101", own.ip6])
    until("new source", lambda: own.routes()["10.244.2.0/24"].get("prefsrc") == "192.168.1.101")
    own.ip_command("address", "del", "192.168.1.1/24", "dev", "eth0")
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0"})


def far(own: Machine, number: int) -> None:
    cidrs = [f"10.244.{number}.0/24", f"fd00:244:{number}::/64"]
    peer(own, f"n{number}", cidrs=cidrs, ips=[f"192.168.2.{number}", f"fd01:2::{number}"])


def overlay_of(own: Machine) -> tuple[set[str], set[str], dict[str, str]]:
    """Return forwarding entries, neighbours, and routes of the VXLAN device."""
    fdb = json.loads(own.space.run("bridge", "-j", "fdb", "show", "dev", "pynet-vx4"))
    neighbours = json.loads(own.ip_command("-j", "neighbour", "show", "dev", "pynet-vx4", "nud", "permanent"))
    return (
        {f"{entry['mac']} {entry['dst']}" for entry in fdb if "dst" in entry},
        {f"{entry['dst']} {entry['lladdr']}" for entry in neighbours},
        {dst: way for dst, way in {**own.ways(), **own.ways(6)}.items() if way.endswith("pynet-vx4")},
    )


FAR_3 = (
    {"02:70:c0:a8:02:03 192.168.2.3"},
    {"10.244.3.0 02:70:c0:a8:02:03", "fe80::70:c0ff:fea8:203 02:70:c0:a8:02:03"},
    {"10.244.3.0/24": "10.244.3.0 pynet-vx4", "fd00:244:3::/64": "fe80::70:c0ff:fea8:203 pynet-vx4"},
)


def test_the_overlay_has_one_entry_a_peer_and_is_put_right(own: Machine) -> None:
    far(own, 3)
    own.start("--resync-period=1h", "--vxlan-vni=77", "--vxlan-port=8472")
    assert overlay_of(own) == FAR_3
    (device,) = json.loads(own.ip_command("-j", "-d", "link", "show", "pynet-vx4"))
    data = device["linkinfo"]["info_data"]
    assert (data["id"], data["port"], data["local"], data["learning"]) == (77, 8472, "192.168.1.1", False)
    assert (device["mtu"], device["address"]) == (1450, "02:70:c0:a8:01:01")
    assert own.routes()["10.244.3.0/24"]["metrics"] == [{"mtu": 1450, "advmss": 1410}]

    own.space.run("bridge", "fdb", "del", "02:70:c0:a8:02:03", "dev", "pynet-vx4", "dst", "192.168.2.3")
    until("entry back", lambda: overlay_of(own) == FAR_3)
    own.ip_command("neighbour", "del", "10.244.3.0", "dev", "pynet-vx4")
    until("neighbour back", lambda: overlay_of(own) == FAR_3)
    own.space.run("bridge", "fdb", "append", "02:70:00:00:00:99", "dev", "pynet-vx4", "dst", "192.168.2.99")
    until("stale entry gone", lambda: overlay_of(own) == FAR_3)
    own.ip_command("link", "del", "pynet-vx4")
    until("device back", lambda: "pynet-vx4" in own.ip_command("link") and overlay_of(own) == FAR_3)
    own.ip_command("link", "set", "pynet-vx4", "mtu", "1400")
    until("MTU back", lambda: "mtu 1450" in own.ip_command("link", "show", "pynet-vx4"))
    (own.manifests / "n3.yaml").unlink()
    until("nothing left", lambda: overlay_of(own) == (set(), set(), {}))


def test_other_flags_make_the_device_anew(own: Machine) -> None:
    far(own, 3)
    own.start("--vxlan-vni=77")
    own.stop()
    assert overlay_of(own) == FAR_3, "the way is there while the agent is not"
    own.start("--vxlan-vni=78")
    (device,) = json.loads(own.ip_command("-j", "-d", "link", "show", "pynet-vx4"))
    assert device["linkinfo"]["info_data"]["id"] == 78
    assert overlay_of(own) == FAR_3
    own.stop()
    own.start("--backend=host-gw")
    until("device gone", lambda: "pynet-vx4" not in own.ip_command("link"))
    assert own.ways() == {}
    assert own.peers()["10.244.3.0/24"] == "none"


def test_a_link_of_somebody_else_s_with_our_device_s_name_is_left_alone(own: Machine) -> None:
    far(own, 3)
    near(own, 2)
    own.ip_command("link", "add", "pynet-vx4", "type", "bridge")
    own.start()
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
    assert "bridge" in own.ip_command("-d", "link", "show", "pynet-vx4")
    assert "a foreign link has the name" in json.dumps(own.status())


def test_with_ipv6_switched_off_ipv4_goes_on(own: Machine) -> None:
    own.space.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
    near(own, 2)
    far(own, 3)
    own.start(ready=False)
    until("IPv4", lambda: set(own.ways()) == {"10.244.2.0/24", "10.244.3.0/24"})
    until("ready", lambda: own.get("/readyz")[0] == 200)
    assert "no IPv6" in own.problems() or "fd00:244" in json.dumps(own.status()["peers"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_changes_nothing(own: Machine, number: int) -> None:
    near(own, 2)
    far(own, 3)
    own.start()
    before = (own.routes(), own.routes(6), overlay_of(own), own.space.run("nft", "list", "table", "inet", "pynet-node"))
    happened = events_of(own)
    own.stop(number)
    own.start()
    assert "proto 112" not in happened()
    after = (own.routes(), own.routes(6), overlay_of(own), own.space.run("nft", "list", "table", "inet", "pynet-node"))
    assert after == before
    assert own.metric('pynetd_route_changes_total{verb="added"}') == 0


def test_cleanup_leaves_what_was_there_before(own: Machine) -> None:
    near(own, 2)
    far(own, 3)
    own.ip_command("route", "add", "10.244.60.0/24", "via", "192.168.1.60", "proto", "static")
    own.space.run("iptables", "-P", "FORWARD", "DROP")

    def seen() -> tuple[str, ...]:
        return (
            own.space.run("ip", "-N", "route"),
            own.space.run("ip", "-N", "-6", "route"),
            own.space.run("ip", "-j", "link"),
            own.space.run("nft", "list", "ruleset"),
            own.space.run("ipset", "save"),
        )

    before = seen()
    own.start()
    busy = own.space.run(
        str(programs() / "pynetd"), "--cleanup", f"--state-dir={own.state}", f"--cni-conf-dir={own.conf}", check=False
    )  # fmt: skip
    assert busy == "" and own.ways(), "cleaned up under a running agent"
    own.stop()
    own.space.run(str(programs() / "pynetd"), "--cleanup", f"--state-dir={own.state}", f"--cni-conf-dir={own.conf}")
    assert seen() == before
    assert list(own.conf.iterdir()) == []
    assert sorted(entry.name for entry in own.state.iterdir()) == ["net.d"]


def test_a_broken_manifest_takes_no_route(own: Machine) -> None:
    near(own, 2)
    own.start()
    write(own.manifests / "n2.yaml", "kind: Node\nmetadata: {na")
    near(own, 3)
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0", "10.244.3.0/24": "192.168.1.3 eth0"})


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


def test_health_before_and_after_the_first_reconcile(own: Machine) -> None:
    hidden = own.manifests.rename(own.manifests.with_name("hidden"))
    own.start(ready=False)
    until("alive", lambda: own.get("/healthz")[0] == 200)
    assert own.get("/readyz")[0] == 503
    hidden.rename(own.manifests)
    until("ready", lambda: own.get("/readyz")[0] == 200)
    assert own.get("/metrics")[0] == 200
    assert own.metric('pynetd_routes_wanted{family="4"}') == 1
    assert own.metric('pynetd_routes_present{family="4"}') == 1
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="free"}') == 253


def test_until_the_source_has_spoken_nothing_is_removed(own: Machine) -> None:
    own.ip_command("route", "add", "10.244.2.0/24", "via", "192.168.1.2", "proto", "112")
    hidden = own.manifests.rename(own.manifests.with_name("hidden"))
    own.start(ready=False)
    until("alive", lambda: own.get("/healthz")[0] == 200)
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
    hidden.rename(own.manifests)
    ways_are(own, {})


def test_nodes_of_an_api_server(own: Machine, tmp_path: Path) -> None:
    space = netns_of.open_path(own.space.path)
    with netns_of.inside(space):
        server = Server()
    os.close(space)
    try:
        server.put(own.manifest(), own.manifest(name="n2", cidrs=["10.244.2.0/24"], ips=["192.168.1.2"]))
        (tmp_path / "kubeconfig").write_text(server.kubeconfig())
        own.start(source=f"--kubeconfig={tmp_path / 'kubeconfig'}")
        assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
        server.put(own.manifest(name="n2", cidrs=["10.244.2.0/24"], ips=["192.168.1.3"]))
        ways_are(own, {"10.244.2.0/24": "192.168.1.3 eth0"})
        server.drop_connections()
        server.delete(own.manifest(name="n2"))
        ways_are(own, {})
    finally:
        server.stop()


def test_status_prints_peers_and_reasons(own: Machine) -> None:
    near(own, 2)
    far(own, 3)
    own.start()
    command = [str(programs() / "pynetd"), "status", f"--state-dir={own.state}"]
    text = own.space.run(*command)
    assert "running, pid" in text
    assert "192.168.1.2 is on link: eth0 has 192.168.1.0/24" in text
    assert "192.168.2.3 is behind 192.168.1.254" in text
    found: dict[str, Any] = json.loads(own.space.run(*command, "--output=json"))
    assert {each["cidr"]: each["how"] for each in found["peers"]}["10.244.3.0/24"] == "vxlan"
    own.stop(signal.SIGKILL)
    assert "NOT RUNNING" in own.space.run(*command)
    missing = subprocess.run(
        [str(programs() / "pynetd"), "status", "--state-dir=/nonexistent"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert "no agent has reconciled with that --state-dir" in missing.stderr


def test_a_second_agent_of_one_state_directory_is_refused(own: Machine) -> None:
    own.start()
    first = own.agent
    own.start(ready=False)
    second, own.agent = own.agent, first
    assert second is not None
    assert second.wait(30) == 1
    assert "another pynetd serves this state directory" in own.log.read_text()


class Executable:
    """The installed executable, called as a runtime does with what the agent configured."""

    def __init__(self, own: Machine, folder: Path) -> None:
        own.space.run(str(programs() / "pynetd"), "install", f"--cni-bin-dir={folder}")
        conf = json.loads((own.conf / "10-pynet.conflist").read_text())
        self._config = {"cniVersion": "1.0.0", "name": conf["name"], **conf["plugins"][0]}
        self._own, self._folder = own, folder

    def __call__(self, verb: str, container: str, pod: Namespace, **more: Any) -> str:
        variables = {
            "CNI_COMMAND": verb, "CNI_CONTAINERID": container, "CNI_NETNS": pod.path, "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self._folder),
        }  # fmt: skip
        words = [f"{key}={value}" for key, value in variables.items()]
        given = json.dumps({**self._config, **more})
        return self._own.space.run("env", *words, str(self._folder / "pynet-cni"), input=given)


def test_the_executable_is_served_and_counted(own: Machine, netns: Names, tmp_path: Path) -> None:
    own.start()
    folder = tmp_path / "bin"
    call = Executable(own, folder)
    assert sorted(entry.name for entry in folder.iterdir()) == ["pynet-cni", "pynet-ipam"]
    assert (folder / "pynet-cni").stat().st_mode & 0o777 == 0o755
    pod = netns("pod")
    result = json.loads(call("ADD", "c1", pod))
    assert result["ips"][0]["address"].startswith("10.244.1.")
    assert own.metric('pynetd_cni_requests_total{code="0",verb="ADD"}') == 1
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 1
    rules = own.space.run("nft", "list", "ruleset")
    assert rules.count("masquerade") == 2, f"the executable masquerades beside the agent:\n{rules}"
    call("CHECK", "c1", pod, prevResult=result)
    own.stop(signal.SIGKILL)
    own.start()
    call("CHECK", "c1", pod, prevResult=result)
    call("DEL", "c1", pod, prevResult=result)
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 0


def test_pods_come_up_while_the_agent_is_killed_and_started(own: Machine, netns: Names, tmp_path: Path) -> None:
    own.start()
    call = Executable(own, tmp_path / "bin")
    pods = [netns(f"pod{number}") for number in range(10)]
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call, "ADD", f"c{number}", pod) for number, pod in enumerate(pods)]
        for number in (signal.SIGKILL, signal.SIGTERM):
            own.stop(number)
            own.start()
        results = [json.loads(each.result()) for each in calls]
    addresses = {ip["address"] for result in results for ip in result["ips"]}
    assert len(addresses) == 20, "an address of each family for each pod"
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 10
    for number, (pod, result) in enumerate(zip(pods, results, strict=True)):
        assert "bytes from" in own.space.run("ping", "-c1", "-W3", result["ips"][0]["address"].partition("/")[0])
        call("DEL", f"c{number}", pod, prevResult=result)
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 0
