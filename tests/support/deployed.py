"""A cluster of two nodes on which deploy/ was applied: each node a namespace of a lab, with a containerd of its own.

For the tests of an image (`make try-image`). The API server has TLS, and lets each service account do what its roles
allow.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apiserver import Server
from apiserver.authorization import MASTERS
from apiserver.resources import NAMED
from apiserver.server import Tls
from netnslab import agents, controller, lifecycle, machine
from netnslab.bridge import NODES_PORT, listening
from netnslab.cluster import Lab, node_record
from netnslab.pods import parse_ports
from netnslab.state import Folder, Spec
from netnslab.topology import gateways, load
from support.containerd import Containerd
from support.kubelet import Kubelet, Pod, token_for

ROOT = Path(__file__).resolve().parent.parent.parent
Json = dict[str, Any]
ADMIN = "admin"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.80
  ports:
  - {name: tcp, port: 80, targetPort: 8080, nodePort: 30080}
  - {name: udp, port: 80, targetPort: 8080, nodePort: 30080, protocol: UDP}
"""


class Deployed:
    """A cluster of two nodes on which deploy/ was applied; `kubelets` by node."""

    def __init__(self, lab: Lab, server: Server, place: Path) -> None:
        self.lab, self.server, self.place = lab, server, place
        self.kubelets: dict[str, Kubelet] = {}
        self.pods: dict[tuple[str, str], Pod] = {}
        self.addresses: dict[str, str] = {}
        self.tokens = {name: token_for(f"system:serviceaccount:kube-system:{name}") for name in ("pynetd", "pyproxy")}
        server.tokens = {ADMIN: MASTERS} | {
            token: f"system:serviceaccount:kube-system:{name}" for name, token in self.tokens.items()
        }

    def kubectl(self, *words: str, text: str = "") -> str:
        """Run kubectl as an administrator."""
        environment = {**os.environ, "KUBECONFIG": str(self.place / "kubeconfig"), "HOME": str(self.place)}
        done = subprocess.run(
            ["kubectl", *words], env=environment, input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def object(self, plural: str, name: str) -> Json:
        return self.server.store.get(NAMED[plural], "kube-system", name)

    def config_maps(self) -> dict[str, Json]:
        return {each["metadata"]["name"]: each for each in self.server.store.all(NAMED["configmaps"])}

    def run(self, program: str, node: str, **how: Any) -> Pod:
        """Start a DaemonSet's pod on a node."""
        pod = self.kubelets[node].run(
            self.object("daemonsets", program), self.config_maps(), self.tokens[program], **how
        )
        self.pods[program, node] = pod
        return pod

    def replace(self, program: str, node: str) -> Pod:
        old = self.pods[program, node]
        daemonset = self.object("daemonsets", program)
        new = self.kubelets[node].replace(old, daemonset, self.config_maps(), self.tokens[program])
        self.pods[program, node] = new
        return new

    def pod(self, name: str, node: str, ports: str) -> str:
        """Make a pod as the node's runtime does, with a server in it; return its address."""
        kubelet = self.kubelets[node]
        sandbox = kubelet.cri.run(name)
        said = kubelet.runtime.run("ctr", "-a", str(kubelet.runtime.socket), "-n", "k8s.io", "tasks", "list").stdout
        (pid,) = [line.split()[1] for line in said.splitlines() if line.startswith(sandbox)]
        netns = self.lab.folder.netns(name)
        machine.run(["ip", "netns", "attach", netns, pid])
        served = parse_ports(ports)
        agents.start(self.lab.folder, name, netns, served)
        agents.wait(self.lab.folder, name)
        self.addresses[name] = kubelet.cri.address(sandbox)
        return self.addresses[name]


def certificates(place: Path, address: str) -> None:
    """Write an authority, and a server's certificate for an address."""

    def run(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    run("req", "-x509", *key, "-days", "2", "-subj", "/CN=cluster", "-keyout", "ca.key", "-out", "ca.crt")
    (place / "ext").write_text(f"subjectAltName=IP:{address},IP:127.0.0.1\n")
    run("req", *key, "-subj", "/CN=api", "-keyout", "api.key", "-out", "api.csr")
    run("x509", "-req", "-in", "api.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2", "-extfile", "ext",
        "-out", "api.crt")  # fmt: skip


@contextlib.contextmanager
def deploy(image: Path) -> Iterator[Deployed]:
    """Make the cluster, its nodes having the image; nothing of it stays."""
    name = f"t{os.getpid()}image"
    folder = Folder(name)
    topology = load("flat")
    gateway = gateways(topology, "lan", False)["IPv4"]
    runtimes: list[Containerd] = []
    with tempfile.TemporaryDirectory(prefix="pynet-image") as temporary:
        place = Path(temporary)
        certificates(place, gateway)
        try:
            with lifecycle.holding(folder):
                folder.make()
                lab = Lab(folder, Spec(name))
                lab.save(nodes=tuple(node_record(folder, topology, False, index) for index in (1, 2)))
                lifecycle.build_network(lab)
                for each, netns in [
                    *((node.name, node.netns) for node in lab.spec.nodes),
                    ("client", folder.netns("client")),
                ]:
                    agents.start(folder, each, netns)
                    agents.wait(folder, each)
            inner = listening(folder.netns("underlay"), NODES_PORT)
            tls = Tls(place / "api.crt", place / "api.key")
            with Server(tls=tls, sockets=[inner]) as server:
                found = Deployed(lab, server, place)
                cluster = {"certificate-authority": str(place / "ca.crt")}
                (place / "kubeconfig").write_text(server.kubeconfig(token=ADMIN, cluster=cluster))
                for node in lab.spec.nodes:
                    server.put(controller.node_manifest(node.name, node.addresses, node.pod_cidrs, node.zone, {}))
                shutil.copytree(ROOT / "deploy", place / "deploy")
                settings = place / "deploy/cluster.env"
                settings.write_text(
                    re.sub("(?m)^API_SERVER=.*", f"API_SERVER=https://{gateway}:{NODES_PORT}", settings.read_text())
                )
                found.kubectl("apply", "-k", str(place / "deploy"))
                for node in lab.spec.nodes:
                    machine_folder = place / node.name
                    for part in ("conf", "bin"):
                        (machine_folder / part).mkdir(parents=True)
                    shutil.copy2("/usr/lib/cni/loopback", machine_folder / "bin")  # kubelets' packages bring it
                    runtime = Containerd(
                        str(machine.NETNS / node.netns), machine_folder / "c", machine_folder / "conf",
                        machine_folder / "bin", cri=True, alone=True, images=[image],
                    )  # fmt: skip
                    runtimes.append(runtime)

                    def ask(address: str, port: int, path: str, node: str = node.name) -> int:
                        return agents.http_status(folder, node, address, port, path)[0]

                    found.kubelets[node.name] = Kubelet(
                        node.name, node.addresses["IPv4"], runtime, machine_folder / "kubelet", (gateway, NODES_PORT),
                        (place / "ca.crt").read_text(), ask,
                    )  # fmt: skip
                yield found
                for kubelet in found.kubelets.values():
                    kubelet.close()
        finally:
            for runtime in reversed(runtimes):
                runtime.close()
            lifecycle.down(name)


def populate(deployed: Deployed) -> None:
    """Start both DaemonSets everywhere, and two pods that answer behind a Service."""
    for node in deployed.kubelets:
        for program in ("pynetd", "pyproxy"):
            pod = deployed.run(program, node)
            print(node, program, {step: round(seconds, 2) for step, seconds in pod.took.items()})
    deployed.kubectl("apply", "-f", "-", text=SERVICE)
    for name, node in (("web-1", "node1"), ("web-2", "node2")):
        deployed.pod(name, node, "tcp:8080,udp:8080")
    deployed.pod("asker", "node1", "tcp:9")
    publish(deployed, "web-1", "web-2")


def publish(deployed: Deployed, *names: str) -> None:
    deployed.server.put(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [deployed.addresses[name]], "nodeName": f"node{name[-1]}"} for name in names],
            "ports": [
                {"name": "tcp", "port": 8080, "protocol": "TCP"},
                {"name": "udp", "port": 8080, "protocol": "UDP"},
            ],
        }
    )


