"""pyproxy --mode=ipvs on a kernel that has IPVS: what its flags and a Service's fields become, a change, its clean-up.

The daemon is a fork of this process: an emulated processor imports it for four seconds, and twice.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy import main
from support.netns import Names, Namespace
from support.servicenet import REFUSED, SILENCE, ServiceNet, inside

pytestmark = [pytest.mark.vm, pytest.mark.root]

FLAGS = (
    "--mode=ipvs", "--hostname-override=node", "--cluster-cidr=10.244.0.0/16,fd00:244::/32", "--iptables-backend=nft",
    "--ipvs-scheduler=sh", "--ipvs-strict-arp", "--ipvs-tcp-timeout=300s", "--ipvs-udp-timeout=20s",
    "--ipvs-exclude-cidrs=10.96.9.0/24",
)  # fmt: skip


def service(name: str, number: int, endpoints: tuple[str, ...], **more: Any) -> list[dict[str, Any]]:
    """Return a Service on 10.96.0.NUMBER, in both families, and its slices."""
    annotations = {f"pynet/{key}": more.pop(key) for key in ("scheduler", "weights", "removal") if key in more}
    protocol = more.pop("protocol", "TCP")
    port = {"name": "p", "port": 80, "protocol": protocol} | (
        {"nodePort": more.pop("node_port")} if "node_port" in more else {}
    )
    ips = [f"10.96.0.{number}", f"fd00:96::{number}"]
    found: list[dict[str, Any]] = [
        {
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "default", "annotations": annotations},
            "spec": {"clusterIP": ips[0], "clusterIPs": ips, "ports": [port], **more},
        }
    ]  # fmt: skip
    for kind in ("IPv4", "IPv6"):
        addresses = [address for address in endpoints if (":" in address) == (kind == "IPv6")]
        found.append(
            {
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
                "metadata": {
                    "name": f"{name}-{kind.lower()}", "namespace": "default",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "ports": [{"name": "p", "port": 8080, "protocol": protocol}],
                "endpoints": [
                    {"addresses": [each], "nodeName": "other" if "244.2" in each or "244:2" in each else "node"}
                    for each in addresses
                ],
            }
        )  # fmt: skip
    return found


BOTH = ("10.244.1.2", "10.244.2.2", "fd00:244:1::2", "fd00:244:2::2")
FAR = ("10.244.2.2", "fd00:244:2::2")
SERVICES = {
    "plain": service("plain", 1, BOTH),
    "own": service("own", 2, BOTH, scheduler="lc", weights="10.244.1.2=3"),
    "sticky": service("sticky", 3, BOTH, scheduler="rr", sessionAffinity="ClientIP",
                      sessionAffinityConfig={"clientIP": {"timeoutSeconds": 77}}),
    "empty": service("empty", 4, (), node_port=30004, type="NodePort"),
    "no-local": service("no-local", 5, FAR, node_port=30005, type="NodePort", externalTrafficPolicy="Local"),
    "unknown": service("unknown", 6, BOTH, scheduler="fastest"),
}  # fmt: skip


class Forked:
    """pyproxy with these arguments, in a namespace, its output in a file."""

    def __init__(self, node: Namespace, log: Path, *arguments: str) -> None:
        self.log = log
        log.touch()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
            with inside(node):
                status = main.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def ended(self) -> int:
        """Wait for its end; return its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_so():
            assert time.monotonic() < deadline and not os.waitpid(self.pid, os.WNOHANG)[0], self.log.read_text()
            time.sleep(0.5)  # asking takes the emulated processor from the daemon


@pytest.fixture
def net(netns: Names) -> Any:
    made = ServiceNet(netns)
    for name in ("pod1", "far"):
        made.servers.add(made[name], name, 8080)
    made.servers.add(made["node"], "host", 22)
    made.servers.start()
    yield made
    made.close()


