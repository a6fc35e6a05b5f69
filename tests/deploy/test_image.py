"""deploy/ at work: the image that was built, run as the DaemonSets say, on two nodes that have a containerd each.

Only with an image: `make try-image` builds one and comes here. The API server has TLS, and lets each service account
do what its roles allow.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
from support import containerd
from support.containerd import Containerd
from support.kubelet import Failed, Kubelet, Pod, token_for, write_volume
from support.nodes import until

IMAGE = os.environ.get("PYNET_IMAGE", "")
ROOT = Path(__file__).resolve().parent.parent.parent
if not IMAGE:
    pytest.skip("no PYNET_IMAGE: `make try-image` builds one", allow_module_level=True)
pytestmark = [pytest.mark.root, pytest.mark.slow]
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


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    if reason := containerd.why_not():
        pytest.skip(reason)
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
                        machine_folder / "bin", cri=True, alone=True, images=[Path(IMAGE)],
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


@pytest.fixture(scope="module")
def running(deployed: Deployed) -> Deployed:
    """Both DaemonSets everywhere, and two pods that answer behind a Service."""
    for node in deployed.kubelets:
        for program in ("pynetd", "pyproxy"):
            pod = deployed.run(program, node)
            print(node, program, {step: round(seconds, 2) for step, seconds in pod.took.items()})
    deployed.kubectl("apply", "-f", "-", text=SERVICE)
    for name, node in (("web-1", "node1"), ("web-2", "node2")):
        deployed.pod(name, node, "tcp:8080,udp:8080")
    deployed.pod("asker", "node1", "tcp:9")
    publish(deployed, "web-1", "web-2")
    return deployed


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


def test_the_init_step_installs_executables_with_their_own_python(running: Deployed) -> None:
    for node in running.kubelets:
        folder = running.place / node / "bin"
        assert {"pynet-cni", "pynet-ipam", "pynet-runtime", "loopback"} <= set(os.listdir(folder))
        assert list((running.place / node / "conf").glob("*.conflist"))


def served(deployed: Deployed, node: str) -> int:
    """Return how many pods a node's agent has wired itself."""
    said = deployed.kubelets[node].runtime.run("curl", "-s", "127.0.0.1:10271/metrics").stdout
    return int(sum(float(found) for found in re.findall(r'pynetd_cni_requests_total{code="0",verb="ADD"} (\S+)', said)))


def test_the_agent_serves_the_executables_from_its_container(running: Deployed) -> None:
    assert (served(running, "node1"), served(running, "node2")) == (2, 1)


def test_services_answer_from_pods_nodes_and_outside(running: Deployed) -> None:
    both = {"web-1", "web-2"}
    for protocol in ("tcp", "udp"):
        until(protocol, lambda protocol=protocol: answering(running, "asker", "10.96.0.80", 80, protocol) == both)
        for origin in ("asker", "node1", "node2"):
            assert answering(running, origin, "10.96.0.80", 80, protocol) == both, (origin, protocol)
        assert answering(running, "client", running.kubelets["node1"].address, 30080, protocol) == both


def test_only_what_the_roles_allow_is_asked_for(running: Deployed) -> None:
    """The server enforces the roles: a request too many is refused, one too few is a right too many."""
    for program in ("pynetd", "pyproxy"):
        user = f"system:serviceaccount:kube-system:{program}"
        asked = {(each.plural, each.verb) for each in running.server.requests if each.user == user}
        rules = running.server.store.get(NAMED["clusterroles"], "", f"pynet:{program}")["rules"]
        allowed = {(plural, verb) for rule in rules for plural in rule["resources"] for verb in rule["verbs"]}
        assert asked <= allowed
        assert {each for each in allowed if each[1] == "watch"} <= asked
        for node in running.kubelets:
            assert "orbidden" not in running.pods[program, node].log


