"""A real runtime: containerd, as the runtime of a node, wires containers through the conflist that pynetd wrote."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netnslab import agents, machine, pods, workloads
from netnslab.cluster import Lab
from support import containerd
from support.containerd import Containerd

pytestmark = [pytest.mark.root, pytest.mark.lab]

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: page}
spec: {type: NodePort, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: page-1, labels: {kubernetes.io/service-name: page}}
addressType: IPv4
endpoints: [{addresses: [ADDRESS], nodeName: node1}]
ports: [{name: http, port: 8080, protocol: TCP}]
"""


@pytest.fixture(scope="module")
def lab(make_lab) -> Lab:
    return make_lab()


@pytest.fixture(scope="module")
def runtime(lab) -> Iterator[Containerd]:
    if reason := containerd.why_not():
        pytest.skip(reason)
    node = lab.node("1")
    with tempfile.TemporaryDirectory(prefix="ctrd") as folder:
        conf_dir = lab.folder.node(node.netns) / "cni"
        started = Containerd(str(machine.NETNS / node.netns), Path(folder) / "c", conf_dir, Path(sys.executable).parent)
        try:
            yield started
        finally:
            started.close()


def ports_of_bridge(lab: Lab) -> set[str]:
    found = machine.run(["ip", "-j", "-n", lab.node("1").netns, "link", "show", "type", "veth"]).stdout
    return {link["ifname"] for link in json.loads(found or "[]") if link.get("master")}


def address_of(runtime: Containerd, name: str) -> str:
    shown = runtime.ask(name, "/bin/ip", "-4", "-o", "address", "show", "eth0")
    return shown.split()[3].split("/")[0]


@pytest.fixture(scope="module")
def server(lab, runtime) -> str:
    """A container that serves a page, and a Service for it; its address."""
    runtime.start("server", "/bin/httpd", "-f", "-p", "8080", "-h", "/www")
    address = address_of(runtime, "server")
    workloads.apply(lab, workloads.parse(SERVICE.replace("ADDRESS", address), "test"))
    return address


def test_a_container_fetches_from_another_with_its_own_address(lab, runtime, server):
    runtime.start("asker", "/bin/sleep", "1000")
    own = address_of(runtime, "asker")
    said = runtime.ask("asker", "/bin/wget", "-qO-", f"http://{server}:8080/cgi-bin/who")
    assert said.split() == ["NAME=server", f"[::ffff:{own}]"]


def test_a_container_fetches_from_a_service_and_from_itself_through_it(lab, runtime, server):
    spec = lab.service("page")["spec"]
    url = f"http://{spec['clusterIP']}/cgi-bin/who"
    runtime.start("caller", "/bin/sleep", "1000")
    wanted = f"[::ffff:{address_of(runtime, 'caller')}]"
    fetch = f"for n in $(seq 50); do wget -qO- {url} && exit; sleep 0.1; done; exit 1"
    said = runtime.ask("caller", "/bin/sh", "-c", fetch)
    assert said.split() == ["NAME=server", wanted]
    gateway = server.rpartition(".")[0] + ".1"
    assert runtime.ask("server", "/bin/wget", "-qO-", url).split() == [
        "NAME=server",
        f"[::ffff:{gateway}]",
    ]


def test_a_container_reaches_a_pod_of_the_other_node_and_the_other_way_round(lab, runtime, server):
    pods.create_all(lab, [pods.record(lab, "far", "2", ports=pods.parse_ports("tcp:8080"))])
    far = lab.pod("far")
    said = json.loads(runtime.ask("server", "/bin/wget", "-qO-", f"http://{far.addresses['IPv4']}:8080/"))
    assert said["pod"] == "far"
    assert said["source"].startswith(f"{server}:")
    status, body = agents.http_status(lab.folder, "far", server, 8080, "/cgi-bin/who")
    assert (status, body.split()) == (200, ["NAME=server", f"[::ffff:{far.addresses['IPv4']}]"])


def test_the_runtime_s_del_leaves_nothing_of_a_container(lab, runtime, server):
    before = ports_of_bridge(lab)
    fetch = ("/bin/wget", "-qO-", f"http://{server}:8080/cgi-bin/who")
    options = ("--rm", "--cni", "--cgroup", "", "--snapshotter", "native")
    addresses = set()
    for number in range(8):  # ctr at times loses the output of a short command
        said = runtime.ctr("run", *options, containerd.IMAGE, f"once{number}", *fetch).stdout
        assert said == "" or said.startswith("NAME=server")
        addresses.update(said.split()[1:])
        if len(addresses) == 2:
            break
    assert len(addresses) == 2
    assert ports_of_bridge(lab) == before
