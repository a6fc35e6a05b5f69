"""Traffic while the rules change: no new connection fails, no established one breaks. In every kernel mode."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxy.cluster import Cluster
from proxy.flows import Cleaner
from proxy.metrics import Metrics
from proxy.plan import Endpoint, Family, Plan, PlanChange
from support.modes import KERNEL_MODES, made
from support.netns import Names
from support.plans import REJECT, cluster_ip, node_port, plan, server
from support.servicenet import Answer, ServiceNet, inside

pytestmark = pytest.mark.root


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


def web(net: ServiceNet, *hosts: str) -> Plan:
    """Return a plan with one Service on these hosts, and others around it."""
    endpoints = tuple(sorted(Endpoint(net[host].v4, 8080, host != "far") for host in hosts))
    others = (server(f"a/other{n}", cluster_ip(f"10.96.2.{n}", 80), cluster=endpoints[:1]) for n in range(1, 30))
    return plan(server("a/web", cluster_ip("10.96.0.1", 80), node_port(30080), cluster=endpoints), *others)


class Load:
    """A thread that connects to the Service without pause, from outside and from a pod; notes who answered."""

    def __init__(self, net: ServiceNet) -> None:
        self._net = net
        self._stop = threading.Event()
        self.answers: list[Answer] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        targets = itertools.cycle(
            [("outside", "10.96.0.1", 80), ("pod2", "10.96.0.1", 80), ("outside", self._net["node"].v4, 30080)]
        )
        for client, address, port in targets:
            if self._stop.is_set():
                return
            self.answers.append(self._net.ask(client, address, port))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def more(self, count: int = 10) -> None:
        """Wait until so many more connections were tried."""
        goal = len(self.answers) + count
        while len(self.answers) < goal and self._thread.is_alive():
            self._stop.wait(0.002)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        failed = [answer for answer in self.answers if answer.server not in ("pod1", "pod2", "far")]
        assert not failed, f"{len(failed)} of {len(self.answers)}: {failed[:3]}"


class Datagrams:
    """Sockets that send to the UDP Service without pause, each from one port: a pod's, the node's, the outside's."""

    def __init__(self, net: ServiceNet) -> None:
        self._stop = threading.Event()
        self._sockets = []
        for client, address, port in (
            ("pod2", "10.96.0.5", 53),
            ("node", "10.96.0.5", 53),
            ("outside", net["node"].v4, 30053),
        ):
            with inside(net[client].namespace):
                made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.connect((address, port))
            made.settimeout(10)
            self._sockets.append(made)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._send()

    def _send(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):  # refused: it goes on
                each.send(b"?")
            self._stop.wait(0.0005)

    def __enter__(self) -> Datagrams:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for each in self._sockets:
            each.close()

    def expect(self, server: str) -> None:
        """Wait until `server` answers each socket: after what was under way (a full buffer), nobody else may."""
        for each in self._sockets:
            for _ in range(2000):
                with contextlib.suppress(ConnectionRefusedError, PermissionError):
                    if each.recv(200).decode().split()[0] == server:
                        break
            else:
                raise AssertionError(f"{each.getsockname()} to {each.getpeername()}: not answered by {server}")


@contextmanager
def established(net: ServiceNet) -> Iterator[None]:
    """Hold a connection to the Service over what happens inside; it must still carry bytes both ways afterwards."""
    with inside(net["pod1"].namespace):
        listener = socket.create_server((net["pod1"].v4, 9090))
    with inside(net["outside"].namespace):
        client = socket.socket()
    with listener, client:
        client.settimeout(5)
        client.connect(("10.96.0.9", 80))
        served, _ = listener.accept()
        with served:
            served.settimeout(5)
            yield
            client.sendall(b"question")
            assert served.recv(100) == b"question"
            served.sendall(b"answer")
            assert client.recv(100) == b"answer"


def held(net: ServiceNet, base: Plan) -> Plan:
    """Return `base` with the Service that `established` uses."""
    holder = server("a/held", cluster_ip("10.96.0.9", 80), cluster=(Endpoint(net["pod1"].v4, 9090, True),))
    return Plan(base.family, base.settings, {**base.servers, holder.key: holder})