def test_pyproxy_keeps_three_capabilities(running: Deployed) -> None:
    pid = running.kubelets["node1"].pid(running.pods["pyproxy", "node1"])
    status = Path(f"/proc/{pid}/status").read_text()
    wanted = f"{1 << 10 | 1 << 12 | 1 << 13:016x}"
    assert {found[1] for found in re.finditer(r"Cap(?:Prm|Eff|Bnd):\s*(\w+)", status)} == {wanted}


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


@pytest.mark.parametrize("program", ["pyproxy", "pynetd"])
def test_a_rolling_update_loses_nothing(running: Deployed, program: str) -> None:
    with under_load(running, f"update of {program}"):
        for node in running.kubelets:
            old = running.pods[program, node]
            new = running.replace(program, node)
            print(f"{program}: ended {old.took['end']:.2f} s, ready {new.took['readinessProbe']:.2f} s")


def test_another_mode_by_the_config_map_loses_nothing(running: Deployed) -> None:
    """cluster.env is edited and applied: the ConfigMap's new name is what rolls the DaemonSets."""
    settings = running.place / "deploy/cluster.env"
    with under_load(running, "nftables to iptables and back"):
        for mode in ("iptables", "nftables"):
            before = running.object("daemonsets", "pyproxy")["spec"]["template"]
            settings.write_text(re.sub("(?m)^MODE=.*", f"MODE={mode}", settings.read_text()))
            running.kubectl("apply", "-k", str(settings.parent))
            assert running.object("daemonsets", "pyproxy")["spec"]["template"] != before
            for node in running.kubelets:
                running.replace("pyproxy", node)
                assert agents.http_status(running.lab.folder, node, "127.0.0.1", 10249, "/proxyMode") == (200, mode)


def test_pods_are_made_while_no_agent_runs(running: Deployed) -> None:
    """The executables with their own runtime work alone; what the agent finds when it is back, it keeps."""
    kubelet = running.kubelets["node2"]
    kubelet.end(running.pods["pynetd", "node2"])
    address = running.pod("orphan", "node2", "tcp:8080")
    assert answering(running, "asker", address, 8080) == {"orphan"}
    running.run("pynetd", "node2")
    assert running.pod("child", "node2", "tcp:8080") != address
    assert answering(running, "child", address, 8080) == {"orphan"}


def test_what_changed_while_no_pyproxy_ran_is_made_up_for(running: Deployed) -> None:
    kubelet = running.kubelets["node1"]
    kubelet.end(running.pods["pyproxy", "node1"])
    publish(running, "web-2")
    running.run("pyproxy", "node1")
    assert answering(running, "asker", "10.96.0.80", 80) == {"web-2"}
    publish(running, "web-1", "web-2")


def test_a_rotated_token_is_taken_up(running: Deployed) -> None:
    """The kubelet turns the link; the old token is refused from then on, and connections are cut."""
    pod = running.pods["pyproxy", "node1"]
    account = "system:serviceaccount:kube-system:pyproxy"
    old, new = running.tokens["pyproxy"], token_for(account)
    tokens = running.server.tokens
    assert isinstance(tokens, dict)
    tokens[new] = account
    for node in running.kubelets:
        authority = (running.place / "ca.crt").read_text()
        folder = running.pods["pyproxy", node].folder
        write_volume(folder / "account", {"token": new, "ca.crt": authority, "namespace": "kube-system"})
    del tokens[old]
    running.tokens["pyproxy"] = new
    running.server.drop_connections()
    publish(running, "web-1")
    until("the change is seen", lambda: answering(running, "asker", "10.96.0.80", 80) == {"web-1"})
    publish(running, "web-1", "web-2")
    assert "ERROR" not in pod.log


