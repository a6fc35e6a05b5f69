"""The bridge of a network: made, found, given its gateway's address, and kept as it was."""

from __future__ import annotations

import pytest

from support.cni import CniFailure, Pod, Runtime, addresses, links
from support.netns import Names

pytestmark = pytest.mark.root

FOUR = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]}
DUAL = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]}


def test_a_failed_add_takes_nothing_from_the_networks_other_pods(runtime: Runtime, netns: Names) -> None:
    """The gateway's address was missing, it brought it back, and fails: the other pod has come to rely on it."""
    other, pod = Pod(runtime, netns("other")), Pod(runtime, netns("pod"))
    other.add(runtime.conf(isDefaultGateway=True, ipam=FOUR))
    impossible = runtime.conf(isGateway=True, ipam=FOUR | {"routes": [{"dst": "10.0.0.0/8", "gw": "192.0.2.77"}]})
    for name, kept in (("net", ["10.9.0.1/24"]), ("another", [])):
        runtime.host.run("ip", "addr", "flush", "dev", "cni0", "scope", "global")
        with pytest.raises(CniFailure, match=r"192\.0\.2\.77"):
            pod.add(impossible | {"name": name})
        assert addresses(runtime.host, "cni0") == kept


def test_an_existing_bridge_is_used_and_kept(runtime: Runtime, pod: Pod) -> None:
    runtime.host.run("ip", "link", "add", "cni0", "type", "bridge")
    number = links(runtime.host)["cni0"]["ifindex"]
    pod.add(runtime.conf(isGateway=True, ipam=FOUR))
    pod.delete()
    assert links(runtime.host)["cni0"]["ifindex"] == number
    runtime.host.run("ip", "link", "del", "cni0")
    runtime.host.run("ip", "link", "add", "cni0", "type", "dummy", check=False)
    if "cni0" not in links(runtime.host):
        runtime.host.run("ip", "link", "add", "cni0", "type", "veth", "peer", "name", "other")
    with pytest.raises(CniFailure, match="not a bridge"):
        pod.add(runtime.conf(isGateway=True, ipam=FOUR))


def test_the_bridges_address(runtime: Runtime, netns: Names) -> None:
    """plugins#273: another IPv4 address is refused unless forceAddress; IPv6 networks beside each other are fine."""
    first, second, third = (Pod(runtime, netns(name)) for name in "abc")
    first.add(runtime.conf(isGateway=True, ipam=DUAL))
    other = [[{"subnet": "10.10.0.0/24"}], [{"subnet": "fd00:a::/64"}]]
    conf = runtime.conf(name="other", isGateway=True, ipam={"type": "pynet-ipam", "ranges": other})
    with pytest.raises(CniFailure, match="already has an IP address different from"):
        second.add(conf)
    assert addresses(runtime.host, "cni0") == ["10.9.0.1/24"]
    second.add(conf | {"forceAddress": True})
    assert addresses(runtime.host, "cni0") == ["10.10.0.1/24"]
    overlapping = {"type": "pynet-ipam", "ranges": [[{"subnet": "fd00:9::/64", "gateway": "fd00:9::ff"}]]}
    conf = runtime.conf(name="overlapping", isGateway=True, ipam=overlapping)
    with pytest.raises(CniFailure, match="already has an IP address different from fd00:9::ff/64: fd00:9::1/64"):
        third.add(conf)
    third.add(conf | {"forceAddress": True})
    assert sorted(addresses(runtime.host, "cni0", "-6")) == ["fd00:9::ff/64", "fd00:a::1/64"]
    third.delete()
    runtime.host.run("ip", "addr", "replace", "fd00:9::1/64", "dev", "cni0", "nodad")
    runtime.host.run("ip", "addr", "del", "fd00:9::ff/64", "dev", "cni0")
    assert sorted(addresses(runtime.host, "cni0", "-6")) == ["fd00:9::1/64", "fd00:a::1/64"]
    with pytest.raises(CniFailure, match=r"gateway address 10\.9\.0\.1/24 is missing"):
        first.check()


def test_the_bridges_hardware_address_does_not_follow_its_ports(runtime: Runtime, netns: Names) -> None:
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(3)]
    macs = set()
    for number, pod in enumerate(pods):
        pod.add(runtime.conf(isGateway=True, ipam=FOUR, runtimeConfig={"mac": f"02:00:00:00:00:0{3 - number}"}))
        macs.add(links(runtime.host)["cni0"]["address"])
    assert len(macs) == 1


def test_nor_does_that_of_a_bridge_that_somebody_else_made(runtime: Runtime, netns: Names) -> None:
    """Until somebody sets it, it follows the lowest of its ports: results would be wrong with the next pod."""
    runtime.host.run("ip", "link", "add", "cni0", "address", "fe:ff:ff:ff:ff:ff", "type", "bridge")
    runtime.host.batch("link add cni1 type bridge", "link add a1 type veth peer name b1", "link set a1 master cni1")
    for bridge, name in (("cni0", "set"), ("cni1", "follows")):
        mac = links(runtime.host)[bridge]["address"]
        pods = [Pod(runtime, netns(f"{name}{number}")) for number in range(8)]
        for pod in pods:
            assert pod.add(runtime.conf(name=name, bridge=bridge))["interfaces"][0]["mac"] == mac
        assert links(runtime.host)[bridge]["address"] == mac
        pods[0].check()
