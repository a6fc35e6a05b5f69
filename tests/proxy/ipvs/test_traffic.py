"""What traffic meets in IPVS mode, on a kernel that has it: every origin, every kind of frontend, changes, drains."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import msgspec
import pytest

from proxy.modes.ipvs.mode import IpvsMode, Options
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
from pynet.kernel.ipvs import Ipvs
from support.netns import Names
from support.servicenet import REFUSED, SILENCE, ServiceNet, inside

pytestmark = [pytest.mark.vm, pytest.mark.root]

CLUSTER, LOCAL, DROP, REJECT = (
    Verdict(action) for action in (Action.CLUSTER, Action.LOCAL, Action.DROP, Action.REJECT)
)
MASQUERADED = Verdict(Action.CLUSTER, masquerade=True)
SETTINGS = {
    family: NodeSettings(detector=LocalDetector(LocalKind.CIDR, (pods,)))
    for family, pods in ((Family.V4, "10.244.0.0/16"), (Family.V6, "fd00:244::/32"))
}
POD1, POD2, FAR = (Endpoint(a, 8080, local=a[7] == "1") for a in ("10.244.1.2", "10.244.1.3", "10.244.2.2"))
V6 = tuple(Endpoint(a, 8080) for a in ("fd00:244:1::2", "fd00:244:1::3", "fd00:244:2::2"))


def cluster_ip(address: str, port: int = 80) -> Frontend:
    return Frontend(FrontendKind.CLUSTER_IP, address, port, CLUSTER, MASQUERADED, MASQUERADED)


def every(kind: FrontendKind, address: str, port: int, verdict: Verdict, **more: object) -> Frontend:
    return Frontend(kind, address, port, verdict, verdict, verdict, **more)  # type: ignore[arg-type]


def server(name: str, *frontends: Frontend, to: tuple[Endpoint, ...] = (POD1, FAR), **more: object) -> VirtualServer:
    protocol = str(more.pop("protocol", "TCP"))
    near = tuple(endpoint for endpoint in to if endpoint.local)
    return VirtualServer(ServerKey(f"default/{name}", "", protocol), frontends, to, near, **more)  # type: ignore[arg-type]


def plan_of(*servers: VirtualServer, family: Family = Family.V4) -> Plan:
    return Plan(family, SETTINGS[family], {each.key: each for each in servers})


PLAIN = server(
    "plain",
    cluster_ip("10.96.0.1"),
    every(FrontendKind.NODE_PORT, "", 30080, MASQUERADED),
    every(FrontendKind.LOAD_BALANCER, "203.0.113.1", 80, MASQUERADED),
)
PLAIN6 = server(
    "plain",
    cluster_ip("fd00:96::1"),
    every(FrontendKind.NODE_PORT, "", 30080, MASQUERADED),
    every(FrontendKind.LOAD_BALANCER, "fd00:113::1", 80, MASQUERADED),
    to=V6,
)
EXTERNAL_LOCAL = server(
    "external-local",
    cluster_ip("10.96.0.2"),
    Frontend(FrontendKind.NODE_PORT, "", 30081, CLUSTER, MASQUERADED, LOCAL),
    Frontend(FrontendKind.LOAD_BALANCER, "203.0.113.2", 80, CLUSTER, MASQUERADED, LOCAL),
    to=(FAR, POD1),
)
NO_LOCAL = server(
    "no-local",
    cluster_ip("10.96.0.3"),
    Frontend(FrontendKind.NODE_PORT, "", 30082, CLUSTER, MASQUERADED, DROP),
    to=(FAR,),
)
EMPTY = server(
    "empty",
    every(FrontendKind.CLUSTER_IP, "10.96.0.4", 80, REJECT),
    every(FrontendKind.NODE_PORT, "", 30083, REJECT),
    to=(),
)
RANGED = server(
    "ranged",
    cluster_ip("10.96.0.5"),
    every(
        FrontendKind.LOAD_BALANCER,
        "203.0.113.5",
        80,
        MASQUERADED,
        source_ranges=("192.168.77.2/32", "10.244.1.3/32"),
    ),
)
DATAGRAMS = server("dns", cluster_ip("10.96.0.6", 53), to=(msgspec.structs.replace(POD1, port=5353),), protocol="UDP")
HAIRPIN = server("hairpin", cluster_ip("10.96.0.7"), to=(POD1,))
STICKY = server("sticky", cluster_ip("10.96.0.8"), to=(POD1, POD2, FAR), affinity_seconds=60)
PORTS = server("sctp", cluster_ip("10.96.0.9"), to=(POD2,), protocol="SCTP")
ALL = (PLAIN, EXTERNAL_LOCAL, NO_LOCAL, EMPTY, RANGED, DATAGRAMS, HAIRPIN, STICKY, PORTS)


def whole() -> list[Plan]:
    """Return what stands in the lab between tests: the plans of both families."""
    return [plan_of(*ALL), plan_of(PLAIN6, family=Family.V6)]


class Lab:
    """The net with the mode on its node."""

    def __init__(self, names: Names) -> None:
        self.net = ServiceNet(names)
        for name in ("pod1", "pod2", "far"):
            self.net.servers.add(self.net[name], name, 8080)
            self.net.servers.add(self.net[name], name, 5353, "UDP")
        self.net.servers.add(self.net["node"], "host", 22)
        self.net.servers.start()
        self.now = 0.0
        with inside(self.net.node):
            self.mode = IpvsMode(Options(), backend="nft", clock=lambda: self.now)

    def do(self, work: Callable[[], object]) -> object:
        with inside(self.net.node):
            return work()

    def asked(self, client: str, address: str, port: int = 80, times: int = 8, protocol: str = "TCP") -> set[str]:
        return {self.net.ask(client, address, port, protocol).server for _ in range(times)}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    names = Names()
    made = Lab(names)
    try:
        made.do(lambda: made.mode.sync(whole()))
        yield made
    finally:
        made.net.close()
        names.close()


@pytest.fixture
def standing(lab: Lab) -> Iterator[Lab]:
    """The lab, put back afterwards."""
    yield lab
    lab.do(lambda: lab.mode.sync(whole()))


@pytest.mark.parametrize("client", ["pod2", "node", "other", "outside"])
@pytest.mark.parametrize(
    ("address", "port"),
    [("10.96.0.1", 80), ("192.168.77.1", 30080), ("203.0.113.1", 80), ("fd00:96::1", 80), ("fd00:77::1", 30080)],
)
def test_every_origin_reaches_every_endpoint(lab: Lab, client: str, address: str, port: int) -> None:
    assert lab.asked(client, address, port, times=6) == ({"pod1", "pod2", "far"} if ":" in address else {"pod1", "far"})


@pytest.mark.parametrize(
    ("client", "address", "port", "servers"),
    [
        ("outside", "192.168.77.1", 30081, {"pod1"}),
        ("outside", "203.0.113.2", 80, {"pod1"}),
        ("other", "192.168.77.1", 30081, {"pod1"}),
        ("pod2", "192.168.77.1", 30081, {"pod1", "far"}),
        ("pod2", "203.0.113.2", 80, {"pod1", "far"}),
        ("node", "192.168.77.1", 30081, {"pod1", "far"}),
        ("node", "203.0.113.2", 80, {"pod1", "far"}),
    ],
)
def test_external_policy_local(lab: Lab, client: str, address: str, port: int, servers: set[str]) -> None:
    assert lab.asked(client, address, port, times=6) == servers


@pytest.mark.parametrize(
    ("client", "address", "port", "source"),
    [
        ("pod2", "10.96.0.1", 80, "10.244.1.3"),  # a pod keeps its address
        ("pod2", "203.0.113.2", 80, "10.244.1.3"),
        ("outside", "192.168.77.1", 30081, "192.168.77.100"),  # policy Local keeps the client's
        ("outside", "203.0.113.2", 80, "192.168.77.100"),
    ],
)
def test_the_source_is_kept(lab: Lab, client: str, address: str, port: int, source: str) -> None:
    assert {lab.net.ask(client, address, port).source for _ in range(4)} == {source}


@pytest.mark.parametrize(
    ("client", "address", "port"),
    [
        ("outside", "10.96.0.1", 80),
        ("outside", "192.168.77.1", 30080),
        ("node", "10.96.0.1", 80),
        ("node", "203.0.113.2", 80),
    ],
)
def test_the_source_becomes_the_nodes(lab: Lab, client: str, address: str, port: int) -> None:
    sources = {lab.net.ask(client, address, port).source for _ in range(4)}
    assert sources <= {"192.168.77.1", "10.244.1.1"}


def test_no_local_endpoint_is_silence_for_the_outside_only(lab: Lab) -> None:
    assert lab.net.ask("outside", "192.168.77.1", 30082, wait=1.5) == SILENCE
    assert lab.asked("pod2", "192.168.77.1", 30082, times=2) == {"far"}
    assert lab.asked("node", "192.168.77.1", 30082, times=2) == {"far"}


@pytest.mark.parametrize("client", ["pod2", "node", "outside"])
@pytest.mark.parametrize(("address", "port"), [("10.96.0.4", 80), ("192.168.77.1", 30083), ("10.96.0.1", 22)])
def test_refused(lab: Lab, client: str, address: str, port: int) -> None:
    """A Service without endpoints, and a port of the host on a cluster IP."""
    assert lab.net.ask(client, address, port) == REFUSED


@pytest.mark.parametrize(
    ("client", "answers"), [("other", True), ("outside", False), ("pod2", True), ("pod1", False), ("node", False)]
)
def test_source_ranges(lab: Lab, client: str, answers: bool) -> None:
    found = lab.net.ask(client, "203.0.113.5", 80, wait=5 if answers else 1.5)
    assert (found.server in ("pod1", "far")) if answers else found == SILENCE


def test_datagrams(lab: Lab) -> None:
    assert lab.asked("pod2", "10.96.0.6", 53, protocol="UDP", times=2) == {"pod1"}
    assert lab.asked("outside", "10.96.0.6", 53, protocol="UDP", times=2) == {"pod1"}


def test_hairpin(lab: Lab) -> None:
    found = lab.net.ask("pod1", "10.96.0.7", 80)
    assert found.server == "pod1" and found.source != "10.244.1.2"


def test_affinity(lab: Lab) -> None:
    for client in ("pod1", "pod2", "node", "outside"):
        assert len(lab.asked(client, "10.96.0.8", times=6)) == 1


def test_an_audit_of_what_was_written_finds_nothing(standing: Lab) -> None:
    assert standing.do(standing.mode.audit).found == ()  # type: ignore[attr-defined]
    assert not standing.do(standing.mode.tampered)


DAMAGES = (
    ("ipvsadm -D -t 10.96.0.7:80", "TCP 10.96.0.7:80"),
    ("ipvsadm -d -t 10.96.0.1:80 -r 10.244.1.2:8080", "10.244.1.2:8080"),
    ("iptables-nft -t mangle -F PYNET-IPVS-POLICY", "PYNET-IPVS-POLICY differs"),
    ("iptables-nft -t nat -D PREROUTING -j PYNET-IPVS-MARK", "nat PREROUTING does not jump"),
    ("ipset flush PYNET-MASQ-OUT", "PYNET-MASQ-OUT 10.96.0.1,tcp:80"),
    ("ip addr del 10.96.0.1/32 dev pynet-ipvs", "address 10.96.0.1 was missing"),
)


def test_an_audit_repairs(standing: Lab) -> None:
    for command, _ in DAMAGES:
        standing.net.node.run(*command.split())
    found = "\n".join(what for _, what in standing.do(standing.mode.audit).found)  # type: ignore[attr-defined]
    for command, named in DAMAGES:
        assert named in found, command
    standing.net.node.run("ip", "link", "del", "pynet-ipvs")
    assert standing.do(standing.mode.tampered)
    assert standing.do(standing.mode.audit).found  # type: ignore[attr-defined]
    assert standing.do(standing.mode.audit).found == ()  # type: ignore[attr-defined]
    assert standing.asked("outside", "10.96.0.1", times=4) == {"pod1", "far"}


def change(old: Plan, *new: VirtualServer, without: tuple[VirtualServer, ...] = ()) -> PlanChange:
    servers = {key: each for key, each in old.servers.items() if key not in {gone.key for gone in without}}
    servers |= {each.key: each for each in new}
    return PlanChange(old, Plan(old.family, old.settings, servers), tuple(each.key for each in (*new, *without)))


def test_updates_leave_what_a_full_pass_leaves(standing: Lab) -> None:
    old = plan_of(*ALL)
    changed = msgspec.structs.replace(PLAIN, cluster=(POD2,), frontends=PLAIN.frontends[:2])
    more = server(
        "more", cluster_ip("10.96.0.20"), Frontend(FrontendKind.NODE_PORT, "", 30090, CLUSTER, MASQUERADED, LOCAL)
    )
    first = change(old, changed, more, without=(RANGED, EMPTY))
    second = change(first.new, EMPTY, msgspec.structs.replace(more, affinity_seconds=30))
    standing.do(lambda: standing.mode.update([first]))
    standing.do(lambda: standing.mode.update([second]))
    standing.now += 4000
    standing.do(standing.mode.tampered)  # what drained goes
    assert standing.do(standing.mode.audit).found == ()  # type: ignore[attr-defined]
    assert standing.asked("outside", "10.96.0.1", times=2) == {"pod2"}
    assert len(standing.asked("outside", "10.96.0.20", times=4)) == 1
    assert standing.net.ask("outside", "203.0.113.1", 80, wait=1.5) in (SILENCE, REFUSED)


def test_an_endpoint_drains_and_comes_back(standing: Lab) -> None:
    lab, old = standing, plan_of(*ALL)
    with inside(lab.net["pod2"].namespace):
        held = socket.create_connection(("10.96.0.7", 80), timeout=5)
    with contextlib.closing(held):
        held.recv(100)
        gone = change(old, msgspec.structs.replace(HAIRPIN, cluster=(POD2,), local=(POD2,)))
        lab.do(lambda: lab.mode.update([gone]))
        assert lab.asked("pod2", "10.96.0.7", times=3) == {"pod2"}
        table = lab.net.node.run("ipvsadm", "-Ln", "-t", "10.96.0.7:80").split()
        assert table[table.index("10.244.1.2:8080") + 2] == "0"
        back = change(gone.new, HAIRPIN)
        lab.do(lambda: lab.mode.update([back]))
        assert lab.asked("outside", "10.96.0.7", times=3) == {"pod1"}
        again = change(back.new, msgspec.structs.replace(HAIRPIN, cluster=(POD2,), local=(POD2,)))
        lab.do(lambda: lab.mode.update([again]))
        lab.do(lab.mode.tampered)
        assert "10.244.1.2:8080" in lab.net.node.run("ipvsadm", "-Ln", "-t", "10.96.0.7:80")
        lab.now += 4000  # past the limit
        lab.do(lab.mode.tampered)
        assert "10.244.1.2:8080" not in lab.net.node.run("ipvsadm", "-Ln", "-t", "10.96.0.7:80")


def test_datagrams_leave_a_removed_endpoint(standing: Lab) -> None:
    lab = standing
    with inside(lab.net["pod2"].namespace):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.connect(("10.96.0.6", 53))
    client.settimeout(0.5)

    def answer() -> str:
        for _ in range(10):
            client.send(b"?")
            with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                return client.recv(100).decode().split()[0]
        return ""

    with client:
        assert answer() == "pod1"
        far = msgspec.structs.replace(FAR, port=5353)
        lab.do(lambda: lab.mode.update([change(plan_of(*ALL), msgspec.structs.replace(DATAGRAMS, cluster=(far,)))]))
        assert "far" in {answer() for _ in range(3)}


def test_foreign_servers_stay(standing: Lab) -> None:
    node = standing.net.node
    node.run("ipvsadm", "-A", "-t", "192.168.77.1:9999", "-s", "rr")
    node.run("ipvsadm", "-A", "-t", "192.168.77.1:31000", "-s", "wlc")
    clash = server("clash", cluster_ip("10.96.0.30"), every(FrontendKind.NODE_PORT, "", 31000, MASQUERADED))
    standing.do(lambda: standing.mode.update([change(plan_of(*ALL), clash)]))
    table = node.run("ipvsadm", "-Ln")
    assert "192.168.77.1:9999 rr" in table and "192.168.77.1:31000 wlc" in table
    node.run("ipvsadm", "-D", "-t", "192.168.77.1:31000")
    for _ in range(2):  # nothing is in the way any more
        standing.do(standing.mode.audit)
        assert "192.168.77.1:31000 rr" in node.run("ipvsadm", "-Ln")
    standing.do(standing.mode.cleanup)
    table = node.run("ipvsadm", "-Ln")
    assert "192.168.77.1:9999 rr" in table and "31000" not in table and "10.96" not in table
    node.run("ipvsadm", "-C")
    left = node.run("iptables-nft-save") + node.run("ip6tables-nft-save") + node.run("ipset", "list", "-n")
    assert "PYNET" not in left and "pynet" not in node.run("ip", "link")


def test_an_address_that_the_node_gets_serves_node_ports(standing: Lab) -> None:
    node = standing.net.node
    node.run("ip", "addr", "add", "192.168.77.50/24", "dev", "eth0")
    assert standing.do(standing.mode.tampered)
    standing.do(standing.mode.audit)
    assert standing.asked("outside", "192.168.77.50", 30080, times=4) == {"pod1", "far"}
    node.run("ip", "addr", "del", "192.168.77.50/24", "dev", "eth0")


def test_a_new_process_adopts_what_is_there(standing: Lab) -> None:
    with inside(standing.net.node):
        heir = IpvsMode(Options(exclude_cidrs=("10.96.0.7/32",)), backend="nft")  # a Service's is a Service's still
        heir.sync(whole())
        assert heir.sync(whole()).objects == 0
        assert standing.asked("outside", "10.96.0.7", times=1) == {"pod1"}
        assert not heir.lacking(["rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh"])
        assert heir.lacking(["nosuch"]) == {"nosuch"}


def test_a_thousand_services_in_one_pass(netns: Names) -> None:
    node = netns("node")
    many = [
        server(f"many-{index}", cluster_ip(f"10.97.{index // 250}.{index % 250 + 1}"), to=(POD1,))
        for index in range(1000)
    ]
    with inside(node):
        mode = IpvsMode(Options(), backend="nft")
        written = mode.sync([plan_of(*many)])
        print(f"render {written.render_seconds:.2f} s, apply {written.apply_seconds:.2f} s")
        assert len(Ipvs().services()) == 1000  # ipvsadm lists once, and may miss some (Ipvs.glance)
        assert len(node.run("ip", "-o", "addr", "show", "dev", "pynet-ipvs").splitlines()) >= 1000
