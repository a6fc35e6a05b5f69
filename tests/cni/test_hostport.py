"""Host ports through real connections: from outside, from the host, its loopback, the pod itself and its neighbour."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.cni import CniFailure, Pod, Runtime, residue
from support.netns import Names, Namespace, connect

pytestmark = pytest.mark.root

SERVER = """
import socket, sys, threading
family = socket.AF_INET6
def tcp(port):
    s = socket.socket(family, socket.SOCK_STREAM); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("::", port)); s.listen(50)
    while True:
        c, a = s.accept(); c.sendall((sys.argv[1] + " " + a[0].removeprefix("::ffff:")).encode()); c.close()
def udp(port):
    s = socket.socket(family, socket.SOCK_DGRAM); s.bind(("::", port))
    while True:
        d, a = s.recvfrom(100); s.sendto((sys.argv[1] + " " + a[0].removeprefix("::ffff:")).encode(), a)
for f, p in ((tcp, 80), (udp, 53)):
    threading.Thread(target=f, args=(p,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""
CLIENT = """
import socket, sys
kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
s.settimeout(2)
if len(sys.argv) > 4: s.bind(("", int(sys.argv[4])))
try:
    s.connect((host, port)); s.send(b"x"); print(s.recv(100).decode())
except OSError as error:
    print("error", error)
"""


def serve(pod: Pod) -> None:
    child = pod.ns.start(sys.executable, "-c", SERVER, pod.container, stdout=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"


def ask(where: Namespace, kind: str, host: str, port: int, *source: str) -> str:
    return where.run(sys.executable, "-IS", "-c", CLIENT, kind, host, str(port), *source).strip()


class Bench:
    """A host with two addresses, a client outside, and the network's configuration."""

    def __init__(self, netns: Names, state: Path) -> None:
        self.host, self.client = netns("host"), netns("client")
        connect(self.host, self.client, "up0", "eth0")
        self.host.run("ip", "addr", "add", "192.0.2.1/24", "dev", "up0")
        self.host.run("ip", "addr", "add", "192.0.2.2/24", "dev", "up0")
        self.host.run("ip", "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad")
        self.client.run("ip", "addr", "add", "192.0.2.9/24", "dev", "eth0")
        self.client.run("ip", "addr", "add", "2001:db8::9/64", "dev", "eth0", "nodad")
        self.runtime = Runtime(self.host, state)

    def conf(self, *mappings: dict[str, Any], **keys: Any) -> dict[str, Any]:
        ranges = [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]
        base = self.runtime.conf(
            isDefaultGateway=True, ipMasq=True, ipam={"type": "pynet-ipam", "ranges": ranges},
            capabilities={"portMappings": True}, runtimeConfig={"portMappings": list(mappings)},
        )  # fmt: skip
        return base | keys


@pytest.fixture
def bench(netns: Names, tmp_path: Path) -> Bench:
    return Bench(netns, tmp_path / "state")


def tcp(host: int = 8080, to: int = 80, **keys: Any) -> dict[str, Any]:
    return {"hostPort": host, "containerPort": to, "protocol": "tcp"} | keys


def udp(host: int = 5353, to: int = 53, **keys: Any) -> dict[str, Any]:
    return {"hostPort": host, "containerPort": to, "protocol": "udp"} | keys


def test_every_way_to_a_host_port(bench: Bench, netns: Names) -> None:
    before = residue(bench.host)
    pod, neighbour = Pod(bench.runtime, netns("pod")), Pod(bench.runtime, netns("next"))
    pod.add(bench.conf(tcp(), udp()))
    neighbour.add(bench.conf())
    serve(pod)
    me = pod.container
    gateway = "10.9.0.1"
    table = [
        ("from outside", bench.client, "tcp", "192.0.2.1", 8080, f"{me} 192.0.2.9"),
        ("the host's other address", bench.client, "tcp", "192.0.2.2", 8080, f"{me} 192.0.2.9"),
        ("IPv6", bench.client, "tcp", "2001:db8::1", 8080, f"{me} 2001:db8::9"),
        ("UDP", bench.client, "udp", "192.0.2.1", 5353, f"{me} 192.0.2.9"),
        ("UDP over IPv6", bench.client, "udp", "2001:db8::1", 5353, f"{me} 2001:db8::9"),
        ("the host to itself", bench.host, "tcp", "192.0.2.1", 8080, f"{me} 192.0.2.1"),
        ("localhost", bench.host, "tcp", "127.0.0.1", 8080, f"{me} {gateway}"),
        ("not on ::1, at once", bench.host, "tcp", "::1", 8080, "error [Errno 111] Connection refused"),
        ("UDP on localhost", bench.host, "udp", "127.0.0.1", 5353, f"{me} {gateway}"),
        ("the pod to itself (hairpin)", pod.ns, "tcp", "192.0.2.1", 8080, f"{me} {gateway}"),
        ("its neighbour on the bridge", neighbour.ns, "tcp", "192.0.2.1", 8080, f"{me} {gateway}"),
        ("not through the host port", neighbour.ns, "tcp", pod.ip, 80, f"{me} {neighbour.ip}"),
    ]
    seen = [(name, ask(where, kind, host, port)) for name, where, kind, host, port, _ in table]
    assert seen == [(row[0], row[-1]) for row in table]
    pod.check()
    pod.delete()
    assert ask(bench.client, "tcp", "192.0.2.1", 8080).startswith("error")
    neighbour.delete()
    after = residue(bench.host)
    assert after["nft"] == before["nft"]


HEAR = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132); s.settimeout(20); print("ready", flush=True)
packet = s.recv(2000); at = 4 * (packet[0] & 15)
print(socket.inet_ntoa(packet[12:16]), int.from_bytes(packet[at + 2:at + 4], "big"), flush=True)
"""
SAY = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_RAW, 132).sendto(bytes.fromhex(sys.argv[1]), ("192.0.2.1", 0))
"""


def test_sctp_reaches_the_pod(bench: Bench, netns: Names) -> None:
    """By a packet of our own: kernels without SCTP translate it all the same."""
    from scapy.layers.sctp import SCTP, SCTPChunkInit

    pod = Pod(bench.runtime, netns("pod"))
    pod.add(bench.conf({"hostPort": 9999, "containerPort": 99, "protocol": "SCTP"}))
    pod.check()
    child = pod.ns.start(sys.executable, "-c", HEAR, stdout=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    chunk = SCTPChunkInit(init_tag=7, n_out_streams=1, n_in_streams=1, a_rwnd=1500, init_tsn=1)
    packet = bytes(SCTP(sport=4000, dport=9999, tag=0) / chunk)
    bench.client.run(sys.executable, "-c", SAY, packet.hex())
    assert child.stdout.readline() == "192.0.2.9 99\n"


def test_a_thousand_ports_of_one_pod(bench: Bench, netns: Names) -> None:
    """A range of ports, as a media server has: one transaction all the same, larger than a socket's usual buffers."""
    pod = Pod(bench.runtime, netns("pod"))
    other = Pod(bench.runtime, netns("other"))
    other.add(bench.conf(tcp()))  # the second pod's elements are written over netlink
    pod.add(bench.conf(*(udp(port, port) for port in range(20000, 21000))))
    pod.check()
    listed = bench.host.run("nft", "list", "map", "inet", "pynet-cni", "anyports6")
    assert listed.count(pod.container) == 1000
    pod.delete()
    assert pod.container not in bench.host.run("nft", "list", "ruleset")
    other.check()


def test_a_host_ip_limits_a_port_to_it(bench: Bench, netns: Names) -> None:
    first, second = Pod(bench.runtime, netns("a")), Pod(bench.runtime, netns("b"))
    first.add(bench.conf(tcp(hostIP="192.0.2.1")))
    second.add(bench.conf(tcp(hostIP="192.0.2.2")))
    serve(first)
    serve(second)
    assert ask(bench.client, "tcp", "192.0.2.1", 8080) == f"{first.container} 192.0.2.9"
    assert ask(bench.client, "tcp", "192.0.2.2", 8080) == f"{second.container} 192.0.2.9"
    assert ask(bench.host, "tcp", "127.0.0.1", 8080).startswith("error")


def test_whose_connections_are_masqueraded(bench: Bench, netns: Names) -> None:
    """masqAll: everybody's come under the host's address; snat false: nobody's, and so not from 127.0.0.1."""
    pod, neighbour = Pod(bench.runtime, netns("pod")), Pod(bench.runtime, netns("next"))
    serve(pod)
    neighbour.add(bench.conf())
    pod.add(bench.conf(tcp(), masqAll=True))
    pod.check()
    seen = [ask(bench.client, "tcp", host, 8080) for host in ("192.0.2.1", "2001:db8::1")]
    assert seen == [f"{pod.container} 10.9.0.1", f"{pod.container} fd00:9::1"]
    assert ask(neighbour.ns, "tcp", "192.0.2.1", 8080) == f"{pod.container} 10.9.0.1"
    assert ask(bench.host, "tcp", "127.0.0.1", 8080) == f"{pod.container} 10.9.0.1"
    pod.delete()
    bench.host.run("sysctl", "-qw", "net.ipv4.conf.cni0.route_localnet=0")
    pod.add(bench.conf(tcp(), snat=False))
    pod.check()
    assert ask(bench.client, "tcp", "192.0.2.1", 8080) == f"{pod.container} 192.0.2.9"
    assert "goto hairpin-none" in bench.host.run("nft", "list", "map", "inet", "pynet-cni", "hairpin4")
    assert bench.host.run("sysctl", "-n", "net.ipv4.conf.cni0.route_localnet").strip() == "0"
    pod.delete()
    neighbour.delete()
    assert bench.host.run("nft", "list", "ruleset") == ""


@pytest.mark.parametrize("first", ["portmap's rules", "ours"])
@pytest.mark.parametrize("keys", [{}, {"snat": False}])
def test_clients_keep_their_address_beside_what_portmap_left(
    bench: Bench, netns: Names, keys: dict[str, Any], first: str
) -> None:
    """Its rules stay when its last pod goes, and masquerade all that has its mark, bit 13, which is ours too."""
    if first == "ours":
        Pod(bench.runtime, netns("first")).add(bench.conf(tcp(9090)))
    left = """
        *nat
        :CNI-HOSTPORT-MASQ - [0:0]
        -A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
        -A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
        COMMIT
    """
    for tool in ("iptables-nft-restore", "ip6tables-nft-restore"):
        bench.host.run(tool, input="".join(f"{line.strip()}\n" for line in left.splitlines()))
    pod = Pod(bench.runtime, netns("pod"))
    serve(pod)
    pod.add(bench.conf(tcp(), udp(), **keys))
    for kind, host, port, client in (
        ("tcp", "192.0.2.1", 8080, "192.0.2.9"), ("tcp", "2001:db8::1", 8080, "2001:db8::9"),
        ("udp", "192.0.2.1", 5353, "192.0.2.9"),
    ):  # fmt: skip
        assert ask(bench.client, kind, host, port) == f"{pod.container} {client}"
    pod.check()


def test_a_claimed_port_is_refused_with_its_owner(bench: Bench, netns: Names) -> None:
    first, second = Pod(bench.runtime, netns("a")), Pod(bench.runtime, netns("b"))
    first.add(bench.conf(tcp()))
    before = residue(bench.host)
    for mapping in (tcp(), tcp(hostIP="192.0.2.1"), tcp(hostIP="0.0.0.0")):
        with pytest.raises(CniFailure) as refused:
            second.add(bench.conf(mapping))
        assert first.container in refused.value.message
        assert "8080" in refused.value.message
    assert residue(bench.host) == before
    second.add(bench.conf(udp(8080), tcp(hostIP="2001:db8::1") | {"hostPort": 8081}))
    second.check()


def test_a_port_is_claimed_even_when_the_records_are_lost(bench: Bench, netns: Names) -> None:
    first, second = Pod(bench.runtime, netns("a")), Pod(bench.runtime, netns("b"))
    first.add(bench.conf(tcp()))
    for path in bench.runtime.state.glob("attachments*"):
        path.unlink()
    before = residue(bench.host)
    with pytest.raises(CniFailure, match="tcp . 8080 is already claimed by net " + first.container):
        second.add(bench.conf(tcp()))
    assert residue(bench.host) == before
    first.check()
    first.delete()
    second.add(bench.conf(tcp()))
    second.check()


def test_the_port_of_a_dead_pod_is_free(bench: Bench, netns: Names) -> None:
    dead, heir = Pod(bench.runtime, netns("dead")), Pod(bench.runtime, netns("heir"))
    dead.add(bench.conf(tcp()))
    dead.vanish()
    heir.add(bench.conf(tcp()))
    serve(heir)
    assert ask(bench.client, "tcp", "192.0.2.1", 8080) == f"{heir.container} 192.0.2.9"


def test_udp_flows_follow_the_port(bench: Bench, netns: Names) -> None:
    """One client keeps its source port while the host port goes to another pod: plugins#1190."""
    first, second = Pod(bench.runtime, netns("a")), Pod(bench.runtime, netns("b"))
    first.add(bench.conf(udp()))
    serve(first)
    assert ask(bench.client, "udp", "192.0.2.1", 5353, "4000") == f"{first.container} 192.0.2.9"
    first.delete()
    listed = bench.host.run("conntrack", "-L", "-p", "udp", "--orig-port-dst", "5353", check=False)
    assert "5353" not in listed
    assert ask(bench.client, "udp", "192.0.2.1", 5353, "4000").startswith("error")  # leaves a flow without translation
    second.add(bench.conf(udp()))
    serve(second)
    assert ask(bench.client, "udp", "192.0.2.1", 5353, "4000") == f"{second.container} 192.0.2.9"


@pytest.mark.parametrize(
    "spoil",
    [
        "delete element inet pynet-cni anyports4 { tcp . 8080 }",
        "delete element inet pynet-cni hairpin4 { POD . tcp . 80 }",
        "flush chain inet pynet-cni hostports",
        "flush chain inet pynet-cni postrouting",
        "flush chain inet pynet-cni hairpins",
        "delete table inet pynet-cni",
    ],
)
def test_check_finds_a_spoiled_rule(bench: Bench, netns: Names, spoil: str) -> None:
    pod = Pod(bench.runtime, netns("pod"))
    pod.add(bench.conf(tcp()))
    pod.check()
    bench.host.run("nft", *spoil.replace("POD", pod.ip).split())
    with pytest.raises(CniFailure) as found:
        pod.check()
    assert "host port tcp" in found.value.message or "masquerade" in found.value.message
    pod.delete()
    assert json.loads(bench.host.run("nft", "-j", "list", "ruleset"))["nftables"][1:] == []
