"""Packets that sockets seldom send, through every kernel mode: fragments, ICMP errors, SCTP, odd source ports."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Iterator

import pytest

from proxy.modes import Mode
from proxy.plan import Endpoint, Family
from support.modes import KERNEL_MODES, made
from support.netns import Names
from support.plans import cluster_ip, node_port, plan, server
from support.servicenet import REFUSED, SILENCE, ServiceNet, inside

pytestmark = pytest.mark.root
IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU = 10, 2, 14
IPV6_MTU_DISCOVER, IPV6_MTU = 23, 24


class Stage:
    """A net; Services of each protocol with one endpoint here (.1) and one far away (.2), a mode in the node."""

    def __init__(self, names: Names, mode: str) -> None:
        self.net = ServiceNet(names)
        for host in ("pod1", "far"):
            self.net.servers.add(self.net[host], host, 8080)
            self.net.servers.add(self.net[host], host, 8080, "UDP")
        self.net.servers.start()
        for path in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):
            with inside(self.net.node), open(f"/proc/sys/net/{path}", "w") as file:
                file.write("0")
        plans = []
        for family in Family:
            is_v4 = family is Family.V4
            pod, far = (self.net[host].v4 if is_v4 else self.net[host].v6 for host in ("pod1", "far"))
            servers = []
            for protocol in ("TCP", "UDP", "SCTP"):
                for number, endpoint in ((1, Endpoint(pod, 8080, True)), (2, Endpoint(far, 8080))):
                    front = cluster_ip(f"10.96.0.{number}" if is_v4 else f"fd00:96::{number}", 80)
                    ports = node_port(30080 + number)
                    servers.append(server(f"a/s{number}", front, ports, cluster=(endpoint,), protocol=protocol))
            closed = (Endpoint(pod, 9, True),)  # nobody listens there
            servers.append(
                server(
                    "a/closed", cluster_ip("10.96.0.3" if is_v4 else "fd00:96::3", 80), cluster=closed, protocol="UDP"
                )
            )
            plans.append(plan(*servers, family=family))
        with inside(self.net.node):
            self.mode: Mode = made(mode)
            self.mode.sync(plans)


@pytest.fixture(scope="module", params=KERNEL_MODES)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    names = Names()
    built = None
    try:
        built = Stage(names, request.param)
        yield built
    finally:
        if built:
            built.net.close()
        names.close()


@contextlib.contextmanager
def udp_client(stage: Stage, host: str, family: Family) -> Iterator[socket.socket]:
    with inside(stage.net[host].namespace):
        made = socket.socket(socket.AF_INET if family is Family.V4 else socket.AF_INET6, socket.SOCK_DGRAM)
    with made:
        made.settimeout(5)
        yield made


def service(family: Family, number: int) -> str:
    return f"10.96.0.{number}" if family is Family.V4 else f"fd00:96::{number}"


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize(("client", "number"), [("outside", 1), ("outside", 2), ("pod2", 2), ("node", 1)])
def test_a_datagram_in_fragments_arrives_whole(stage: Stage, family: Family, client: str, number: int) -> None:
    with udp_client(stage, client, family) as made:
        made.sendto(b"x" * 4000, (service(family, number), 80))
        said, whence = made.recvfrom(200)
    assert said.split()[0] == (b"pod1" if number == 1 else b"far")
    assert whence[:2] == (service(family, number), 80)


def test_fragments_in_any_order_arrive(stage: Stage) -> None:
    from scapy.layers.inet import IP, UDP, fragment

    client = stage.net["outside"]
    with udp_client(stage, "outside", Family.V4) as made:
        made.bind((client.v4, 0))
        port = made.getsockname()[1]
        whole = IP(src=client.v4, dst="10.96.0.1", id=port) / UDP(sport=port, dport=80) / (b"y" * 3000)
        pieces = fragment(whole, fragsize=600)
        random.Random(port).shuffle(pieces)
        with inside(client.namespace):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            for piece in pieces:
                raw.sendto(bytes(piece), ("10.96.0.1", 0))
        assert made.recv(200).startswith(b"pod1 ")


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("client", ["outside", "pod2"])
def test_too_big_comes_back_to_the_client_of_a_service(stage: Stage, family: Family, client: str) -> None:
    other = stage.net["other"].namespace
    other.run("ip", "link", "set", "cni0", "mtu", "1300")  # the way to `far` takes no more
    try:
        with udp_client(stage, client, family) as made:
            made.connect((service(family, 2), 80))
            level, discover, mtu = (
                (socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_MTU)
                if family is Family.V4
                else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_MTU)
            )
            made.setsockopt(level, discover, IP_PMTUDISC_DO)
            made.send(b"z" * 1400)
            with pytest.raises(OSError) as told:
                made.recv(200)
            assert told.value.errno == errno.EMSGSIZE
            assert made.getsockopt(level, mtu) == 1300
            made.send(b"z" * 1000)
            assert made.recv(200).startswith(b"far ")
    finally:
        other.run("ip", "link", "set", "cni0", "mtu", "1500")


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("client", ["outside", "pod2", "node"])
def test_an_endpoints_refusal_comes_back(stage: Stage, family: Family, client: str) -> None:
    assert stage.net.ask(client, service(family, 3), 80, "UDP") == REFUSED


@pytest.mark.parametrize("port", [1, 80, 8080, 30081, 65535])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_any_source_port_will_do(stage: Stage, port: int, protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
    for client, address, to in (("outside", "10.96.0.1", 80), ("outside", stage.net["node"].v4, 30082)):
        with inside(stage.net[client].namespace):
            made = socket.socket(socket.AF_INET, kind)
        with made:
            made.settimeout(5)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((stage.net[client].v4, port))
            made.connect((address, to))
            if protocol == "UDP":
                made.send(b"?")
            assert made.recv(200).split()[0] in (b"pod1", b"far")


@pytest.mark.parametrize(("client", "number", "seen"), [("outside", 1, "10.244.1.1"), ("pod2", 2, "10.244.1.3")])
def test_sctp_goes_to_the_endpoint(stage: Stage, client: str, number: int, seen: str) -> None:
    """Without a kernel that has SCTP sockets: the INIT is made by hand and caught where it arrives."""
    from scapy.layers.inet import IP
    from scapy.layers.sctp import SCTP, SCTPChunkInit

    port = random.randrange(20000, 60000)
    init = (
        IP(src=stage.net[client].v4, dst=f"10.96.0.{number}") / SCTP(sport=port, dport=80) / SCTPChunkInit(init_tag=7)
    )
    with inside(stage.net["pod1" if number == 1 else "far"].namespace):
        ear = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)
    with inside(stage.net[client].namespace):
        mouth = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with ear, mouth:
        ear.settimeout(5)
        mouth.sendto(bytes(init), (f"10.96.0.{number}", 0))
        arrived = IP(ear.recv(2000))
    assert (arrived.src, arrived[SCTP].dport) == (seen, 8080)
    assert arrived.dst == stage.net["pod1" if number == 1 else "far"].v4


def test_loopback_addresses_are_not_reachable_from_the_wire(stage: Stage) -> None:
    """route_localnet is set for node ports on 127.0.0.1; a neighbour gains nothing by it (CVE-2020-8558)."""
    outside = stage.net["outside"].namespace
    outside.run("ip", "route", "add", "127.0.0.2/32", "via", "192.168.77.1", "dev", "eth0", "src", "192.168.77.100")
    outside.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    outside.run("ip", "rule", "add", "pref", "0", "to", "127.0.0.2", "lookup", "main")
    outside.run("ip", "rule", "del", "pref", "0", "lookup", "local")
    outside.run("ip", "rule", "add", "pref", "1", "lookup", "local")
    with inside(stage.net.node):
        listener = socket.socket()
    with listener:
        listener.bind(("127.0.0.2", 7000))
        listener.listen()
        assert stage.net.ask("outside", "127.0.0.2", 7000, wait=0.5) == SILENCE
        assert stage.net.ask("outside", "127.0.0.2", 30081, wait=0.5) == SILENCE
        assert stage.net.ask("node", "127.0.0.1", 30081).server == "pod1"
