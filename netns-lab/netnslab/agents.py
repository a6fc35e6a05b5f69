"""The lab's side of `agent.py`: starting one in a namespace, and asking it to probe from there."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import machine
from .state import Folder, LabError, PodPort

PROGRAM = Path(__file__).with_name("agent.py")


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What came of one connection. `outcome`: ok, refused, timeout, …; `pod` answered and saw `source` (host:port)."""

    outcome: str
    pod: str
    source: str
    milliseconds: float

    @property
    def source_address(self) -> str:
        """The source address that the pod saw, without the port."""
        return self.source.rpartition(":")[0].strip("[]")


def start(folder: Folder, name: str, netns: str, ports: Sequence[PodPort] = ()) -> int:
    """Start an agent called `name`; it serves `ports`."""
    socket_path = folder.agents / f"{name}.sock"
    socket_path.unlink(missing_ok=True)
    served = [f"{port.protocol}:{port.port}" for port in ports]
    command = [sys.executable, "-IS", str(PROGRAM), name, str(socket_path), *served]
    return machine.start(folder.name, netns, command, folder.logs / f"{name}.log")


def wait(folder: Folder, name: str, pid: int = 0, seconds: float = 60) -> None:
    """Return when an agent answers: its ports are open then."""
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        try:
            ask(folder, name, {"operation": "ping"}, timeout=1)
            return
        except LabError as error:
            if time.monotonic() > deadline or (pid and not machine.alive(pid)):
                log = folder.logs / f"{name}.log"
                raise LabError(
                    f"the server of {name} does not answer: {error}",
                    command=f"{PROGRAM.name} {name}",
                    log=log.read_text() if log.exists() else "",
                ) from None
        time.sleep(machine.pause(0.005, asked))


def ask(folder: Folder, name: str, request: dict[str, Any], timeout: float = 60) -> dict[str, Any]:
    """Return an agent's reply to a request."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            client.connect(str(folder.agents / f"{name}.sock"))
            client.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            while chunk := client.recv(1 << 20):
                data += chunk
    except OSError as error:
        raise LabError(f"{name} cannot be asked: {error}") from None
    reply: dict[str, Any] = json.loads(data) if data else {"error": "no reply"}
    if reply.get("error"):
        raise LabError(f"{name}: {request['operation']}: {reply['error']}")
    return reply


def probe(
    folder: Folder, name: str, protocol: str, address: str, port: int, *, count: int = 1, timeout: float = 2.0,
    source_port: int = 0,
) -> list[Answer]:  # fmt: skip
    """Make `count` connections from the namespace of agent `name`; return what came of each."""
    request = {
        "operation": "ask",
        "proto": protocol,
        "address": address,
        "port": port,
        "count": count,
        "timeout": timeout,
        "source_port": source_port,
    }
    return msgspec.convert(ask(folder, name, request, timeout + 60)["results"], list[Answer])


def http_status(folder: Folder, name: str, address: str, port: int, path: str) -> tuple[int, str]:
    """GET a path from the namespace of agent `name`; return status (0: no answer) and body."""
    reply = ask(folder, name, {"operation": "http", "address": address, "port": port, "path": path, "timeout": 2})
    return int(reply["status"]), str(reply["body"])