def test_a_node_with_a_read_only_root_filesystem(running: Deployed) -> None:
    kubelet = running.kubelets["node2"]
    kubelet.runtime.run("sh", "-c", "for at in / /usr/lib /opt /etc; do mount -n -o remount,bind,ro $at; done")
    assert kubelet.runtime.run("touch", "/opt/x", check=False).returncode
    try:
        for program in ("pynetd", "pyproxy"):
            running.replace(program, "node2")
        running.pod("frugal", "node2", "tcp:8080")
        assert answering(running, "frugal", "10.96.0.80", 80) == {"web-1", "web-2"}
    finally:
        kubelet.runtime.run("sh", "-c", "for at in / /usr/lib /opt /etc; do mount -n -o remount,bind,rw $at; done")


def edited(daemonset: Json, container: str, **security: Any) -> Json:
    """Return a DaemonSet with another security context of one container."""
    changed: Json = json.loads(json.dumps(daemonset))
    spec = changed["spec"]["template"]["spec"]
    for each in (*spec.get("initContainers", ()), *spec["containers"]):
        if each["name"] == container:
            each["securityContext"] = security
    return changed


@pytest.mark.parametrize(
    ("program", "added", "said"),
    [
        ("pyproxy", (), "missing=CAP_NET_ADMIN"),
        ("pynetd", (), 'missing="CAP_NET_ADMIN CAP_SYS_ADMIN"'),
        ("pynetd", ("NET_ADMIN",), "missing=CAP_SYS_ADMIN"),
    ],
)
def test_without_privileges_a_daemon_says_what_it_lacks(
    running: Deployed, program: str, added: tuple[str, ...], said: str
) -> None:
    """Runtimes give NET_RAW and NET_BIND_SERVICE by themselves."""
    kubelet = running.kubelets["node2"]
    kubelet.end(running.pods[program, "node2"])
    bare = edited(running.object("daemonsets", program), program, capabilities={"add": list(added)})
    pod = kubelet.run(bare, running.config_maps(), running.tokens[program], wait=False)
    until(said, lambda: said in pod.log, 10)
    kubelet.end(pod)
    running.run(program, "node2")


def test_pyproxy_is_privileged_for_its_sysctls_alone(running: Deployed) -> None:
    """Where they are as it wants them, the capabilities that it keeps are enough."""
    kubelet = running.kubelets["node2"]
    kubelet.end(running.pods["pyproxy", "node2"])
    security = {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE"]}}
    modest = edited(running.object("daemonsets", "pyproxy"), "pyproxy", **security)
    pod = kubelet.run(modest, running.config_maps(), running.tokens["pyproxy"])
    publish(running, "web-1")
    until("it writes", lambda: answering(running, "node2", "10.96.0.80", 80) == {"web-1"})
    publish(running, "web-1", "web-2")
    kubelet.end(pod)
    running.run("pyproxy", "node2")


@pytest.mark.parametrize("owner", [0, 997])
def test_the_init_step_has_the_capabilities_that_it_needs(running: Deployed, owner: int) -> None:
    """The folder of executables may be another user's, as some installers make it."""
    kubelet = running.kubelets["node2"]
    folder = running.place / "node2" / "bin"
    kubelet.end(running.pods["pynetd", "node2"])
    shutil.rmtree(folder / os.readlink(folder / "pynet-runtime"))
    os.chown(folder, owner, owner)
    try:
        without = edited(running.object("daemonsets", "pynetd"), "install", capabilities={"drop": ["ALL"]})
        if owner:
            with pytest.raises(Failed, match="Permission denied"):
                kubelet.run(without, running.config_maps(), running.tokens["pynetd"])
        running.run("pynetd", "node2")
        assert (folder / "pynet-runtime/VERSION").exists()
    finally:
        os.chown(folder, 0, 0)


NAME = "docker.io/library/pynet:0.1.0"
# What kubeadm writes for kube-proxy (1.36), the fields that are empty there as well.
KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null,
  udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s,
  tcpTimeout: 0s, udpTimeout: 0s}