def test_pyproxy(net: ServiceNet, tmp_path: Path) -> None:
    manifests, node = tmp_path / "manifests", net.node
    manifests.mkdir()
    for name, documents in SERVICES.items():
        (manifests / f"{name}.yaml").write_text("\n---\n".join(map(json.dumps, documents)))
    for foreign in ("10.96.9.9:80", "192.168.77.1:9999"):
        node.run("ipvsadm", "-A", "-t", foreign, "-s", "wlc")
    flags = (*FLAGS, "--manifests", str(manifests))
    daemon = Forked(node, tmp_path / "log", *flags)
    try:
        daemon.until(lambda: "Services are in the kernel" in daemon.log.read_text())
        says_what_was_asked_for(net, daemon.log.read_text())
        follows_a_change(net, daemon, manifests / "own.yaml")
    finally:
        os.kill(daemon.pid, signal.SIGTERM)
        status = daemon.ended()
    assert status == 0
    assert net.ask("outside", "10.96.0.1", 80).server in ("pod1", "far")  # the kernel serves on without us
    assert Forked(node, tmp_path / "log", "--cleanup", *flags).ended() == 0
    table = node.run("ipvsadm", "-Ln")
    assert "10.96.9.9:80 wlc" in table and "192.168.77.1:9999 wlc" in table and "10.96.0" not in table
    assert "PYNET" not in node.run("iptables-nft-save") and "pynet" not in node.run("ip", "link")


def says_what_was_asked_for(net: ServiceNet, log: str) -> None:
    node = net.node
    table = node.run("ipvsadm", "-Sn").splitlines()
    for line in (
        "-A -t 10.96.0.1:80 -s sh -b sh-fallback",
        "-A -t [fd00:96::1]:80 -s sh -b sh-fallback",
        "-A -t 10.96.0.2:80 -s wlc",
        "-a -t 10.96.0.2:80 -r 10.244.1.2:8080 -m -w 3",
        "-A -t 10.96.0.3:80 -s rr -p 77",
        "-A -t 10.96.9.9:80 -s wlc",
    ):
        assert line in table, (line, table)
    assert not any("10.96.0.6:" in line for line in table)
    assert "metadata.annotations[pynet/scheduler]" in log and "fastest" in log
    addresses = node.run("ip", "-o", "addr", "show", "dev", "pynet-ipvs")
    assert "10.96.0.1/32" in addresses and "fd00:96::1/128" in addresses and "10.96.0.6" not in addresses
    names = (
        "ipv4.conf.all.arp_ignore",
        "ipv4.conf.all.arp_announce",
        "ipv4.vs.conntrack",
        "ipv4.vs.expire_nodest_conn",
    )
    assert node.run("sysctl", "-n", *(f"net.{name}" for name in names)).split() == ["1", "2", "1", "1"]
    assert node.run("ipvsadm", "-L", "--timeout").split()[-3:] == ["300", "120", "20"]
    with inside(node), urllib.request.urlopen("http://127.0.0.1:10249/proxyMode", timeout=20) as reply:
        assert reply.read().decode().strip() == "ipvs"

    assert {net.ask("pod1", "10.96.0.3", 80).server for _ in range(4)} in ({"pod1"}, {"far"})
    for client, address, port, wanted in (
        ("outside", "10.96.0.4", 80, REFUSED),  # no endpoint
        ("outside", "192.168.77.1", 30004, REFUSED),
        ("outside", "192.168.77.1", 30005, SILENCE),  # no local one
        ("outside", "10.96.0.1", 22, REFUSED),  # the host's port
    ):
        assert net.ask(client, address, port, wait=1.5 if wanted is SILENCE else 10) == wanted, (client, address, port)
    assert net.ask("node", "192.168.77.1", 30005).server == "far"


def follows_a_change(net: ServiceNet, daemon: Forked, manifest: Path) -> None:
    """An endpoint without connections goes with the next look at the drains."""
    manifest.write_text("\n---\n".join(map(json.dumps, service("own", 2, FAR))))

    def table() -> str:
        return net.node.run("ipvsadm", "-Sn", check=False)

    daemon.until(lambda: "10.96.0.2:80 -r 10.244.1.2:8080" not in table() and "-A -t 10.96.0.2:80 -s sh" in table())
    assert net.ask("pod1", "10.96.0.2", 80) == ("far", "10.244.1.2")
