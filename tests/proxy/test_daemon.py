"""The daemon `pyproxy` as a whole: start, sources, restarts, intruders, changes of mode under load, clean-up."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pynet.objects import (
    EndpointAddress,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    EndpointSubset,
    Metadata,
    Object,
)
from support.netns import Names, programs
from support.objects import endpoint, piece, service
from support.servicenet import REFUSED, ServiceNet, inside

pytestmark = pytest.mark.root

# kube-proxy 1.36, as it counts in iptables mode
KUBE_PROXY_METRICS = [
    *(f"kubeproxy_sync_{which}proxy_rules_duration_seconds_bucket" for which in ("", "full_", "partial_")),
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_network_programming_duration_seconds_bucket",
    *(f"kubeproxy_sync_proxy_rules_{what}_changes_{how}"
      for what in ("endpoint", "service") for how in ("pending", "total")),
    *(f"kubeproxy_sync_proxy_rules_iptables_{what}"
      for what in ("total", "last", "restore_failures_total", "partial_restore_failures_total")),
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total", "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total", "kubeproxy_conntrack_reconciler_sync_duration_seconds_bucket",
    "kubeproxy_conntrack_reconciler_deleted_entries_total",
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
]  # fmt: skip
VIP, PORT, NODE_PORT = "10.96.0.1", 80, 30080
HERE, FAR = ("10.244.1.2", "10.244.1.3"), "10.244.2.2"


def eventually(what: Callable[[], Any], seconds: float = 20) -> Any:
    """Return what `what` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.02)
    return found


