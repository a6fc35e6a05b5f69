"""Machines for the node agent's tests: nodes in namespaces on one or two subnets, their pods, their `pynetd`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pynet.kernel import netns
from support.netns import Names, Namespace, connect, programs
from support.waiting import until

CLUSTER = "10.244.0.0/16,fd00:244::/32"


class Machine:
    """One node: a namespace, a place in the underlay, an agent. `number`: of its addresses and pod CIDRs."""

    def __init__(self, space: Namespace, number: int, subnet: int, folder: Path, manifests: Path) -> None:
        self.space, self.number, self.subnet = space, number, subnet
        self.name = f"n{number}"
        self.ip, self.ip6 = f"192.168.{subnet}.{number}", f"fd01:{subnet}::{number}"
        self.cidr, self.cidr6 = f"10.244.{number}.0/24", f"fd00:244:{number}::/64"
        self.state, self.conf = folder / self.name, folder / self.name / "net.d"
        self.manifests = manifests
        self.log = folder / f"{self.name}.log"
        self.agent: subprocess.Popen[str] | None = None

    def manifest(self, **changed: Any) -> dict[str, Any]:
        facts = {"name": self.name, "cidrs": [self.cidr, self.cidr6], "ips": [self.ip, self.ip6], **changed}
        addresses = [{"type": "InternalIP", "address": ip} for ip in facts["ips"]]
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": facts["name"]},
            "spec": {"podCIDRs": facts["cidrs"]} if facts["cidrs"] else {},
            "status": {"addresses": addresses},
        }

    def publish(self, **changed: Any) -> None:
        write(self.manifests / f"{self.name}.yaml", yaml.safe_dump(self.manifest(**changed)))

    def withdraw(self) -> None:
        (self.manifests / f"{self.name}.yaml").unlink()

    def start(
        self,
        *flags: str,
        cluster: str | None = CLUSTER,
        source: str = "",
        ready: bool = True,
        before: tuple[str, ...] = (),
    ) -> None:
        """Start the agent, `before` it a command that starts it elsewhere; return when it is ready."""
        arguments = [source or f"--manifests={self.manifests}", f"--node-name={self.name}", f"--state-dir={self.state}"]
        arguments += [f"--cni-conf-dir={self.conf}", *([f"--cluster-cidr={cluster}"] if cluster else []), *flags]
        with self.log.open("a") as log:
            self.agent = self.space.start(*before, str(programs() / "pynetd"), *arguments, stderr=log)
        if ready:
            try:
                until(f"{self.name} ready", lambda: self.get("/readyz")[0] == 200)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.agent is not None
        self.agent.send_signal(number)
        code = self.agent.wait(20)
        self.agent = None
        return code

    def get(self, path: str) -> tuple[int, str]:
        """Ask the agent's servers; (0, …) where none answers."""
        port = 10271 if path == "/metrics" else 10270
        space = netns.open_path(self.space.path)
        try:
            with netns.inside(space), socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                said = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        except OSError:
            return 0, ""
        finally:
            os.close(space)
        head, _, body = said.partition("\r\n\r\n")
        return int(head.split()[1]), body

    def metric(self, sample: str) -> float:
        """Return one sample of /metrics, by its name and labels."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"{sample} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no sample {sample}")

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def peers(self) -> dict[str, str]:
        """Return how each pod CIDR is reached, as the agent says."""
        return {peer["cidr"]: peer["how"] for peer in self.status().get("peers", ())}

    def problems(self) -> str:
        return "\n".join(f"{each['object']}: {each['reason']}" for each in self.status().get("problems", ()))

    def routes(self, family: int = 4, protocol: str = "112") -> dict[str, dict[str, Any]]:
        """Return the main table's routes of a protocol, by destination."""
        said = self.ip_command("-j", "-d", f"-{family}", "route", "show", "proto", protocol)
        return {route["dst"]: route for route in json.loads(said)}

    def ways(self, family: int = 4) -> dict[str, str]:
        """Return where our unicast routes lead: `next hop device` by destination."""
        return {
            dst: f"{route['gateway']} {route['dev']}"
            for dst, route in self.routes(family).items()
            if "gateway" in route
        }

    def ip_command(self, *words: str) -> str:
        done = subprocess.run(["ip", "-n", self.space.name, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
        return done.stdout


def write(path: Path, text: str) -> None:
    """Put a manifest in place as a careful writer does."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)


class Cluster:
    """Nodes 1, 2, … on subnet 1; with `far`, the last `far` of them on subnet 2; a router with an outside between."""

    def __init__(self, names: Names, folder: Path, nodes: int, far: int = 0) -> None:
        self.folder = folder
        self.manifests = folder / "manifests"
        self.manifests.mkdir()
        self.router = names("router")
        self.nodes: list[Machine] = []
        self._names = names
        for subnet in (1, 2):
            bridge = f"br{subnet}"
            self.router.run("ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0")
            self.router.run("ip", "link", "set", bridge, "up")
            self.router.run("ip", "address", "add", f"192.168.{subnet}.254/24", "dev", bridge)
            self.router.run("ip", "address", "add", f"fd01:{subnet}::fe/64", "dev", bridge, "nodad")
        # outside of the cluster: knows the nodes, and no pod
        self.router.run("ip", "address", "add", "203.0.113.1/32", "dev", "lo")
        self.router.run("ip", "address", "add", "2001:db8::1/128", "dev", "lo", "nodad")
        self.router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for number in range(1, nodes + 1):
            self._join(number, 2 if number > nodes - far else 1)

    def _join(self, number: int, subnet: int) -> None:
        space = self._names(f"n{number}")
        connect(space, self.router, "eth0", f"p{number}")
        self.router.run("ip", "link", "set", f"p{number}", "master", f"br{subnet}")
        machine = Machine(space, number, subnet, self.folder, self.manifests)
        space.run("ip", "address", "add", f"{machine.ip}/24", "dev", "eth0")
        space.run("ip", "address", "add", f"{machine.ip6}/64", "dev", "eth0", "nodad")
        space.run("ip", "route", "add", "default", "via", f"192.168.{subnet}.254")
        space.run("ip", "route", "add", "default", "via", f"fd01:{subnet}::fe")
        self.nodes.append(machine)

    def pod(self, machine: Machine, mtu: int = 1500) -> Namespace:
        """Return a pod of that node: address .5 of its CIDRs, wired as a bridge plugin does."""
        pod = self._names(f"pod{machine.number}")
        number = machine.number
        connect(machine.space, pod, "veth5", "eth0")
        ip = machine.ip_command
        ip("link", "add", "pynet0", "type", "bridge", "forward_delay", "0")
        ip("address", "add", f"10.244.{number}.1/24", "dev", "pynet0")
        ip("address", "add", f"fd00:244:{number}::1/64", "dev", "pynet0", "nodad")
        ip("link", "set", "pynet0", "up")
        ip("link", "set", "veth5", "master", "pynet0", "mtu", str(mtu))
        pod.run("ip", "link", "set", "eth0", "mtu", str(mtu))
        pod.run("ip", "address", "add", f"10.244.{number}.5/24", "dev", "eth0")
        pod.run("ip", "address", "add", f"fd00:244:{number}::5/64", "dev", "eth0", "nodad")
        pod.run("ip", "route", "add", "default", "via", f"10.244.{number}.1")
        pod.run("ip", "route", "add", "default", "via", f"fd00:244:{number}::1")
        return pod


SERVER = """\
import socket, sys
server = socket.create_server((sys.argv[1], 8080), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
while True:
    connection, peer = server.accept()
    connection.sendall(peer[0].encode())
    connection.close()
"""
CLIENT = """\
import socket, sys
with socket.create_connection((sys.argv[1], 8080), 5) as connection:
    print(connection.recv(100).decode())
"""


def serve(space: Namespace, address: str) -> None:
    """Leave a server running that tells each caller the address that it comes from."""
    space.start("/usr/bin/python3", "-IS", "-c", SERVER, address)
    until("server listens", lambda: space.run("ss", "-Hltn", "sport", "=", ":8080").count("LISTEN"))


def seen_from(space: Namespace, address: str) -> str:
    """Return the address under which the server at `address` sees a caller in `space`."""
    return space.run("/usr/bin/python3", "-IS", "-c", CLIENT, address).strip()


def pings(space: Namespace, address: str, *flags: str) -> bool:
    """Say whether one ping is answered."""
    return " 0% packet loss" in space.run("ping", "-n", "-c", "1", "-W", "3", *flags, address, check=False)
