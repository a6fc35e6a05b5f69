"""A node with pods, another node and an outside host, for packets through a proxy mode: `ServiceNet`.

Servers and clients are sockets of the test's own process, opened inside the namespaces: a probe costs no process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import selectors
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import NamedTuple

from support.netns import Names, Namespace, connect

SOCK_SCTP = 132


class Host(NamedTuple):
    """One host of the net and its addresses."""

    namespace: Namespace
    v4: str
    v6: str


class Answer(NamedTuple):
    """What a client saw: the name of the server that answered and the source address that it saw."""

    server: str
    source: str


REFUSED = Answer("refused", "")
SILENCE = Answer("silence", "")


@contextlib.contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """Put the calling thread into a namespace, and back again."""
    libc = ctypes.CDLL(None, use_errno=True)
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(namespace.path, os.O_RDONLY)
    try:
        if libc.setns(there, 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {namespace.name}")
        try:
            yield
        finally:
            libc.setns(back, 0x40000000)
    finally:
        os.close(there)
        os.close(back)


class Servers:
    """Echo servers, TCP, UDP and SCTP, that answer with their name and the client's address; one thread for all."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._selector.register(self._stopped, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._sockets: list[socket.socket] = []
        self.hits: dict[str, int] = {}

    def start(self) -> None:
        self._thread.start()

    def add(self, host: Host, name: str, port: int, protocol: str = "TCP") -> None:
        """Serve on a port of a host, in both families; before `start`."""
        with inside(host.namespace):
            for family in (socket.AF_INET, socket.AF_INET6):
                kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
                made = socket.socket(family, kind, SOCK_SCTP if protocol == "SCTP" else 0)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
                if protocol != "UDP":
                    made.listen(512)
                made.setblocking(False)
                self._sockets.append(made)
                self._selector.register(made, selectors.EVENT_READ, (name, protocol))

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                with contextlib.suppress(OSError):
                    self._serve(key.fileobj, *key.data)  # type: ignore[arg-type]

    def _serve(self, at: socket.socket, name: str, protocol: str) -> None:
        if protocol == "UDP":
            _, client = at.recvfrom(2048)
            self.hits[name] = self.hits.get(name, 0) + 1
            at.sendto(f"{name} {client[0]}".encode(), client)
            return
        accepted, client = at.accept()
        with accepted:
            self.hits[name] = self.hits.get(name, 0) + 1
            accepted.sendall(f"{name} {client[0]}".encode())

    def close(self) -> None:
        self._stop.send(b"x")
        if self._thread.is_alive():
            self._thread.join()
        for each in (*self._sockets, self._stop, self._stopped):
            each.close()
        self._selector.close()


