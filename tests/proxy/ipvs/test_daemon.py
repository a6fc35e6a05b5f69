"""pyproxy --mode=ipvs on a kernel that has IPVS: it serves, tells its mode, and cleans up."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from support.netns import Names, programs
from support.servicenet import REFUSED, ServiceNet, inside

pytestmark = [pytest.mark.vm, pytest.mark.root]

OBJECTS = (
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default", "annotations": {"pynet/scheduler": "wlc"}},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.2.2"], "conditions": {"ready": True}}],
    },
)


def test_pyproxy_serves_and_cleans_up(netns: Names, tmp_path: Path) -> None:
    net = ServiceNet(netns)
    net.servers.add(net["far"], "far", 8080)
    net.servers.start()
    for number, document in enumerate(OBJECTS):
        (tmp_path / f"{number}.yaml").write_text(json.dumps(document))
    log = tmp_path / "log"
    flags = ("--mode=ipvs", "--manifests", str(tmp_path), "--hostname-override=node", "--cluster-cidr=10.244.0.0/16")
    more = ("--ipvs-scheduler=sh", "--ipvs-strict-arp", "--ipvs-tcp-timeout=300s", "--iptables-backend=nft")
    with log.open("w") as out:
        daemon = net.node.start(str(programs() / "pyproxy"), *flags, *more, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while net.ask("outside", "10.96.0.1", 80) == REFUSED or "10.96.0.1:80 wlc" not in net.node.run("ipvsadm", "-Ln"):
        assert time.monotonic() < deadline and daemon.poll() is None, log.read_text()
        time.sleep(1)  # asking takes the emulated processor from the daemon
    assert net.ask("pod1", "10.96.0.1", 80) == ("far", "10.244.1.2")
    with inside(net.node), urllib.request.urlopen("http://127.0.0.1:10249/proxyMode", timeout=20) as reply:
        assert reply.read().decode().strip() == "ipvs"
    assert net.node.run("sysctl", "-n", "net.ipv4.conf.all.arp_ignore", "net.ipv4.vs.conntrack").split() == ["1", "1"]
    assert "300" in net.node.run("ipvsadm", "-L", "--timeout")
    daemon.terminate()
    assert daemon.wait(60) == 0
    assert net.ask("outside", "10.96.0.1", 80).server == "far"  # the kernel serves on without us
    subprocess.run(["ip", "netns", "exec", net.node.name, str(programs() / "pyproxy"), "--cleanup", *flags], check=True)
    assert "10.96" not in net.node.run("ipvsadm", "-Ln") and "PYNET" not in net.node.run("iptables-nft-save")
    net.close()
