"""What pynetd wrote, as pyroute2 reads it, which shares no code with ours: routes, VXLAN devices, and their entries."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import witness
from support.netns import Names
from support.nodes import Cluster, Machine, write
from support.waiting import until

pytestmark = pytest.mark.root

PROTOCOL = 112  # pynetd's mark on its routes
UNICAST, UNREACHABLE = 1, 7


def node(own: Machine, number: int, subnet: int) -> dict[str, Any]:
    """Return the manifest of another node, which needs no machine: nobody asks it."""
    cidrs = [f"10.244.{number}.0/24", f"fd00:244:{number}::/64"]
    return own.manifest(name=f"n{number}", cidrs=cidrs, ips=[f"192.168.{subnet}.{number}", f"fd01:{subnet}::{number}"])


def publish(own: Machine, *manifests: dict[str, Any]) -> None:
    for manifest in manifests:
        write(own.manifests / f"{manifest['metadata']['name']}.yaml", yaml.safe_dump(manifest))


def ours(seen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the routes that carry our protocol number, by destination."""
    return {route["dst"]: route for route in seen["routes"] if route["protocol"] == PROTOCOL}


def picked(route: dict[str, Any], *keys: str) -> tuple[Any, ...]:
    return tuple(route.get(key) for key in keys)


def link_local(tail: str) -> str:
    """Return the address that a device with the MAC `02:70:` + `tail` gives itself (RFC 4291, appendix A)."""
    one, two, three, four = tail.split(":")
    return str(ipaddress.IPv6Address(f"fe80::70:{one}ff:fe{two}:{three}{four}"))


def entries(mac: str, machine: str, next_hop: str) -> list[witness.Table]:
    """Return what one peer has on our device: next hop → its device's MAC → its machine's address."""
    six = link_local(mac.removeprefix("02:70:"))
    return [
        [{"dev": "pynet-vx4", "mac": mac, "dst": machine}],
        [{"dev": "pynet-vx4", "dst": via, "mac": mac} for via in (next_hop, six)],
    ]


def test_direct_and_vxlan_as_pyroute2_reads_them(netns: Names, tmp_path: Path) -> None:
    (own,) = Cluster(netns, tmp_path, 1).nodes
    publish(own, own.manifest(), node(own, 2, 1), node(own, 3, 2))
    before = witness.network(own.space)
    assert ours(before) == {}
    own.start()

    seen = witness.network(own.space)
    routes = ours(seen)
    assert {dst: picked(route, "type", "via", "dev", "onlink") for dst, route in routes.items()} == {
        "10.244.2.0/24": (UNICAST, "192.168.1.2", "eth0", False),
        "fd00:244:2::/64": (UNICAST, "fd01:1::2", "eth0", False),
        "10.244.3.0/24": (UNICAST, "10.244.3.0", "pynet-vx4", True),
        "fd00:244:3::/64": (UNICAST, link_local("c0:a8:02:03"), "pynet-vx4", False),
        "10.244.0.0/16": (UNREACHABLE, None, None, False),
        "fd00:244::/32": (UNREACHABLE, None, "lo", False),
    }
    assert routes["10.244.2.0/24"]["source"] == own.ip
    foreign = [route for route in seen["routes"] if route["protocol"] != PROTOCOL]
    assert [route for route in foreign if route["dev"] != "pynet-vx4"] == before["routes"]

    devices = {name: link for name, link in seen["links"].items() if link["kind"] == "vxlan"}
    assert devices == {
        "pynet-vx4": {
            "mac": "02:70:c0:a8:01:01",  # says the node's own address, as the peer's say theirs
            "mtu": 1450,
            "up": True,
            "kind": "vxlan",
            "master": None,
            "vxlan": {"id": 112, "local": own.ip, "local6": None, "port": 4789, "learning": 0},
        }
    }
    assert [seen["forwarding"], seen["neighbours"]] == entries("02:70:c0:a8:02:03", "192.168.2.3", "10.244.3.0")

    publish(own, node(own, 2, 2))
    (own.manifests / "n3.yaml").unlink()
    until("n2 by VXLAN, n3 gone", lambda: own.peers() == {"10.244.2.0/24": "vxlan", "fd00:244:2::/64": "vxlan"})
    seen = witness.network(own.space)
    routes = ours(seen)
    assert picked(routes["10.244.2.0/24"], "via", "dev", "onlink") == ("10.244.2.0", "pynet-vx4", True)
    assert routes.keys() == {"10.244.2.0/24", "fd00:244:2::/64", "10.244.0.0/16", "fd00:244::/32"}
    assert [seen["forwarding"], seen["neighbours"]] == entries("02:70:c0:a8:02:02", "192.168.2.2", "10.244.2.0")
    own.stop()
