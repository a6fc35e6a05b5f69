"""A client of the CRI in small: sandboxes and containers over gRPC, their protobuf messages written by field number.

Field numbers: k8s.io/cri-api, runtime/v1/api.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Any

import grpc

_SERVICE = "/runtime.v1.RuntimeService"
PROTOCOLS = {"tcp": 0, "udp": 1, "sctp": 2}
PROPAGATION = {"None": 0, "HostToContainer": 1, "Bidirectional": 2}
_HOSTS_NETWORK = 2  # NamespaceMode NODE
RUNNING, EXITED = 1, 2


@dataclass(frozen=True)
class Mount:
    """A path of the host within a container."""

    inside: str
    outside: str
    readonly: bool = False
    propagation: str = "None"


@dataclass(frozen=True)
class Container:
    """What CreateContainer is asked for; `capabilities`: those to add and those to drop."""

    name: str
    image: str
    command: Sequence[str]
    args: Sequence[str] = ()
    env: Mapping[str, str] = default(default_factory=dict)
    mounts: Sequence[Mount] = ()
    privileged: bool = False
    readonly_root: bool = False
    no_new_privileges: bool = False
    capabilities: tuple[Sequence[str], Sequence[str]] = ((), ())
    log: str = ""


def field(number: int, value: str | bytes | int) -> bytes:
    """Return one protobuf field: a varint, or text or a message with its length before it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def fields(data: bytes) -> dict[int, list[Any]]:
    """Return the fields of a message: numbers as int, everything else as bytes."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _read(data, at)
        value: Any
        if tag & 7 == 0:
            value, at = _read(data, at)
        else:
            length, at = _read(data, at)
            value, at = data[at : at + length], at + length
        found.setdefault(tag >> 3, []).append(value)
    return found


class Cri:
    """The runtime service on one socket."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._configs: dict[str, bytes] = {}

    def run(
        self,
        name: str,
        ports: Sequence[tuple[str, int, int]] = (),
        annotations: Mapping[str, str] | None = None,
        *,
        hosts_network: bool = False,
        privileged: bool = False,
        logs: str = "",
    ) -> str:
        """Make a pod sandbox with `ports` as (protocol, container port, host port); return its id."""
        config = field(1, field(1, name) + field(2, f"uid-{name}") + field(3, "default"))
        if logs:
            config += field(3, logs)
        for protocol, inside, outside in ports:
            config += field(5, field(1, PROTOCOLS[protocol]) + field(2, inside) + field(3, outside))
        for key, value in (annotations or {}).items():
            config += field(7, field(1, key) + field(2, value))
        security = field(1, field(1, _HOSTS_NETWORK if hosts_network else 0)) + field(6, int(privileged))
        config += field(8, field(2, security))
        sandbox = str(fields(self._call("RunPodSandbox", field(1, config)))[1][0], "utf-8")
        self._configs[sandbox] = config
        return sandbox

    def start(self, sandbox: str, wanted: Container) -> str:
        """Make a container of a sandbox that runs on the host's network, and start it; return its id."""
        config = field(1, field(1, wanted.name)) + field(2, field(1, wanted.image))
        config += b"".join(field(3, word) for word in wanted.command) + b"".join(field(4, word) for word in wanted.args)
        for key, value in wanted.env.items():
            config += field(6, field(1, key) + field(2, value))
        for mount in wanted.mounts:
            told = field(1, mount.inside) + field(2, mount.outside) + field(3, int(mount.readonly))
            config += field(7, told + field(5, PROPAGATION[mount.propagation]))
        config += field(11, wanted.log)
        added, dropped = wanted.capabilities
        security = field(1, b"".join(field(1, name) for name in added) + b"".join(field(2, name) for name in dropped))
        security += field(2, int(wanted.privileged)) + field(3, field(1, _HOSTS_NETWORK))
        security += field(7, int(wanted.readonly_root)) + field(11, int(wanted.no_new_privileges))
        config += field(15, field(2, security))
        request = field(1, sandbox) + field(2, config) + field(3, self._configs[sandbox])
        container = str(fields(self._call("CreateContainer", request))[1][0], "utf-8")
        self._call("StartContainer", field(1, container))
        return container

    def state(self, container: str) -> tuple[int, int]:
        """Return a container's state and exit code."""
        status = fields(fields(self._call("ContainerStatus", field(1, container)))[1][0])
        return status.get(3, [0])[0], status.get(7, [0])[0]

    def stop_container(self, container: str, grace: int) -> None:
        """Send SIGTERM, and SIGKILL after `grace` seconds; return when it has ended."""
        self._call("StopContainer", field(1, container) + field(2, grace))

    def execute(self, container: str, *command: str) -> tuple[int, str]:
        """Run a command in a container; return its exit code and what it said."""
        request = field(1, container) + b"".join(field(2, word) for word in command) + field(3, 30)
        reply = fields(self._call("ExecSync", request))
        said = b"".join((*reply.get(1, ()), *reply.get(2, ()))).decode()
        return reply.get(3, [0])[0], said

    def address(self, sandbox: str) -> str:
        """Return what PodSandboxStatus says is the sandbox's address."""
        status = fields(fields(self._call("PodSandboxStatus", field(1, sandbox)))[1][0])
        return str(fields(status[5][0])[1][0], "utf-8") if 5 in status and status[5][0] else ""

    def stop(self, sandbox: str) -> None:
        self._call("StopPodSandbox", field(1, sandbox))

    def remove(self, sandbox: str) -> None:
        self._call("RemovePodSandbox", field(1, sandbox))
        self._configs.pop(sandbox, None)

    @property
    def sandboxes(self) -> tuple[str, ...]:
        """Those that were made here and not removed."""
        return tuple(self._configs)

    def close(self) -> None:
        self._channel.close()

    def _call(self, name: str, request: bytes) -> bytes:
        call = self._channel.unary_unary(f"{_SERVICE}/{name}", request_serializer=bytes, response_deserializer=bytes)
        answer: bytes = call(request, timeout=60)
        return answer


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
