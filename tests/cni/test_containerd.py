"""Real runtimes: `ctr run --cni`, and containerd's CRI service as kubelet calls it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import containerd
from support.containerd import Containerd
from support.cri import Cri
from support.netns import Names, Namespace, connect

pytestmark = [pytest.mark.root, pytest.mark.slow]

BIN = Path(sys.executable).parent


class Machine:
    """A host with a containerd, and a client outside."""

    def __init__(self, host: Namespace, client: Namespace, runtime: Containerd, state: Path) -> None:
        self.host, self.client, self.runtime, self.state = host, client, runtime, state

    def veths(self) -> list[str]:
        found = json.loads(self.host.run("ip", "-j", "link", "show", "master", "cni0", check=False) or "[]")
        return [link["ifname"] for link in found if link]

    def reservations(self) -> int:
        from cni.ipam.store import Store

        store = Store(str(self.state / "ipam"), "kube")
        try:
            return len(store.all())
        finally:
            store.close()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if reason := containerd.why_not():
        pytest.skip(reason)
    names = Names()
    with tempfile.TemporaryDirectory(prefix="ctrd") as folder:
        try:
            host, client = names("host"), names("client")
            connect(host, client, "up0", "eth0")
            host.run("ip", "addr", "add", "192.0.2.1/24", "dev", "up0")
            client.run("ip", "addr", "add", "192.0.2.9/24", "dev", "eth0")
            state = Path(folder) / "state"
            plugin: dict[str, Any] = {
                "type": "pynet-cni", "bridge": "cni0", "isDefaultGateway": True, "ipMasq": True, "stateDir": str(state),
                "ipam": {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]},
                "capabilities": {"portMappings": True, "bandwidth": True},
            }  # fmt: skip
            conf = Path(folder) / "net.d"
            conf.mkdir()
            (conf / "10-pynet.conflist").write_text(
                json.dumps({"cniVersion": "1.0.0", "name": "kube", "plugins": [plugin]})
            )
            runtime = Containerd(host.path, Path(folder) / "c", conf, _plugins(Path(folder)), cri=True)
            try:
                yield Machine(host, client, runtime, state)
            finally:
                runtime.close()
        finally:
            names.close()


def _plugins(folder: Path) -> Path:
    """Return a folder with our plugins beside the reference loopback, which containerd's CRI asks for."""
    from cni.install import install

    target = folder / "bin"
    install(target)
    (target / "loopback").symlink_to("/usr/lib/cni/loopback")
    return target


def test_ctr_runs_containers_through_our_conflist(machine: Machine) -> None:
    machine.runtime.start("server", "/bin/httpd", "-f", "-p", "8080", "-h", "/www")
    machine.runtime.start("asker", "/bin/sleep", "1000")
    addresses = {}
    for name in ("server", "asker"):
        shown = machine.runtime.exec(name, "/bin/ip", "-4", "-o", "address", "show", "eth0").stdout
        addresses[name] = shown.split()[3].split("/")[0]
    page = machine.runtime.exec("asker", "/bin/wget", "-qO-", f"http://{addresses['server']}:8080/cgi-bin/who").stdout
    assert page.split() == ["NAME=server", f"[::ffff:{addresses['asker']}]"]
    for name in ("server", "asker"):
        machine.runtime.stop(name)


def test_a_pod_sandboxs_life_through_the_cri(machine: Machine) -> None:
    cri = Cri(machine.runtime.socket)
    before, reserved = set(machine.veths()), machine.reservations()
    annotations = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    sandbox = cri.run("web", [("tcp", 8080, 18080)], annotations)
    address = cri.address(sandbox)
    assert address.startswith("10.9.0.")
    (veth,) = set(machine.veths()) - before
    shaped = {
        q["dev"]: q["options"]["rate"] for q in json.loads(machine.host.run("tc", "-j", "qdisc")) if q["kind"] == "tbf"
    }
    assert shaped[veth] == 1_250_000
    assert shaped[veth.replace("veth", "ifbp")] == 2_500_000
    ports = json.loads(machine.host.run("nft", "-j", "list", "map", "inet", "pynet-cni", "anyports4"))
    (port,) = ports["nftables"][1]["map"]["elem"]
    assert port[0]["elem"]["val"] == {"concat": ["tcp", 18080]}
    assert port[1] == {"concat": [address, 8080]}
    machine.client.run("ping", "-c1", "-W2", "192.0.2.1")
    machine.host.run("ping", "-c1", "-W2", address)
    other = cri.run("other")
    assert cri.address(other) != address
    for one in (sandbox, other):
        cri.stop(one)
        cri.stop(one)  # kubelet does it again and again
        cri.remove(one)
    cri.close()
    assert set(machine.veths()) == before
    assert machine.reservations() == reserved
    assert address not in machine.host.run("nft", "list", "ruleset")


def test_a_taken_host_port_fails_the_sandbox_and_leaves_nothing(machine: Machine) -> None:
    import grpc

    cri = Cri(machine.runtime.socket)
    before, reserved = machine.veths(), machine.reservations()
    first = cri.run("first", [("udp", 53, 10053)])
    with pytest.raises(grpc.RpcError, match=r"10053 of 0\.0\.0\.0 is already claimed"):
        cri.run("second", [("udp", 53, 10053)])
    cri.stop(first)
    cri.remove(first)
    cri.close()
    assert machine.veths() == before
    assert machine.reservations() == reserved
