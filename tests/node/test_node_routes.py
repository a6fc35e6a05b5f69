"""One node's routes on a real kernel, as Nodes, links, addresses and other hands change them."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from support.nodes import Machine, write
from support.peers import events_of, near, peer, ways_are
from support.waiting import until

pytestmark = pytest.mark.root


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
    (eth0,) = json.loads(own.ip_command("-j", "link", "show", "eth0"))
    assert "what='route'" in own.log.read_text()
    assert not re.search(rf"what='neighbour', gone=\w+, index={eth0['ifindex']}\b", own.log.read_text())


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


def test_a_foreign_route_appended_to_ours_stays_and_is_told(own: Machine) -> None:
    """IPv6 shows both as one route of two next hops, with our protocol number."""
    near(own, 2)
    own.start("--resync-period=1h")
    foreign = ["fd00:244:2::/64", "via", "fd01:1::88"]
    own.ip_command("-6", "route", "append", *foreign)
    until("told", lambda: "in the way: fd00:244:2::/64 via fd01:1::88" in own.problems())
    assert own.ip_command("-6", "route", "show", "fd00:244:2::/64").startswith(
        "fd00:244:2::/64 via fd01:1::88 dev eth0"
    )
    own.ip_command("-6", "route", "del", *foreign)
    ways_are(own, {"fd00:244:2::/64": "fd01:1::2 eth0"}, 6)
    own.ip_command("-6", "route", "append", *foreign, "proto", "112")
    until("what says that it is ours goes", lambda: "fd01:1::88" not in own.ip_command("-6", "route"))
    ways_are(own, {"fd00:244:2::/64": "fd01:1::2 eth0"}, 6)


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