class Daemon:
    """pyproxy in the net's node, with a folder of manifests."""

    def __init__(self, net: ServiceNet, folder: Path) -> None:
        self.net = net
        self.folder = folder
        self.manifests = folder / "manifests"
        self.manifests.mkdir()
        self.process: subprocess.Popen[str] | None = None
        self.log = folder / "log"

    def apply(self, name: str, *objects: Object) -> None:
        documents = [{"apiVersion": "discovery.k8s.io/v1" if isinstance(each, EndpointSlice) else "v1",
                      **msgspec.to_builtins(each)} for each in objects]  # fmt: skip
        beside = self.folder / "new"
        beside.write_text("\n---\n".join(json.dumps(document) for document in documents))
        beside.rename(self.manifests / f"{name}.yaml")

    def start(self, *flags: str, mode: str = "iptables", wait: bool = True) -> None:
        command = [
            str(programs() / "pyproxy"), f"--mode={mode}", "--manifests", str(self.manifests),
            "--hostname-override", "node", "--cluster-cidr", "10.244.0.0/16", *flags,
        ]  # fmt: skip
        with self.log.open("a") as log:
            self.process = self.net.node.start(*command, stderr=log)
        if wait:
            eventually(lambda: self.get("/healthz", 10256)[0] == 200)

    def stop(self, how: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(how)
        return self.process.wait(20)

    def get(self, path: str, port: int = 10249) -> tuple[int, str]:
        with inside(self.net.node):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError:
                return 0, ""

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def cleanup(self) -> None:
        self.net.node.run(str(programs() / "pyproxy"), "--cleanup")


@pytest.fixture(scope="module")
def net() -> Iterator[ServiceNet]:
    names = Names()
    built = None
    try:
        built = ServiceNet(names)
        for host in ("pod1", "pod2", "far"):
            built.servers.add(built[host], host, 8080)
            built.servers.add(built[host], host, 8080, "UDP")
        built.servers.start()
        yield built
    finally:
        if built:
            built.close()
        names.close()


@pytest.fixture
def daemon(net: ServiceNet, tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(net, tmp_path)
    try:
        yield made
    finally:
        if made.process and made.process.poll() is None:
            made.stop()
        wipe(net)


def wipe(net: ServiceNet) -> None:
    """Empty the node of rules, in a quicker way than the daemon's own."""
    empty = "".join(f"*{table}\nCOMMIT\n" for table in ("filter", "nat"))
    for program in ("iptables-legacy-restore", "ip6tables-legacy-restore"):
        net.node.run(program, input=empty)
    net.node.run("nft", "flush", "ruleset")


def rules_left(net: ServiceNet) -> list[str]:
    """Return what of ours is left in the node."""
    commands = ("iptables-legacy-save", "ip6tables-legacy-save", "nft list ruleset")
    text = "".join(net.node.run(*words.split()) for words in commands)
    return [line for line in text.splitlines() if "PYNET" in line or "pynet" in line]


def server_of(net: ServiceNet, client: str, address: str, port: int) -> str:
    """Return who answers; "silence" also where nobody knows the way."""
    try:
        return net.ask(client, address, port, wait=1).server
    except OSError:
        return "silence"


def web(**spec: Any) -> Object:
    return service("web", VIP, {"name": "http", "port": PORT, "nodePort": NODE_PORT}, **spec)


def pods(*addresses: str) -> Object:
    return piece("web", *(endpoint(each, "other" if each == FAR else "node") for each in addresses))


class Load:
    """Connects again and again until it is stopped; a connection that is held open is used all the while."""

    def __init__(self, net: ServiceNet) -> None:
        self._net = net
        self._stop = threading.Event()
        self.failures: list[object] = []
        self.count = 0
        clients = [("pod1", VIP, PORT), ("outside", net["node"].v4, NODE_PORT), ("node", VIP, PORT)]
        self._threads = [threading.Thread(target=self._ask, args=client) for client in clients]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: str, address: str, port: int) -> None:
        while not self._stop.is_set():
            try:
                answer = self._net.ask(client, address, port, wait=5)
            except OSError as error:
                self.failures.append((client, error))
                continue
            self.count += 1
            if answer.server not in ("pod1", "pod2", "far"):
                self.failures.append((client, answer))
            time.sleep(0.002)


@contextlib.contextmanager
def held_connection(net: ServiceNet) -> Iterator[Callable[[], bool]]:
    """A connection from outside through a node port to an echo server of pod2; yields whether it still answers."""
    with inside(net["pod2"].namespace):
        server = socket.create_server(("0.0.0.0", 9999))
    with inside(net["outside"].namespace):
        client = socket.create_connection((net["node"].v4, 30099), timeout=5)
    accepted, _ = server.accept()
    accepted.settimeout(5)

    def works() -> bool:
        client.sendall(b"ping")
        accepted.sendall(accepted.recv(4))
        return client.recv(4) == b"ping"

    with server, client, accepted:
        yield works


def echo() -> tuple[Object, Object]:
    made = service("echo", "10.96.0.9", {"name": "http", "port": 9999, "nodePort": 30099})
    return made, piece("echo", endpoint(HERE[1], "node"), ports=(("http", "TCP", 9999),))


def test_a_start_changes_and_a_broken_file(net: ServiceNet, daemon: Daemon) -> None:
    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start()
    assert daemon.get("/proxyMode") == (200, "iptables")
    assert daemon.get("/livez", 10256)[0] == 200
    configz = json.loads(daemon.get("/configz")[1])
    assert configz["pynet"]["node_name"] == configz["kubeproxy.config.k8s.io"]["hostnameOverride"] == "node"
    assert daemon.get("/healthz") == (200, "ok"), "this address does not say how the node is"
    assert "\nkube-proxy statusz\n" in daemon.get("/statusz")[1] and "\nUp: 0 hr 00 min " in daemon.get("/statusz")[1]
    flagz = daemon.get("/flagz")[1].splitlines()
    assert {"kube-proxy flagz", "hostname-override=node", "proxy-mode=iptables", "conntrack-min=131072"} <= {*flagz}
    assert net.ask("outside", net["node"].v4, NODE_PORT) == ("pod1", "10.244.1.1")
    assert net.ask("node", "127.0.0.1", NODE_PORT).server == "pod1"
    counted = daemon.get("/metrics")[1]
    assert {name for name in KUBE_PROXY_METRICS if not re.search(rf"^{name}[{{ ]", counted, re.MULTILINE)} == set()
    assert daemon.metric("kubeproxy_iptables_localhost_nodeports_accepted_packets_total") == 1
    assert daemon.metric('kubeproxy_sync_proxy_rules_service_changes_pending{ip_family="IPv4"}') == 0
    daemon.apply("web", web(), pods(FAR))
    eventually(lambda: net.ask("pod1", VIP, PORT).server == "far")
    daemon.apply("web", web(), pods())
    eventually(lambda: net.ask("pod1", VIP, PORT) == REFUSED)
    daemon.apply("web", web(), pods(HERE[1]))
    eventually(lambda: net.ask("pod1", VIP, PORT).server == "pod2")
    (daemon.manifests / "web.yaml").write_text("kind: Service\n  broken: [")
    daemon.apply("other", service("bad", "10.96.0.300"), service("ok", "10.96.0.2"), piece("ok", FAR))
    eventually(lambda: server_of(net, "pod1", "10.96.0.2", PORT) == "far")
    assert net.ask("pod1", VIP, PORT).server == "pod2", "a broken file takes nothing down"
    assert daemon.metric("pyproxy_bad_objects_total") >= 1
    assert "10.96.0.300" in daemon.log.read_text()
    assert daemon.stop() == 0
    assert net.ask("pod1", VIP, PORT).server == "pod2", "the rules outlive the daemon"


def test_killed_and_restarted_under_load_nothing_fails(net: ServiceNet, daemon: Daemon) -> None:
    daemon.apply("web", web(), pods(*HERE, FAR))
    daemon.apply("echo", *echo())
    daemon.start()
    with held_connection(net) as works, Load(net) as load:
        for _ in range(2):
            daemon.stop(signal.SIGKILL)
            daemon.apply("web", web(), pods(*HERE))
            daemon.start()
            assert works()
    assert load.failures == []
    assert load.count > 20


@pytest.mark.parametrize("backend", ["legacy", "nft"])
def test_an_intruders_flush_is_repaired_within_seconds(net: ServiceNet, daemon: Daemon, backend: str) -> None:
    daemon.apply("web", web(), pods(*HERE))
    daemon.start(f"--iptables-backend={backend}")

    def rules() -> list[str]:
        saved = net.node.run(f"iptables-{backend}-save")
        return sorted(line for line in saved.splitlines() if "PYNET-" in line and line.startswith("-A"))

    before = rules()
    for harm in (["-t", "nat", "-F"], ["-F", "INPUT"], ["-t", "nat", "-F", "PYNET-IPS"]):
        net.node.run(f"iptables-{backend}", *harm)
        eventually(lambda: rules() == before)
        assert server_of(net, "pod1", VIP, PORT) in ("pod1", "pod2")
    assert daemon.metric("pyproxy_tampered_total") > 0


MODES = [("iptables", "nftables"), ("nftables", "iptables"), ("iptables-legacy", "iptables-nft")]


@pytest.mark.parametrize(("first", "second"), MODES)
def test_a_change_of_mode_under_load_fails_nothing(net: ServiceNet, daemon: Daemon, first: str, second: str) -> None:
    daemon.apply("web", web(), pods(*HERE, FAR))
    daemon.apply("echo", *echo())

    def start(name: str) -> None:
        mode, _, backend = name.partition("-")
        daemon.start(*([f"--iptables-backend={backend}"] if backend else []), mode=mode)

    def holds(name: str) -> bool:
        if name == "nftables":
            return "table ip pynet-proxy" in net.node.run("nft", "list", "tables")
        backend = name.partition("-")[2] or "nft"
        return "PYNET-SVC" in net.node.run(f"iptables-{backend}-save", "-t", "nat")

    start(first)
    assert holds(first)
    with held_connection(net) as works, Load(net) as load:
        daemon.stop()
        start(second)
        assert not holds(first), "who says that all is well has removed what the other mode left"
        assert holds(second)
        assert works()
    assert load.failures == []
    assert load.count > 20
    assert net.ask("outside", net["node"].v4, NODE_PORT).source in ("10.244.1.1", "192.168.77.1")
    daemon.stop()
    assert rules_left(net)
    daemon.cleanup()
    assert rules_left(net) == []


def test_rolling_replacement_with_terminating_endpoints_fails_nothing(net: ServiceNet, daemon: Daemon) -> None:
    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start()
    ending = endpoint(HERE[0], "node", ready=False, serving=True, terminating=True)
    with Load(net) as load:
        daemon.apply("web", web(), piece("web", ending, endpoint(HERE[1], "node")))
        eventually(lambda: net.ask("pod1", VIP, PORT).server == "pod2")
        daemon.apply("web", web(), pods(HERE[1]))
        daemon.apply("web", web(), piece("web", endpoint(HERE[1], "node", ready=False, serving=True, terminating=True)))
        daemon.apply("web", web(), pods(*HERE))
        eventually(lambda: net.ask("pod1", VIP, PORT).server == "pod1")
    assert load.failures == []


def test_a_service_leaves_us_and_comes_back(net: ServiceNet, daemon: Daemon) -> None:
    def answers(server: str, port: int = NODE_PORT) -> None:
        eventually(lambda: server_of(net, "outside", net["node"].v4, port) == server)

    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start()
    label = "service.kubernetes.io/service-proxy-name"
    for away in (
        web(clusterIP="None", clusterIPs=["None"]),
        web(type="ExternalName", externalName="example.org"),
        service("web", "", {"name": "http", "port": PORT}, type="ExternalName", externalName="example.org"),
        web(labels={label: "another"}),
        web(labels={label: ""}),
        service("web", VIP, {"name": "http", "port": PORT}),
    ):
        answers("pod1")
        daemon.apply("web", away, pods(HERE[0]))
        answers(REFUSED.server)
        daemon.apply("web", web(type="NodePort"), pods(HERE[0]))
    answers("pod1")


def test_endpoints_are_read_while_there_is_no_slice(net: ServiceNet, daemon: Daemon) -> None:
    ports = (EndpointPort(port=8080, name="http"),)
    subsets = (EndpointSubset(addresses=(EndpointAddress(ip=HERE[0]),), ports=ports),)
    daemon.apply("web", web(), Endpoints(Metadata(name="web", namespace="default"), subsets))
    daemon.start()
    assert server_of(net, "far", VIP, PORT) == "pod1"
    for addresses, server in (((HERE[1],), "pod2"), ((), REFUSED.server), (None, "pod1")):
        if addresses is None:
            (daemon.manifests / "slice.yaml").unlink()
        else:
            daemon.apply("slice", pods(*addresses))
        eventually(lambda server=server: server_of(net, "far", VIP, PORT) == server)  # type: ignore[misc]


def test_the_older_of_two_services_has_the_address(net: ServiceNet, daemon: Daemon) -> None:
    def show(name: str, created: str | None, address: str) -> None:
        made = service(name, VIP, {"name": "http", "port": PORT}, created=created)
        daemon.apply(name, made, piece(name, endpoint(address, "node")))

    def answers(server: str) -> None:
        eventually(lambda: server_of(net, "far", VIP, PORT) == server)

    show("b", "2026-01-02T00:00:00Z", HERE[1])
    daemon.start()
    answers("pod2")
    for created, server in (
        ("2026-01-01T00:00:00Z", "pod1"),  # older
        ("2026-01-03T00:00:00Z", "pod2"),  # younger
        ("2026-01-02T00:00:00Z", "pod1"),  # as old: by name
        (None, "pod2"),  # of unknown age
    ):
        show("a", created, HERE[0])
        answers(server)
    assert daemon.metric("pyproxy_contested_frontends") == 1
    (daemon.manifests / "b.yaml").unlink()
    answers("pod1")
    assert daemon.metric("pyproxy_contested_frontends") == 0


def test_health_checks_of_a_service(net: ServiceNet, daemon: Daemon) -> None:
    local = web(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=32123)
    daemon.apply("web", local, pods(*HERE, FAR))
    daemon.start()
    assert eventually(lambda: daemon.get("/anything", 32123)[0]) == 200
    assert json.loads(daemon.get("/", 32123)[1]) == {
        "service": {"namespace": "default", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": True,
    }  # fmt: skip
    ending = endpoint(HERE[0], "node", ready=False, serving=True, terminating=True)
    daemon.apply("web", local, piece("web", ending, endpoint(FAR, "other")))
    eventually(lambda: daemon.get("/", 32123)[0] == 503)
    assert net.ask("outside", net["node"].v4, NODE_PORT).server == "pod1", "a terminating endpoint still answers"
    daemon.apply("web", web(), pods(*HERE))
    eventually(lambda: daemon.get("/", 32123)[0] == 0)


def test_node_ports_are_held(net: ServiceNet, daemon: Daemon) -> None:
    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start("--hold-node-ports")
    eventually(lambda: f":{NODE_PORT}" in net.node.run("ss", "-lntH"))
    assert net.ask("outside", net["node"].v4, NODE_PORT).server == "pod1"
    (daemon.manifests / "web.yaml").unlink()
    eventually(lambda: f":{NODE_PORT}" not in net.node.run("ss", "-lntH"))


def test_udp_clients_follow_their_service(net: ServiceNet, daemon: Daemon) -> None:
    def dns(*addresses: str) -> tuple[Object, Object]:
        made = service("dns", "10.96.0.5", {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053})
        return made, piece("dns", *(endpoint(a, "node") for a in addresses), ports=(("dns", "UDP", 8080),))

    daemon.apply("dns", *dns(HERE[0]))
    daemon.start()
    for client, address, port in (("pod2", "10.96.0.5", 53), ("outside", net["node"].v4, 30053)):
        daemon.apply("dns", *dns(HERE[0]))
        with inside(net[client].namespace):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(0.2)
            sock.connect((address, port))

            def told(sock: socket.socket = sock) -> str:
                with contextlib.suppress(OSError):
                    sock.send(b"?")
                    return sock.recv(100).decode().partition(" ")[0]
                return ""

            eventually(lambda: told() == "pod1")
            daemon.apply("dns", *dns(HERE[1]))
            eventually(lambda: told() == "pod2")
            daemon.apply("dns", *dns())
            eventually(lambda: told() == "")
            daemon.apply("dns", *dns(HERE[0]))
            eventually(lambda: told() == "pod1")


def test_a_state_file_stands_in_for_a_source_that_is_silent(net: ServiceNet, daemon: Daemon) -> None:
    state = daemon.folder / "state"
    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start("--state-file", str(state))
    eventually(state.exists)
    daemon.stop()
    daemon.cleanup()
    assert server_of(net, "pod2", VIP, PORT) == "silence"
    kubeconfig = daemon.folder / "kubeconfig"
    kubeconfig.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }))  # fmt: skip
    command = [str(programs() / "pyproxy"), "--kubeconfig", str(kubeconfig), "--hostname-override", "node",
               "--cluster-cidr", "10.244.0.0/16", "--state-file", str(state)]  # fmt: skip
    with daemon.log.open("a") as log:
        daemon.process = net.node.start(*command, stderr=log)
    eventually(lambda: server_of(net, "pod2", VIP, PORT) == "pod1")


def test_few_privileges_are_kept(net: ServiceNet, daemon: Daemon) -> None:
    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start()
    assert daemon.process
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    kept = {int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("CapPrm", "CapEff", "CapBnd"))}
    assert kept == {1 << 10 | 1 << 12 | 1 << 13}


def test_a_changed_configuration_file_ends_the_daemon(net: ServiceNet, daemon: Daemon) -> None:
    config = daemon.folder / "config.yaml"
    text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    config.write_text(text)
    daemon.apply("web", web(), pods(HERE[0]))
    daemon.start("--config", str(config))
    assert daemon.metric('kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="nat"}') > 10
    config.write_text(text + "iptables: {masqueradeBit: 13}\n")
    assert daemon.process
    assert daemon.process.wait(20) == 0


def test_a_mistake_in_flags_or_file_is_named_and_ends_the_start(net: ServiceNet, daemon: Daemon) -> None:
    for flags, said in (
        (["--mode=bpf"], "--mode"),
        (["--cluster-cidr=x"], "--cluster-cidr"),
        (["--config=/no"], "/no"),
    ):
        done = subprocess.run([programs() / "pyproxy", *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
