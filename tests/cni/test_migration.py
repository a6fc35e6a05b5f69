"""A node that changes from the reference chain to ours while its pods run: only the type names are exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cni import predecessor
from support.cni import REFERENCE, CniFailure, Pod, Runtime, links, residue
from support.netns import Names

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not (REFERENCE / "bridge").exists(), reason="needs the package containernetworking-plugins"),
]

LIMITS = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}


class Chain:
    """The reference chain of one network, as most nodes have it, and ours in its place."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.runtime = runtime
        self.folder = folder / "net"
        ranges = [[{"subnet": "10.9.0.0/28"}], [{"subnet": "fd00:9::/124"}]]
        routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
        ipam = {"type": "host-local", "dataDir": str(folder), "ranges": ranges, "routes": routes}
        self.plugins: list[dict[str, Any]] = [
            {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "macspoofchk": True, "ipam": ipam},
            {"type": "portmap"}, {"type": "bandwidth"}, {"type": "firewall", "backend": "iptables"},
        ]  # fmt: skip
        self.ours = runtime.conf("1.0.0") | self.plugins[0] | {"type": "pynet-cni"}
        self.ours["ipam"] = ipam | {"type": "pynet-ipam"}

    def add(self, pod: Pod, port: int = 8080) -> None:
        capabilities = {
            "portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": LIMITS,
        }
        for plugin in self.plugins:
            conf = {"cniVersion": "1.0.0", "name": "net"} | plugin | {"runtimeConfig": capabilities}
            if pod.result:
                conf["prevResult"] = pod.result
            pod.add(conf, program=REFERENCE / plugin["type"])

    def left(self, pod: Pod) -> str:
        """Return all rules and reservations of a host as one text."""
        saved = pod.runtime.host.run("sh", "-c", "iptables-save; ip6tables-save; nft list ruleset; ip -br link")
        return saved + " ".join(f"{path.name} {path.read_text()}" for path in self.folder.iterdir())


@pytest.fixture
def chain(runtime: Runtime, tmp_path: Path) -> Chain:
    return Chain(runtime, tmp_path / "networks")


def test_no_running_pod_loses_its_address(chain: Chain, netns: Names) -> None:
    """The kernel tells which addresses are in use; host-local's files whose they are; a file of no pod is no matter."""
    runtime = chain.runtime
    old, nameless = Pod(runtime, netns("old")), Pod(runtime, netns("nameless"))
    chain.add(old)
    chain.add(nameless, 8081)
    for address in ("10.9.0.3", "fd00:9::3"):
        (chain.folder / address).unlink()
    for address in ("10.9.0.4", "10.9.0.5"):
        (chain.folder / address).write_text("long-gone\r\neth0")
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(12)]
    given = [pod.add(chain.ours)["ips"][0]["address"] for pod in pods[:11]]
    assert given == [f"10.9.0.{number}/28" for number in range(4, 15)]
    with pytest.raises(CniFailure, match="no IP addresses available"):
        pods[11].add(chain.ours)
    pods[0].ns.run("ping", "-c1", "-W2", "10.9.0.2")
    nameless.vanish()
    pods[11].add(chain.ours)  # its address is known by the link, and free when that is gone
    assert pods[11].ip == "10.9.0.3"
    pods[0].check()
    pods[0].delete()
    old.delete(chain.ours)
    pods[0].add(chain.ours)


@pytest.mark.parametrize("known", ["DEL", "DEL before any ADD", "DEL without namespace", "GC"])
def test_nothing_is_left_of_a_pod_that_the_reference_made(chain: Chain, netns: Names, known: str) -> None:
    runtime = chain.runtime
    old, other = Pod(runtime, netns("old")), Pod(runtime, netns("other"))
    chain.add(other, 8081)
    before = residue(runtime.host), chain.left(other)
    chain.add(old)
    ifb = predecessor.ifb_link("net", old.container)
    assert ifb in links(runtime.host)
    assert old.container in chain.left(old)
    if known != "DEL before any ADD":
        new = Pod(runtime, netns("new"))
        new.add(chain.ours)
        new.delete()
    if known == "GC":
        valid = [{"containerID": other.container, "ifname": "eth0"}]
        runtime.call("GC", chain.ours | {"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid})
        old.ns.run("ip", "link", "del", "eth0")
    elif known == "DEL without namespace":
        old.ns.run("ip", "link", "del", "eth0")
        old.delete(chain.ours, netns="")
    else:
        old.delete(chain.ours)
    assert "eth0" not in links(old.ns)
    after = residue(runtime.host), chain.left(old)
    for part in ("links", "addresses", "iptables"):
        assert after[0][part] == before[0][part]
    for gone in (old.container, "10.9.0.3", "fd00:9::3", "8080", ifb):
        assert gone not in after[1].replace("last_reserved_ip.0 10.9.0.3", "").replace("ip.1 fd00:9::3", "")
    assert other.container in after[1]
    other.ns.run("ping", "-c1", "-W2", "10.9.0.1")


def test_our_ipam_in_host_locals_place(chain: Chain, netns: Names) -> None:
    """Under the reference bridge, too, whose pods' addresses the kernel tells."""
    runtime = chain.runtime
    old, new = Pod(runtime, netns("old")), Pod(runtime, netns("new"))
    bridge = REFERENCE / "bridge"
    theirs = chain.plugins[0] | {"cniVersion": "1.0.0", "name": "net"}
    swapped = theirs | {"ipam": theirs["ipam"] | {"type": "pynet-ipam"}, "stateDir": str(runtime.state)}
    old.add(theirs, program=bridge)
    new.add(swapped, program=bridge)
    assert (old.ip, new.ip) == ("10.9.0.2", "10.9.0.3")
    old.delete(swapped | {"prevResult": old.result}, program=bridge)
    assert not (chain.folder / "10.9.0.2").exists()
    new.delete(program=bridge)


def test_another_main_plugins_addresses_are_host_locals_of_this_boot(chain: Chain, netns: Names) -> None:
    runtime = chain.runtime
    old, new = Pod(runtime, netns("old")), Pod(runtime, netns("new"))
    theirs = {"cniVersion": "1.0.0", "name": "net", "type": "ptp", "ipam": chain.plugins[0]["ipam"]}
    swapped = theirs | {"ipam": theirs["ipam"] | {"type": "pynet-ipam"}, "stateDir": str(runtime.state)}
    old.add(theirs, program=REFERENCE / "ptp")
    new.add(swapped, program=REFERENCE / "ptp")
    assert (old.ip, new.ip) == ("10.9.0.2", "10.9.0.3")
