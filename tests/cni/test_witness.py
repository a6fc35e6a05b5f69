"""What an ADD's result names is what pyroute2, which shares no code with ours, sees in pod and host; after DEL none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import witness
from support.cni import Pod, Runtime
from support.netns import Names

pytestmark = pytest.mark.root

FOUR, SIX = {"subnet": "10.9.0.0/24"}, {"subnet": "fd00:9::/64"}
UNICAST = 1


def way(dst: str, via: str | None = None, *, source: str | None = None, dev: str = "eth0") -> dict[str, Any]:
    """Return what is compared of a route."""
    return {"dst": dst, "via": via, "source": source, "dev": dev, "type": UNICAST}


def ways(routes: witness.Table) -> list[dict[str, Any]]:
    return [{key: route.get(key) for key in ("dst", "via", "source", "dev", "type")} for route in routes]


@pytest.mark.parametrize("ranges", [[[FOUR]], [[FOUR], [SIX]]], ids=["ipv4", "dual-stack"])
def test_pod_and_host_have_what_the_result_names_and_no_more(netns: Names, tmp_path: Path, ranges: Any) -> None:
    runtime = Runtime(netns("host"), tmp_path / "state")
    pod = Pod(runtime, netns("pod"))
    untouched = witness.network(pod.ns)
    ipam = {"type": "pynet-ipam", "ranges": ranges, "routes": [{"dst": "192.0.2.0/24"}]}
    result = pod.add(runtime.conf(isDefaultGateway=True, hairpinMode=True, mtu=1380, ipam=ipam))
    bridge, outer, inner = result["interfaces"]
    addresses = [each["address"] for each in result["ips"]]
    gateways = [each["gateway"] for each in result["ips"]]

    inside, host = witness.network(pod.ns), witness.network(runtime.host)
    assert inside["links"] == {
        inner["name"]: {"mac": inner["mac"], "mtu": 1380, "up": True, "kind": "veth", "master": None}
    }
    assert inside["addresses"] == sorted(f"eth0 {address}" for address in addresses)
    named = [way("default" if each["dst"] in ("0.0.0.0/0", "::/0") else each["dst"], each.get("gw", gateways[0]))
             for each in result["routes"]]  # fmt: skip
    connected = [way("10.9.0.0/24", source="10.9.0.2"), way("fd00:9::/64")][: len(addresses)]
    assert sorted(map(str, ways(inside["routes"]))) == sorted(map(str, connected + named))
    assert len(named) == len(addresses) + 1

    link = {"up": True, "mtu": 1380}
    assert host["links"] == {
        bridge["name"]: link | {"mac": bridge["mac"], "kind": "bridge", "master": None},
        outer["name"]: link | {"mac": outer["mac"], "kind": "veth", "master": "cni0", "hairpin": True},
    }
    lengths = ["24", "64"]
    assert host["addresses"] == [f"cni0 {gateway}/{length}" for gateway, length in zip(gateways, lengths, strict=False)]
    reached = [way("10.9.0.0/24", source="10.9.0.1", dev="cni0"), way("fd00:9::/64", dev="cni0")][: len(addresses)]
    assert ways(host["routes"]) == reached

    pod.delete()
    assert witness.network(pod.ns) == untouched
    after = witness.network(runtime.host)
    assert after["links"].keys() == {bridge["name"]}
    assert after["addresses"] == host["addresses"], "the bridge is the node's, and keeps its addresses"
    assert after["neighbours"] == after["forwarding"] == []


def test_the_witness_sees_what_is_not_so(netns: Names, tmp_path: Path) -> None:
    """A port without hairpin, a link that is down, an address that is not ours: each changes what the witness says."""
    runtime = Runtime(netns("host"), tmp_path / "state")
    pod = Pod(runtime, netns("pod"))
    result = pod.add(runtime.conf(hairpinMode=False, ipam={"type": "pynet-ipam", "ranges": [[FOUR]]}))
    outer = result["interfaces"][1]["name"]
    assert witness.network(runtime.host)["links"][outer]["hairpin"] is False
    pod.ns.run("ip", "address", "add", "198.51.100.9/32", "dev", "eth0")
    pod.ns.run("ip", "link", "set", "eth0", "mtu", "1300")
    seen = witness.network(pod.ns)
    assert seen["addresses"] == ["eth0 10.9.0.2/24", "eth0 198.51.100.9/32"]
    assert seen["links"]["eth0"]["mtu"] == 1300
