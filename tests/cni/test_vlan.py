"""VLANs of bridge ports, in whatever kernel filters them: the virtual machine's, where this one does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cni import netconf, vlan
from support.cni import CniFailure, Pod, Runtime, addresses, links
from support.netns import Names


def conf(**keys: Any) -> netconf.NetConf:
    return netconf.parse({"name": "net"} | keys, {}, "1.1.0")


@pytest.mark.parametrize(
    ("keys", "members"),
    [
        ({"vlan": 100}, {100: True}),
        ({"vlan": 100, "preserveDefaultVlan": True}, {100: True, 1: False}),
        (
            {"vlanTrunk": [{"id": 101}, {"minID": 200, "maxID": 202}]},
            {1: True, 101: False, 200: False, 201: False, 202: False},
        ),
        ({"vlan": 100, "vlanTrunk": [{"id": 101}]}, {100: True, 101: False}),
    ],
)
def test_a_ports_vlans(keys: dict[str, Any], members: dict[int, bool]) -> None:
    assert vlan.membership(conf(**keys)) == members


def shown(runtime: Runtime, port: str) -> dict[int, list[str]]:
    found = json.loads(runtime.host.run("bridge", "-j", "vlan", "show", "dev", port))
    return {entry["vlan"]: entry.get("flags", []) for entry in found[0]["vlans"]}


NATIVE = ["PVID", "Egress Untagged"]
V4 = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]}


@pytest.mark.vm
@pytest.mark.root
def test_a_pod_in_a_vlan(runtime: Runtime, netns: Names) -> None:
    one, two, other = (Pod(runtime, netns(name)) for name in ("one", "two", "other"))
    settings = runtime.conf(isDefaultGateway=True, vlan=100, ipam=V4)
    result = one.add(settings)
    assert [interface["name"] for interface in result["interfaces"]][3] == "cni0.100"
    assert shown(runtime, result["interfaces"][1]["name"]) == {100: NATIVE}
    assert addresses(runtime.host, "cni0.100") == ["10.9.0.1/24"]
    two.add(settings)
    other.add(runtime.conf(name="blue", vlan=200, ipam=V4))
    one.check()
    one.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    one.ns.run("ping", "-c1", "-W2", two.ip)
    assert " 0 received" in other.ns.run("ping", "-c1", "-W1", "10.9.0.1", check=False)
    runtime.host.run("bridge", "vlan", "del", "vid", "100", "dev", result["interfaces"][1]["name"])
    with pytest.raises(CniFailure, match="VLAN 100 is missing"):
        one.check()
    one.delete()


@pytest.mark.vm
@pytest.mark.root
def test_a_trunk(runtime: Runtime, netns: Names) -> None:
    pod = Pod(runtime, netns("pod"))
    result = pod.add(runtime.conf(vlanTrunk=[{"id": 101}, {"minID": 200, "maxID": 201}]))
    assert shown(runtime, result["interfaces"][1]["name"]) == {1: NATIVE, 101: [], 200: [], 201: []}
    pod.check()


@pytest.mark.vm
@pytest.mark.root
def test_the_default_vlan_beside_the_pods(runtime: Runtime, netns: Names) -> None:
    pod = Pod(runtime, netns("pod"))
    result = pod.add(runtime.conf(vlan=100, preserveDefaultVlan=True))
    assert shown(runtime, result["interfaces"][1]["name"]) == {1: ["Egress Untagged"], 100: NATIVE}
    pod.check()


@pytest.mark.vm
@pytest.mark.root
def test_a_failed_add_leaves_no_gateway_in_a_vlan(runtime: Runtime, netns: Names) -> None:
    """Neither with the bridge that it made, nor on one that is there."""
    pod = Pod(runtime, netns("pod"))
    broken = V4 | {"routes": [{"dst": "10.0.0.0/8", "gw": "192.0.2.77"}]}
    for made_before in (False, True):
        if made_before:
            runtime.host.run("ip", "link", "add", "cni0", "type", "bridge")
        before = sorted(links(runtime.host))
        with pytest.raises(CniFailure, match=r"192\.0\.2\.77"):
            pod.add(runtime.conf(isGateway=True, vlan=100, ipam=broken))
        assert sorted(links(runtime.host)) == before
