"""What traffic meets in userspace mode: the rules lead it to the doors, the doors to endpoints that answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from proxy.modes.userspace.mode import Options, UserspaceMode
from proxy.plan import (
    Action,
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    LocalKind,
    NodeSettings,
    Plan,
    PlanChange,
    ServerKey,
    Verdict,
    VirtualServer,
)
from support.netns import Names
from support.servicenet import REFUSED, SILENCE, ServiceNet, inside

pytestmark = pytest.mark.root

CLUSTER, LOCAL, DROP, REJECT = (
    Verdict(action) for action in (Action.CLUSTER, Action.LOCAL, Action.DROP, Action.REJECT)
)
SETTINGS = {
    family: NodeSettings(detector=LocalDetector(LocalKind.CIDR, (pods,)))
    for family, pods in ((Family.V4, "10.244.0.0/16"), (Family.V6, "fd00:244::/32"))
}
POD1, POD2, FAR = (Endpoint(a, 8080, local=a[7] == "1") for a in ("10.244.1.2", "10.244.1.3", "10.244.2.2"))
V6 = tuple(Endpoint(a, 8080) for a in ("fd00:244:1::2", "fd00:244:1::3", "fd00:244:2::2"))
DEAD = Endpoint("10.244.1.2", 9)  # nothing listens: refused at once
SILENT = Endpoint("10.244.9.9", 8080)  # nobody there: no answer


def every(kind: FrontendKind, address: str, port: int, verdict: Verdict = CLUSTER, **more: object) -> Frontend:
    return Frontend(kind, address, port, verdict, verdict, verdict, **more)  # type: ignore[arg-type]


def server(name: str, *frontends: Frontend, to: tuple[Endpoint, ...] = (POD1, FAR), **more: object) -> VirtualServer:
    protocol = str(more.pop("protocol", "TCP"))
    near = tuple(endpoint for endpoint in to if endpoint.local)
    return VirtualServer(ServerKey(f"default/{name}", "", protocol), frontends, to, near, **more)  # type: ignore[arg-type]


def plan_of(*servers: VirtualServer, family: Family = Family.V4) -> Plan:
    return Plan(family, SETTINGS[family], {each.key: each for each in servers})


CLUSTER_IP, NODE_PORT, BALANCER = FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT, FrontendKind.LOAD_BALANCER
PLAIN = server("plain", every(CLUSTER_IP, "10.96.0.1", 80), every(NODE_PORT, "", 30080))
PLAIN6 = server("plain", every(CLUSTER_IP, "fd00:96::1", 80), every(NODE_PORT, "", 30080), to=V6)
POLICY = server(
    "policy",
    Frontend(NODE_PORT, "", 30081, CLUSTER, CLUSTER, LOCAL),
    Frontend(BALANCER, "203.0.113.2", 80, CLUSTER, CLUSTER, LOCAL),
)
NO_LOCAL = server("no-local", Frontend(NODE_PORT, "", 30082, CLUSTER, CLUSTER, DROP), to=(FAR,))
EMPTY = server("empty", every(CLUSTER_IP, "10.96.0.4", 80, REJECT), every(NODE_PORT, "", 30083, REJECT), to=())
RANGED = server("ranged", every(BALANCER, "203.0.113.5", 80, source_ranges=("192.168.77.2/32", "10.244.0.0/16")))
DATAGRAMS = server("dns", every(CLUSTER_IP, "10.96.0.6", 53), to=(Endpoint("10.244.1.2", 5353),), protocol="UDP")
STICKY = server("sticky", every(CLUSTER_IP, "10.96.0.8", 80), to=(POD1, POD2, FAR), affinity_seconds=60)
RETRY = server("retry", every(CLUSTER_IP, "10.96.0.9", 80), to=(DEAD, FAR))
WAIT = server("wait", every(CLUSTER_IP, "10.96.0.10", 80), to=(SILENT, FAR))
UDP_RETRY = server(
    "udp-retry",
    every(CLUSTER_IP, "10.96.0.11", 53),
    to=(Endpoint("10.244.1.2", 9), Endpoint("10.244.2.2", 5353)),
    protocol="UDP",
)
ALL = (PLAIN, POLICY, NO_LOCAL, EMPTY, RANGED, DATAGRAMS, STICKY, RETRY, WAIT, UDP_RETRY)


class Lab:
    def __init__(self, names: Names) -> None:
        self.net = ServiceNet(names)
        for name in ("pod1", "pod2", "far"):
            self.net.servers.add(self.net[name], name, 8080)
            self.net.servers.add(self.net[name], name, 5353, "UDP")
        self.net.servers.add(self.net["node"], "host", 22)
        self.net.servers.start()
        with inside(self.net.node):
            self.mode = UserspaceMode(Options())

    def do(self, work: Callable[[], object]) -> object:
        with inside(self.net.node):
            return work()

    def asked(self, client: str, address: str, port: int = 80, times: int = 6, protocol: str = "TCP") -> set[str]:
        return {self.net.ask(client, address, port, protocol).server for _ in range(times)}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    names = Names()
    made = Lab(names)
    try:
        made.do(lambda: made.mode.sync([plan_of(*ALL), plan_of(PLAIN6, family=Family.V6)]))
        yield made
        made.do(made.mode.cleanup)
        assert "pynet" not in made.net.node.run("nft", "list", "ruleset")
    finally:
        made.net.close()
        names.close()


@pytest.fixture
def standing(lab: Lab) -> Iterator[Lab]:
    """The lab, put back afterwards."""
    yield lab
    lab.do(lambda: lab.mode.sync([plan_of(*ALL), plan_of(PLAIN6, family=Family.V6)]))


@pytest.mark.parametrize("client", ["pod2", "node", "other", "outside"])
@pytest.mark.parametrize(
    ("address", "port", "servers"),
    [
        ("10.96.0.1", 80, {"pod1", "far"}),
        ("192.168.77.1", 30080, {"pod1", "far"}),
        ("fd00:96::1", 80, {"pod1", "pod2", "far"}),
        ("fd00:77::1", 30080, {"pod1", "pod2", "far"}),
    ],
)
def test_every_origin_reaches_every_endpoint(lab: Lab, client: str, address: str, port: int, servers: set[str]) -> None:
    assert lab.asked(client, address, port) == servers


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_node_ports_on_loopback(lab: Lab, address: str) -> None:
    assert lab.asked("node", address, 30080) >= {"pod1", "far"}


@pytest.mark.parametrize(
    ("client", "address", "port", "servers"),
    [
        ("outside", "192.168.77.1", 30081, {"pod1"}),
        ("outside", "203.0.113.2", 80, {"pod1"}),
        ("pod2", "203.0.113.2", 80, {"pod1", "far"}),
        ("node", "192.168.77.1", 30081, {"pod1", "far"}),
        ("pod2", "192.168.77.1", 30082, {"far"}),
    ],
)
def test_policies(lab: Lab, client: str, address: str, port: int, servers: set[str]) -> None:
    assert lab.asked(client, address, port) == servers


def test_no_local_endpoint_is_silence(lab: Lab) -> None:
    assert lab.net.ask("outside", "192.168.77.1", 30082, wait=0.5) == SILENCE


@pytest.mark.parametrize("client", ["pod2", "node", "outside"])
@pytest.mark.parametrize(("address", "port"), [("10.96.0.4", 80), ("192.168.77.1", 30083), ("10.96.0.1", 22)])
def test_refused(lab: Lab, client: str, address: str, port: int) -> None:
    assert lab.net.ask(client, address, port) == REFUSED


@pytest.mark.parametrize(("client", "answers"), [("other", True), ("outside", False), ("pod2", True), ("node", False)])
def test_source_ranges(lab: Lab, client: str, answers: bool) -> None:
    found = lab.net.ask(client, "203.0.113.5", 80, wait=5 if answers else 0.5)
    assert (found.server in ("pod1", "far")) if answers else found == SILENCE


def test_affinity(lab: Lab) -> None:
    for client in ("pod1", "pod2", "outside"):
        assert len(lab.asked(client, "10.96.0.8")) == 1


@pytest.mark.parametrize("address", ["10.96.0.9", "10.96.0.10"])
def test_the_next_endpoint_is_tried(lab: Lab, address: str) -> None:
    """One endpoint refuses, or says nothing: every client gets the other one."""
    assert lab.asked("pod2", address, times=3) == {"far"}


@pytest.mark.parametrize("client", ["pod2", "node", "outside"])
def test_datagrams(lab: Lab, client: str) -> None:
    assert lab.asked(client, "10.96.0.6", 53, protocol="UDP", times=2) == {"pod1"}


def test_datagrams_leave_an_endpoint_that_refuses(lab: Lab) -> None:
    assert lab.asked("pod2", "10.96.0.11", 53, protocol="UDP", times=3) == {"far"}


def test_a_door_takes_only_what_is_led_to_it(lab: Lab) -> None:
    ports = {
        opened.port
        for (family, key), opened in lab.mode._open.items()
        if opened.port and family is Family.V4 and key.server.protocol == "TCP"
    }
    assert lab.net.ask("outside", "192.168.77.1", min(ports), wait=0.5) == SILENCE


def test_audit(standing: Lab) -> None:
    assert standing.do(standing.mode.audit).found == ()  # type: ignore[attr-defined]
    assert not standing.do(standing.mode.tampered)
    standing.net.node.run("nft", "flush chain ip pynet-userspace lead-outside")
    assert standing.do(standing.mode.audit).found  # type: ignore[attr-defined]
    assert standing.asked("outside", "10.96.0.1") == {"pod1", "far"}
    standing.net.node.run("nft", "delete table ip pynet-userspace")
    assert standing.do(standing.mode.tampered)
    standing.do(standing.mode.audit)
    assert standing.do(standing.mode.audit).found == ()  # type: ignore[attr-defined]


def change(old: Plan, *new: VirtualServer, without: tuple[VirtualServer, ...] = ()) -> PlanChange:
    servers = {key: each for key, each in old.servers.items() if key not in {gone.key for gone in without}}
    servers |= {each.key: each for each in new}
    return PlanChange(old, Plan(old.family, old.settings, servers), tuple(each.key for each in (*new, *without)))


def test_updates(standing: Lab) -> None:
    moved = msgspec.structs.replace(PLAIN, cluster=(POD2,), frontends=PLAIN.frontends[:1])
    more = server("more", every(CLUSTER_IP, "10.96.0.20", 80), to=(FAR,))
    first = change(plan_of(*ALL), moved, more, without=(EMPTY,))
    standing.do(lambda: standing.mode.update([first]))
    assert standing.asked("outside", "10.96.0.1", times=2) == {"pod2"}
    assert standing.asked("pod1", "10.96.0.20", times=2) == {"far"}
    assert standing.net.ask("outside", "192.168.77.1", 30080) == REFUSED
    assert standing.do(standing.mode.audit).found == ()  # type: ignore[attr-defined]


def test_connections_outlive_their_endpoints_removal_unless_the_service_says_reset(standing: Lab) -> None:
    keep = server("keep", every(CLUSTER_IP, "10.96.0.30", 80), to=(Endpoint("10.244.2.2", 7000),))
    reset = server("reset", every(CLUSTER_IP, "10.96.0.31", 80), to=keep.cluster, removal="reset")
    base = plan_of(*ALL, keep, reset)
    with echo(standing, "far", 7000):
        standing.do(lambda: standing.mode.sync([base]))
        with client_of(standing, "pod1", "10.96.0.30") as kept, client_of(standing, "pod1", "10.96.0.31") as ended:
            assert kept.recv(1) == ended.recv(1) == b"!"
            gone = change(base, *(msgspec.structs.replace(each, cluster=(POD2,)) for each in (keep, reset)))
            standing.do(lambda: standing.mode.update([gone]))
            kept.sendall(b"x")
            assert kept.recv(1) == b"x"
            with contextlib.suppress(ConnectionResetError):
                assert ended.recv(1) == b""


A, B = Endpoint("10.244.2.2", 7003), Endpoint("10.244.1.3", 8080)
# what becomes of a Service port with the endpoint A → removal, and whether a connection to A lives on
ENDS = {
    "last": ({"cluster": (), "local": ()}, "reset", False),
    "later": ({"cluster": (B,)}, "drain:0", False),
    "weighed": ({"cluster": (msgspec.structs.replace(A, weight=3), B)}, "reset", True),
    "answering": ({"cluster": (B,), "draining": (A,)}, "reset", True),
    "moved": ({"frontends": (every(CLUSTER_IP, "10.96.0.59", 80),)}, "reset", True),
    "deleted": (None, "reset", False),
    "kept": (None, "keep", True),
}


def test_how_connections_end_is_the_services_to_say(standing: Lab) -> None:
    """Whichever way an endpoint goes; one that only gets another weight, or still answers, has not gone."""
    old = {
        name: server(name, every(CLUSTER_IP, f"10.96.0.{50 + n}", 80), to=(A,), removal=removal)
        for n, (name, (_, removal, _)) in enumerate(ENDS.items())
    }
    new = [msgspec.structs.replace(old[name], **how) for name, (how, _, _) in ENDS.items() if how is not None]
    base = plan_of(*ALL, *old.values())
    with echo(standing, "far", 7003), contextlib.ExitStack() as stack:
        standing.do(lambda: standing.mode.sync([base]))
        held = {name: stack.enter_context(client_of(standing, "pod1", old[name].frontends[0].address)) for name in ENDS}
        assert all(client.recv(1) == b"!" for client in held.values())
        gone = [old[name] for name, (how, _, _) in ENDS.items() if how is None]
        standing.do(lambda: standing.mode.update([change(base, *new, without=tuple(gone))]))
        for name, (_, _, lives) in ENDS.items():
            held[name].settimeout(10 if lives else 30)
            assert echoes(held[name], is_wanted=lives) == lives, name


def test_an_endpoint_that_comes_back_keeps_its_connections(standing: Lab) -> None:
    one = server("back", every(CLUSTER_IP, "10.96.0.60", 80), to=(A,), removal="drain:1")
    base = plan_of(*ALL, one)
    with echo(standing, "far", 7003):
        standing.do(lambda: standing.mode.sync([base]))
        with client_of(standing, "pod1", "10.96.0.60") as client:
            assert client.recv(1) == b"!"  # accepted is not yet dialed
            away = change(base, msgspec.structs.replace(one, cluster=(POD1,)))
            standing.do(lambda: standing.mode.update([away]))
            standing.do(lambda: standing.mode.update([change(away.new, one)]))
            assert (A.address, A.port) not in {backend for _, backend in standing.mode._endings._timers}
            assert echoes(client)


def echoes(client: socket.socket, *, is_wanted: bool = True) -> bool:
    """Whether the connection lives; where that is not wanted, wait for its end."""
    try:
        client.sendall(b"x")
        return client.recv(1) == b"x" and (is_wanted or client.recv(1) != b"")
    except ConnectionError:
        return False


def test_a_flow_of_datagrams_does_not_stay_with_a_closed_door(standing: Lab) -> None:
    """A client that goes on from one port finds the Service again when it has endpoints again, or a new process."""
    to = (Endpoint("10.244.2.2", 5353),)
    one = server("flow", every(CLUSTER_IP, "10.96.0.61", 53), every(NODE_PORT, "", 30061), to=to, protocol="UDP")
    base = plan_of(*ALL, one)
    standing.do(lambda: standing.mode.sync([base]))
    clients = [datagram_client(standing, *where) for where in (("10.96.0.61", 53), ("192.168.77.1", 30061))]
    with contextlib.closing(clients[0]), contextlib.closing(clients[1]):
        assert [answered(each) for each in clients] == ["far", "far"]
        empty = change(base, msgspec.structs.replace(one, cluster=(), local=()))
        standing.do(lambda: standing.mode.update([empty]))
        standing.do(lambda: standing.mode.update([change(empty.new, one)]))
        assert [answered(each) for each in clients] == ["far", "far"]
        heir = standing.do(lambda: UserspaceMode(Options()))
        assert isinstance(heir, UserspaceMode)
        standing.do(lambda: heir.sync([base]))
        assert [answered(each) for each in clients] == ["far", "far"]
    standing.do(heir.cleanup)


def datagram_client(lab: Lab, address: str, port: int) -> socket.socket:
    with inside(lab.net["outside"].namespace):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.connect((address, port))
    made.settimeout(2)
    return made


def answered(client: socket.socket) -> str:
    """Return who answers a datagram; an error that one before has left is passed over."""
    for _ in range(3):
        with contextlib.suppress(ConnectionRefusedError):
            client.send(b"?")
            return client.recv(100).decode().split()[0]
    return ""


def test_half_close_and_a_megabyte_each_way(standing: Lab) -> None:
    """The client ends its half first, and still gets the whole answer."""
    one = server("echo", every(CLUSTER_IP, "10.96.0.40", 80), to=(Endpoint("10.244.2.2", 7001),))
    with echo(standing, "far", 7001, is_late=True):
        standing.do(lambda: standing.mode.sync([plan_of(*ALL, one)]))
        with client_of(standing, "pod1", "10.96.0.40") as client:
            data = bytes(range(256)) * 4096
            sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            sender.start()
            got = b""
            while chunk := client.recv(65536):
                got += chunk
            sender.join()
            assert got == data


@contextlib.contextmanager
def client_of(lab: Lab, name: str, address: str) -> Iterator[socket.socket]:
    with inside(lab.net[name].namespace):
        made = socket.create_connection((address, 80), timeout=10)
    with made:
        yield made


@contextlib.contextmanager
def echo(lab: Lab, name: str, port: int, *, is_late: bool = False) -> Iterator[None]:
    """Echo on a host: at once after a `!`, or (`is_late`) all of it after the client's end."""
    with inside(lab.net[name].namespace):
        listener = socket.create_server(("0.0.0.0", port))

    def serve(one: socket.socket) -> None:
        with one, contextlib.suppress(OSError):
            if is_late:
                got = b""
                while chunk := one.recv(65536):
                    got += chunk
                one.sendall(got)
                return
            one.sendall(b"!")
            while chunk := one.recv(65536):
                one.sendall(chunk)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
