"""Our plugin as the first of a list that goes on with the reference's portmap, bandwidth, firewall and tuning."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.cni import REFERENCE, CniFailure, Pod, Runtime, links, residue
from support.netns import Names

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not (REFERENCE / "portmap").exists(), reason="needs the package containernetworking-plugins"),
]

LIMITS = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}
FIRST = {
    "type": "pynet-cni", "isDefaultGateway": True, "ipMasq": True, "hairpinMode": True,
    "ipam": {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]},
}  # fmt: skip
BEHIND: list[dict[str, Any]] = [
    {"type": "portmap", "runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "tcp"}]}},
    {"type": "bandwidth", "runtimeConfig": {"bandwidth": LIMITS}},
    {"type": "firewall", "backend": "iptables"},
    {"type": "tuning", "mtu": 1400, "mac": "02:00:00:00:00:99", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}},
]


class Listed:
    """A list of plugins, called as libcni does: each gets the result of the one before it, DEL goes backwards."""

    def __init__(self, pod: Pod, version: str, plugins: list[dict[str, Any]]) -> None:
        self.pod = pod
        base = {"cniVersion": version, "name": "net", "stateDir": str(pod.runtime.state)}
        self.plugins = [base | plugin for plugin in plugins]

    def call(self, verb: str, plugin: dict[str, Any]) -> dict[str, Any]:
        pod = self.pod
        program = REFERENCE / plugin["type"]
        conf = plugin | ({"prevResult": pod.result} if pod.result else {})
        return pod.runtime.call(
            verb, conf, pod.container, pod.ns.path, program=program if program.exists() else pod.runtime.program
        )

    def add(self) -> None:
        for plugin in self.plugins:
            self.pod.result = self.call("ADD", plugin)

    def check(self) -> None:
        """Check all but portmap: Debian's 1.1.1 finds its own IPv6 rules missing for a pod of IPv4, whoever made it."""
        for plugin in self.plugins:
            if plugin["type"] != "portmap":
                assert self.call("CHECK", plugin) == {}

    def delete(self) -> None:
        for plugin in reversed(self.plugins):
            assert self.call("DEL", plugin) == {}


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0"])
def test_the_reference_plugins_behind_ours(runtime: Runtime, netns: Names, version: str) -> None:
    first, pod = Pod(runtime, netns("first")), Pod(runtime, netns("pod"))
    warm = Listed(first, version, [FIRST, *BEHIND])
    warm.add()  # makes the bridge and the chains that the reference plugins keep
    warm.delete()
    before = residue(runtime.host)
    listed = Listed(pod, version, [FIRST, *BEHIND])
    listed.add()
    assert [interface["name"][:3] for interface in pod.result["interfaces"]] == ["cni", "vet", "eth", "bwp"]
    assert (links(pod.ns)["eth0"]["mtu"], links(pod.ns)["eth0"]["address"]) == (1400, "02:00:00:00:00:99")
    assert pod.result["interfaces"][2]["mac"] == "02:00:00:00:00:99"
    pod.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    listed.check()
    pod.ns.run("ip", "route", "del", "default")
    with pytest.raises(CniFailure, match=r"route 0\.0\.0\.0/0 via 10\.9\.0\.1 is missing"):
        listed.check()
    for _ in range(2):
        listed.delete()
    after = residue(runtime.host)
    assert "pynet-cni" not in after.pop("nft")
    assert after == {part: found for part, found in before.items() if part != "nft"}  # iptables' counters have gone on


def test_a_list_that_fails_behind_ours_is_undone_by_its_del(runtime: Runtime, pod: Pod) -> None:
    listed = Listed(pod, "1.0.0", [FIRST, {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.no_such": "1"}}])
    with pytest.raises(CniFailure):
        listed.add()
    assert "eth0" in links(pod.ns)
    listed.delete()
    assert "eth0" not in links(pod.ns)
    assert runtime.host.run("nft", "list", "ruleset") == ""


def test_ours_twice_in_a_list_is_refused(runtime: Runtime, pod: Pod) -> None:
    """As when every type name is exchanged for ours: its keys belong into the one entry."""
    listed = Listed(pod, "1.0.0", [FIRST, BEHIND[0] | {"type": "pynet-cni"}])
    with pytest.raises(CniFailure, match="interface eth0 already exists in the pod"):
        listed.add()
    assert json.loads(pod.ns.run("ip", "-j", "route", "get", "192.0.2.1"))[0]["gateway"] == "10.9.0.1"
    listed.delete()
    assert "eth0" not in links(pod.ns)
