"""pyproxy itself: node ports without any privilege, loopback node ports beside another mode, no IPVS in the kernel."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.modes.ipvs.choice import missing_modules
from support.netns import Names, Namespace, programs
from support.servicenet import REFUSED, Host, Servers, ServiceNet, inside

pytestmark = pytest.mark.root


class OneHost(ServiceNet):
    """A node that is its own pod: 10.9.0.1 with a server that says `self`."""

    def __init__(self, names: Names) -> None:
        node = names("node")
        node.run("ip", "link", "add", "br0", "type", "bridge")
        node.run("ip", "link", "set", "br0", "up")
        node.run("ip", "addr", "add", "10.9.0.1/24", "dev", "br0")
        self.hosts = {"node": Host(node, "10.9.0.1", "")}
        self.servers = Servers()
        self.servers.add(self.hosts["node"], "self", 8080)
        self.servers.start()


@pytest.fixture
def host(netns: Names) -> Iterator[OneHost]:
    made = OneHost(netns)
    yield made
    made.close()


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "clusterIP": "10.96.0.1",
            "ports": [
                {"name": "http", "port": 80, "nodePort": 31234, "protocol": "TCP"},
                {"name": "dns", "port": 53, "nodePort": 31253, "protocol": "UDP"},
            ],
        },
    }
    slices = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [
            {"name": "http", "port": 8080, "protocol": "TCP"},
            {"name": "dns", "port": 5353, "protocol": "UDP"},
        ],
        "endpoints": [{"addresses": ["10.9.0.1"], "conditions": {"ready": True}}],
    }
    folder = tmp_path / "manifests"
    folder.mkdir()
    for name, document in (("service", service), ("slice", slices)):
        (folder / f"{name}.yaml").write_text(json.dumps(document))
    for path in (folder, *folder.parents):
        if path.owner() == "root" and path != Path("/") and str(path).startswith(str(tmp_path.parents[1])):
            path.chmod(0o755)
    return folder


def start(node: Namespace, manifests: Path, *flags: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    log = (manifests.parent / "log").open("w")
    return node.start(
        *before, str(programs() / "pyproxy"), "--manifests", str(manifests), "--hostname-override", "node",
        "--healthz-bind-address", "127.0.0.1:10256", "--metrics-bind-address", "127.0.0.1:10249", *flags,
        stdout=log, stderr=log,
    )  # fmt: skip


def wait_for_answer(host: OneHost, address: str, port: int, log: Path) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = host.ask("node", address, port)
        if found != REFUSED:
            return found.server
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def fetched(node: Namespace, path: str) -> str:
    with inside(node), urllib.request.urlopen(f"http://127.0.0.1:10249{path}", timeout=5) as reply:
        return str(reply.read().decode())


def test_node_ports_without_privilege(host: OneHost, manifests: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are for their owner alone
        Path(folder).chmod(0o755)
        serve_without_privilege(host, Path(shutil.copytree(manifests, f"{folder}/manifests")))


def serve_without_privilege(host: OneHost, manifests: Path) -> None:
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    flags = ("--mode=userspace", "--userspace-listen-only", "--nodeport-addresses=127.0.0.0/8,10.9.0.0/25")
    start(host.node, manifests, *flags, before=nobody)
    log = manifests.parent / "log"
    for address in ("127.0.0.1", "10.9.0.1"):
        assert wait_for_answer(host, address, 31234, log) == "self"
    host.node.batch("addr add 10.9.0.7/24 dev br0", "addr add 10.9.0.200/24 dev br0")
    assert wait_for_answer(host, "10.9.0.7", 31234, log) == "self"  # an address that the node has got since
    assert host.ask("node", "10.9.0.200", 31234) == REFUSED
    assert host.node.run("nft", "list", "ruleset") == ""
    assert "stale flows" not in log.read_text()  # which nobody may read


def test_loopback_node_ports_beside_another_mode(host: OneHost, manifests: Path) -> None:
    flags = ("--iptables-localhost-nodeports=false", "--userspace-localhost-nodeports", "--iptables-backend=nft")
    start(host.node, manifests, "--mode=iptables", *flags)
    assert wait_for_answer(host, "127.0.0.1", 31234, manifests.parent / "log") == "self"
    assert fetched(host.node, "/proxyMode").strip() == "iptables"


def test_a_kernel_without_ipvs_gets_iptables_and_says_so_once(host: OneHost, manifests: Path) -> None:
    with inside(host.node):
        missing = missing_modules()
    if not missing:
        pytest.skip("this kernel has IPVS")
    start(host.node, manifests, "--mode=ipvs", "--iptables-backend=nft")
    log = manifests.parent / "log"
    assert wait_for_answer(host, "10.9.0.1", 31234, log) == "self"
    assert fetched(host.node, "/proxyMode").strip() == "iptables"
    assert 'pyproxy_mode{asked_for="ipvs",mode="iptables"} 1.0' in fetched(host.node, "/metrics")
    lines = [line for line in log.read_text().splitlines() if "cannot do IPVS" in line]
    assert len(lines) == 1 and "ip_vs" in lines[0] and "modprobe" in lines[0]


def test_without_a_fallback_a_kernel_without_ipvs_is_an_error(host: OneHost, manifests: Path) -> None:
    with inside(host.node):
        if not missing_modules():
            pytest.skip("this kernel has IPVS")
    child = start(host.node, manifests, "--mode=ipvs", "--ipvs-fallback=none")
    assert child.wait(30) == 2
    said = (manifests.parent / "log").read_text()
    assert "ip_vs" in said and "modprobe" in said


@pytest.mark.parametrize("flag", ["--ipvs-scheduler=nonsense", "--ipvs-fallback=nftables"])
def test_flags_are_checked(host: OneHost, manifests: Path, flag: str) -> None:
    child = start(host.node, manifests, "--mode=ipvs", flag)
    assert child.wait(30) == 2
    assert flag.split("=")[0] in (manifests.parent / "log").read_text()