@pytest.fixture
def clean(net: ServiceNet) -> Iterator[None]:
    yield
    with inside(net.node):
        for name in KERNEL_MODES:
            made(name).cleanup()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("name", KERNEL_MODES)
def test_syncs_restarts_and_audits_cost_no_connection(net: ServiceNet, name: str) -> None:
    wanted = held(net, web(net, "pod1", "pod2", "far"))
    with inside(net.node):
        mode = made(name)
        mode.sync([wanted])
        with established(net), Load(net) as load:
            for _ in range(3):
                load.more()
                mode.sync([wanted])
                load.more()
                assert mode.audit().found == ()
                mode = made(name)  # a daemon killed and started again
                mode.sync([wanted])
            load.more()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("name", KERNEL_MODES)
def test_a_rolling_replacement_costs_no_connection(net: ServiceNet, name: str) -> None:
    now = held(net, web(net, "pod1", "pod2"))
    with inside(net.node):
        mode = made(name)
        mode.sync([now])
        with established(net), Load(net) as load:
            for hosts in [
                ("pod1", "pod2", "far"),
                ("pod2", "far"),
                ("far",),
                ("pod1", "far"),
                ("pod1",),
                ("pod1", "pod2"),
            ]:
                then = held(net, web(net, *hosts))
                mode.update([PlanChange(now, then, tuple(then.servers))])
                load.more(3)  # those under way may still go to the endpoints before
                so_far = len(load.answers)
                load.more(9)
                assert {answer.server for answer in load.answers[so_far:]} <= set(hosts)
                now = then


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("name", KERNEL_MODES)
def test_a_client_that_never_stops_sending_datagrams_follows_the_endpoints(net: ServiceNet, name: str) -> None:
    """Each port of a client is one tracked flow: what it meets after the write must not be what it met before."""

    def dns(*hosts: str) -> Plan:
        endpoints = tuple(sorted(Endpoint(net[host].v4, 8080, host != "far") for host in hosts))
        frontends = (cluster_ip("10.96.0.5", 53), node_port(30053))
        if not hosts:
            frontends = (cluster_ip("10.96.0.5", 53, REJECT, REJECT, REJECT), node_port(30053, REJECT, REJECT, REJECT))
        return plan(server("a/dns", *frontends, cluster=endpoints, protocol="UDP"))

    cleaner = Cleaner(Metrics())
    now = dns("pod1")
    with inside(net.node):
        mode = made(name)
        mode.sync([now])
        with Datagrams(net) as clients:
            clients.expect("pod1")
            for hosts in [("far",), ("pod1",), (), ("far",), ("far", "pod1"), ("pod1",), None, ("far",)]:
                then = plan() if hosts is None else dns(*hosts)
                change = PlanChange(now, then, tuple({**now.servers, **then.servers}))
                mode.update([change])
                cleaner.follow(Cluster("node"), [change], ())
                if hosts and len(hosts) == 1:
                    clients.expect(*hosts)
                now = then


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KERNEL_MODES, 2)))
def test_switching_modes_costs_no_connection(net: ServiceNet, first: str, second: str) -> None:
    if "nftables" not in (first, second):
        pytest.skip("two back ends of one mode")
    wanted = held(net, web(net, "pod1", "pod2", "far"))
    six = plan(family=Family.V6)
    with inside(net.node):
        old = made(first)
        old.sync([wanted, six])
        with established(net), Load(net) as load:
            load.more()
            new = made(second)
            new.sync([wanted, six])
            load.more()
            old.cleanup()
            load.more(30)
        assert new.audit().found == ()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("name", KERNEL_MODES)
def test_after_a_cleanup_nothing_is_left(net: ServiceNet, name: str) -> None:
    def rules() -> str:
        programs = (("nft", "list", "ruleset"), ("iptables-legacy-save",), ("ip6tables-legacy-save",))
        text = "".join(net.node.run(*program) for program in programs)
        return "\n".join(line for line in text.splitlines() if "pynet" in line.lower())

    with inside(net.node):
        mode = made(name)
        mode.sync([web(net, "pod1"), plan(family=Family.V6)])
        assert rules()
        made(name).cleanup()
        assert rules() == ""