class ServiceNet:
    """The hosts, by name: node, pod1, pod2 (on the node), other (a node), far (a pod there), outside.

    10.244.1.0/24 are the node's pods, 10.244.2.0/24 the other's; 192.168.77.0/24 joins nodes and outside, which sends
    10.96.0.0/12 and 203.0.113.0/24 (Service addresses) to the node. The same in fd00::.
    """

    def __init__(self, names: Names) -> None:
        self.lan = names("lan")
        self.hosts: dict[str, Host] = {}
        self.lan.batch("link add br0 type bridge", "link set br0 up")
        services = [(net, "192.168.77.1") for net in ("10.96.0.0/12", "203.0.113.0/24", "10.244.1.0/24")]
        services += [(net, "fd00:77::1") for net in ("fd00:96::/112", "fd00:113::/64", "fd00:244:1::/64")]
        far = [("10.244.2.0/24", "192.168.77.2"), ("fd00:244:2::/64", "fd00:77::2")]
        away = [("default", "192.168.77.100"), ("default", "fd00:77::100")]
        self._host(names, "node", 1, [*far, *away], net=1)
        self._host(names, "other", 2, services, net=2)
        self._host(names, "outside", 100, [*services, *far])
        self._pod(names, "node", "pod1", 1, 2)
        self._pod(names, "node", "pod2", 1, 3)
        self._pod(names, "other", "far", 2, 2)
        self.servers = Servers()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def node(self) -> Namespace:
        return self.hosts["node"].namespace

    def close(self) -> None:
        self.servers.close()

    def _host(
        self, names: Names, name: str, number: int, routes: list[tuple[str, str]], net: int | None = None
    ) -> None:
        """Make a host on the LAN; `routes`: networks and their gateways; `net`: of the bridge for its pods."""
        host = self.hosts[name] = Host(names(name), f"192.168.77.{number}", f"fd00:77::{number}")
        _no_dad(host.namespace)
        for family in ("ipv4", "ipv6"):
            _sysctl(host.namespace, f"net/{family}/conf/all/forwarding", "1")
        connect(host.namespace, self.lan, "eth0", f"p-{number}")
        self.lan.batch(f"link set p-{number} master br0")
        lines = [f"addr add {host.v4}/24 dev eth0", f"addr add {host.v6}/64 dev eth0"]
        if net is not None:
            lines += ["link add cni0 type bridge", "link set cni0 up"]
            lines += [f"addr add 10.244.{net}.1/24 dev cni0", f"addr add fd00:244:{net}::1/64 dev cni0"]
        host.namespace.batch(*lines, *(f"route add {network} via {gateway}" for network, gateway in routes))

    def _pod(self, names: Names, node: str, name: str, net: int, number: int) -> None:
        host = self.hosts[name] = Host(names(name), f"10.244.{net}.{number}", f"fd00:244:{net}::{number}")
        _no_dad(host.namespace)
        at = self.hosts[node].namespace
        connect(host.namespace, at, "eth0", f"veth{number}")
        # as the CNI plugin sets it: hairpin traffic leaves through the port that it came from
        at.batch(f"link set veth{number} master cni0", f"link set veth{number} type bridge_slave hairpin on")
        host.namespace.batch(
            f"addr add {host.v4}/24 dev eth0", f"addr add {host.v6}/64 dev eth0",
            f"route add default via 10.244.{net}.1", f"route add default via fd00:244:{net}::1",
        )  # fmt: skip

    def ask(
        self, client: str, address: str, port: int, protocol: str = "TCP", *, source: str = "", wait: float = 5
    ) -> Answer:
        """Return what the host `client` gets from an address and port; `wait`: seconds until that is silence."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
        with inside(self.hosts[client].namespace):
            made = socket.socket(family, kind, SOCK_SCTP if protocol == "SCTP" else 0)
        with made:
            made.settimeout(wait)
            try:
                if protocol == "SCTP" and not address.startswith("127."):
                    # an association knows all addresses of an unbound client, and after a loss its peer tries another
                    # one of them, past the node that translates
                    source = source or (self.hosts[client].v6 if family == socket.AF_INET6 else self.hosts[client].v4)
                if source:
                    made.bind((source, 0))
                made.connect((address, port))
                if protocol == "UDP":
                    with contextlib.suppress(PermissionError):  # the node's own packet, dropped on its way out
                        made.send(b"?")
                said = made.recv(200).decode()
            except TimeoutError:
                return SILENCE
            except OSError as error:
                if error.errno in (errno.ECONNREFUSED, errno.ECONNRESET):
                    return REFUSED
                raise
        server, _, seen = said.partition(" ")
        return Answer(server, seen)


def _sysctl(namespace: Namespace, name: str, value: str) -> None:
    with inside(namespace), open(f"/proc/sys/{name}", "w") as file:
        file.write(value)


def _no_dad(namespace: Namespace) -> None:
    for scope in ("all", "default"):
        _sysctl(namespace, f"net/ipv6/conf/{scope}/accept_dad", "0")


def sctp_works() -> bool:
    """Whether this kernel makes SCTP sockets."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, SOCK_SCTP).close()
    except OSError:
        return False
    return True


def conntrack_flush(namespace: Namespace) -> None:
    """Forget all flows of a namespace."""
    subprocess.run(["ip", "netns", "exec", namespace.name, "conntrack", "-F"], check=False, capture_output=True)