def answering(deployed: Deployed, origin: str, address: str, port: int, protocol: str = "tcp") -> set[str]:
    """Return which pods answered twenty connections; a failure is one by its name."""
    found = agents.probe(deployed.lab.folder, origin, protocol, address, port, count=20, timeout=1)
    return {each.pod or each.outcome for each in found}


FLOWS = (
    ("asker", "tcp", "10.96.0.80", 80),
    ("asker", "udp", "10.96.0.80", 80),
    ("node2", "tcp", "10.96.0.80", 80),
    ("client", "tcp", "NODE", 30080),
    ("client", "udp", "NODE", 30080),
)


@contextlib.contextmanager
def under_load(deployed: Deployed, what: str) -> Iterator[None]:
    """Keep flows going and make new connections meanwhile; nothing of it may be lost."""
    folder = deployed.lab.folder
    outside = deployed.kubelets["node1"].address
    for number, (origin, protocol, address, port) in enumerate(FLOWS):
        request = {"operation": "flow_begin", "name": f"f{number}", "proto": protocol, "port": port, "interval": 0.005}
        agents.ask(folder, origin, {**request, "address": outside if address == "NODE" else address})
    stop, outcomes = threading.Event(), collections.Counter[str]()

    def connect() -> None:
        while not stop.is_set():
            for origin, address, port in (("client", outside, 30080), ("asker", "10.96.0.80", 80)):
                found = agents.probe(folder, origin, "tcp", address, port, count=20, timeout=1)
                outcomes.update(each.outcome for each in found)

    worker = threading.Thread(target=connect)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()
        ended = [
            agents.ask(folder, flow[0], {"operation": "flow_end", "name": f"f{number}"})
            for number, flow in enumerate(FLOWS)
        ]
        sent, longest = sum(each["sent"] for each in ended), max(each["longest"] for each in ended)
        print(f"{what}: {sent} messages of {len(FLOWS)} flows, at most {longest} s late; connections: {dict(outcomes)}")
    assert [(each["lost"], each["broken"]) for each in ended] == [(0, "")] * len(FLOWS)
    assert set(outcomes) == {"ok"}
