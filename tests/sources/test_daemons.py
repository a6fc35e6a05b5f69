"""Both daemons as their own processes, with an API server as their source and a service manager that listens."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver import Fault, Server
from apiserver.resources import NAMED
from support.netns import Names, Namespace, programs
from support.servicenet import inside

pytestmark = pytest.mark.root
PATIENCE = 30.0
NODES = [
    {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{number}"},
        "spec": {"podCIDR": f"10.244.{number}.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": f"192.0.2.{number}"}]},
    }
    for number in (1, 2, 3)
]  # fmt: skip
SERVICE = {
    "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
    "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]},
}  # fmt: skip


class Manager:
    """What systemd is to a daemon: a datagram socket, and what came in at it."""

    def __init__(self, path: Path) -> None:
        self.heard: list[str] = []
        self.environment = {**os.environ, "NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1000000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while state := self._socket.recv(4096).decode():
            self.heard.append(state)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.fixture
def node(netns: Names) -> Namespace:
    made = netns("node")
    made.batch(
        "link add eth0 type veth peer name wire",
        "addr add 192.0.2.1/24 dev eth0",
        "link set eth0 up",
        "link set wire up",
        "route add 10.244.3.0/24 via 192.0.2.30",
    )
    return made


@pytest.fixture
def server(node: Namespace) -> Iterator[Server]:
    """An API server that is reached from within the node, on the port of `api`."""
    with inside(node):
        api = socket.create_server(("127.0.0.1", 0))
    with Server(sockets=[api]) as running:
        running.put(*NODES, SERVICE, BAD)
        running.at = f"http://127.0.0.1:{api.getsockname()[1]}"  # type: ignore[attr-defined]
        yield running
    api.close()


def eventually(what: Any, why: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def command(program: str, folder: Path, server: Server) -> list[str]:
    """Return how a daemon is started with a kubeconfig of two contexts, the second of them the current one."""
    path = folder / "kubeconfig"
    text = server.kubeconfig(cluster={"server": server.at})  # type: ignore[attr-defined]
    path.write_text(text.replace("contexts:\n", "contexts:\n- {name: other, context: {cluster: gone}}\n"))
    common = [str(programs() / program), "--kubeconfig", str(path), "--cluster-cidr", "10.244.0.0/16"]
    if program == "pyproxy":
        return [*common, "--mode=nftables", "--hostname-override=n1"]
    return [*common, "--node-name=n1", "--state-dir", str(folder / "state"), "--healthz-bind-address=127.0.0.1:10270"]


BAD = {
    **SERVICE,
    "metadata": {"name": "bad", "namespace": "default"},
    "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 0}]},
}
# program → how the kernel is asked, what is there then, and the Event that an operator must see: its reason and object
SEEN = {
    "pyproxy": (("nft", "list", "ruleset"), "10.96.0.9", ("Quarantined", "Service", "bad")),
    "pynetd": (("ip", "route", "show", "proto", "112"), "10.244.2.0/24", ("ForeignRoute", "Node", "n1")),
}


@pytest.mark.parametrize("program", SEEN)
def test_a_daemon_waits_for_its_source_and_outlives_it(
    program: str, node: Namespace, server: Server, manager: Manager, tmp_path: Path
) -> None:
    words, written, event = SEEN[program]

    def rules() -> str:
        return node.run(*words)

    held = server.faults.add(Fault("nodes", times=None, hang=True))
    log = tmp_path / "log"
    with log.open("w") as stderr:
        daemon = node.start(*command(program, tmp_path, server), env=manager.environment, stderr=stderr)
    eventually(lambda: held.met, log.read_text())
    if program == "pyproxy":
        eventually(
            lambda: {each.plural for each in server.requests} >= {"services", "endpointslices"}, "all are asked for"
        )
    assert written not in rules(), "nothing is written before all kinds are known"
    assert "READY=1" not in manager.heard
    server.faults.clear()
    server.drop_connections()
    eventually(lambda: "READY=1" in manager.heard, log.read_text())
    assert written in rules()
    eventually(lambda: manager.heard.count("WATCHDOG=1") > 2, "the watchdog is fed")
    eventually(lambda: server.store.all(NAMED["events"]), "an Event is told")
    told = [(each["reason"], each["involvedObject"]) for each in server.store.all(NAMED["events"])]
    assert [(reason, about["kind"], about["name"]) for reason, about in told] == [event], "that one and no noise"
    assert told[0][1]["uid"], "kubectl describe finds it"

    server.stop()
    fed = manager.heard.count("WATCHDOG=1")
    eventually(lambda: manager.heard.count("WATCHDOG=1") > fed + 1, "the watchdog is fed without a server, too")
    assert written in rules(), "what was written stands while the server is away"
    daemon.terminate()
    assert daemon.wait(PATIENCE) == 0
    assert manager.heard.count("READY=1") == 1
    assert "STOPPING=1" in manager.heard
    assert written in rules(), "and after the daemon's end"