kind: KubeProxyConfiguration
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
"""  # noqa: E501
# What kube-proxy's iptables mode leaves behind for the Service, in its own chains.
KUBE_RULES = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-EXT-WEB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d 10.96.0.80/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -d 10.96.0.80/32 -p udp -m udp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-NODEPORTS -p udp -m udp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-EXT-WEB -j KUBE-MARK-MASQ
-A KUBE-EXT-WEB -j KUBE-SVC-WEB
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
-A KUBE-SVC-WEB ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -p tcp -j DNAT --to-destination WEB:8080
-A KUBE-SVC-WEB -p udp -j DNAT --to-destination WEB:8080
COMMIT
"""


def test_services_move_from_kube_proxy_and_back(running: Deployed) -> None:
    """docs/migrate.md's steps on a node that has kube-proxy's rules, its ConfigMap being ours; nothing is lost."""
    kubelet = running.kubelets["node1"]
    inside = ("ip", "netns", "exec", running.lab.node("node1").netns)
    kube = re.findall(r":(KUBE-\S+)", KUBE_RULES)

    def rules(add: bool) -> None:
        if add:
            machine.run(
                [*inside, "iptables-restore", "-n"], input=KUBE_RULES.replace("WEB:", f"{running.addresses['web-1']}:")
            )
            return
        gone = [line.replace("-A ", "-D ", 1) for line in KUBE_RULES.splitlines()
                if re.match("-A (PREROUTING|OUTPUT|POSTROUTING)", line)]  # fmt: skip
        gone += [f"-F {chain}" for chain in kube] + [f"-X {chain}" for chain in kube]
        machine.run([*inside, "iptables-restore", "-n"], input="\n".join(["*nat", *gone, "COMMIT", ""]))

    def ours() -> str:
        return machine.run([*inside, "sh", "-c", "nft list tables; iptables-save"]).stdout

    kubelet.end(running.pods["pyproxy", "node1"])
    assert kubelet.debug(NAME, "pyproxy", "--cleanup", "--mode=nftables")[0] == 0
    assert "PYNET" not in ours()
    assert "pynet-proxy" not in ours()
    rules(add=True)
    settings = running.place / "deploy/config/pyproxy.yaml"
    before = settings.read_text()
    settings.write_text(KUBEADM)
    running.kubectl("apply", "-k", str(running.place / "deploy"))
    try:
        with under_load(running, "from kube-proxy and back"):
            pod = running.run("pyproxy", "node1")
            rules(add=False)
            kubelet.end(pod)
            rules(add=True)
            assert kubelet.debug(NAME, "pyproxy", "--cleanup", "--mode=nftables")[0] == 0
            assert "KUBE-SVC-WEB" in ours()
            assert "PYNET" not in ours()
            assert "pynet-proxy" not in ours()
            running.run("pyproxy", "node1")
            rules(add=False)
    finally:
        settings.write_text(before)
        running.kubectl("apply", "-k", str(running.place / "deploy"))
        running.replace("pyproxy", "node1")


def test_pods_move_back_from_pynet(running: Deployed) -> None:
    """The node is empty, the agent is gone: of ours nothing stays, and the configuration of before is whole."""
    kubelet = running.kubelets["node2"]
    netns = running.lab.node("node2").netns
    conf = running.place / "node2" / "conf"
    (conf / "10-flannel.conflist").write_text("{}")
    kubelet.end(running.pods["pynetd", "node2"])
    cleanup = ("pynetd", "--cleanup", "--state-dir=/host/run/pynet", "--cni-conf-dir=/host/etc/cni/net.d")
    code, said = kubelet.debug(NAME, *cleanup)
    assert code == 0, said
    assert os.listdir(conf) == ["10-flannel.conflist"]
    (conf / "10-flannel.conflist").unlink()
    assert machine.run(["ip", "-n", netns, "route", "show", "proto", "112"]).stdout == ""
    assert "pynet" not in machine.run(["ip", "netns", "exec", netns, "nft", "list", "tables"]).stdout.replace(
        "pynet-proxy", ""
    )
    running.run("pynetd", "node2")
