"""The VXLAN device and its entries on a real kernel, as flags and other hands change them."""

from __future__ import annotations

import json

import pytest

from support.nodes import Machine
from support.peers import far, near, overlay_of
from support.waiting import until

pytestmark = pytest.mark.root


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


def test_a_device_that_learns_or_is_a_port_of_a_bridge_is_put_right(own: Machine) -> None:
    far(own, 3)
    settings = ["id", "112", "dstport", "4789", "local", "192.168.1.1", "learning", "remote", "192.168.2.250"]
    own.ip_command("link", "add", "pynet-vx4", "type", "vxlan", *settings)
    own.ip_command("link", "add", "br9", "type", "bridge")
    own.start("--resync-period=1h")
    assert overlay_of(own) == FAR_3

    def shown() -> str:
        return own.ip_command("-d", "link", "show", "pynet-vx4")

    assert "nolearning" in shown() and "192.168.2.250" not in shown()
    own.ip_command("link", "set", "pynet-vx4", "master", "br9")
    until("its own again", lambda: "master" not in shown())
    own.ip_command("link", "set", "pynet-vx4", "down")
    until("up again, with its routes", lambda: overlay_of(own) == FAR_3)


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
