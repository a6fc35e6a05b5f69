"""A client of the CRI in small: the four pod sandbox calls over gRPC, their protobuf messages written by field number.

Field numbers: k8s.io/cri-api, runtime/v1/api.proto.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

_SERVICE = "/runtime.v1.RuntimeService"
PROTOCOLS = {"tcp": 0, "udp": 1, "sctp": 2}


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

    def run(self, name: str, ports: list[tuple[str, int, int]] = (), annotations: dict[str, str] | None = None) -> str:  # type: ignore[assignment]
        """Make a pod sandbox with `ports` as (protocol, container port, host port); return its id."""
        config = field(1, field(1, name) + field(2, f"uid-{name}") + field(3, "default"))
        for protocol, inside, outside in ports:
            config += field(5, field(1, PROTOCOLS[protocol]) + field(2, inside) + field(3, outside))
        for key, value in (annotations or {}).items():
            config += field(7, field(1, key) + field(2, value))
        config += field(8, field(2, b""))
        return str(fields(self._call("RunPodSandbox", field(1, config)))[1][0], "utf-8")

    def address(self, sandbox: str) -> str:
        """Return what PodSandboxStatus says is the sandbox's address."""
        status = fields(fields(self._call("PodSandboxStatus", field(1, sandbox)))[1][0])
        return str(fields(status[5][0])[1][0], "utf-8") if 5 in status and status[5][0] else ""

    def stop(self, sandbox: str) -> None:
        self._call("StopPodSandbox", field(1, sandbox))

    def remove(self, sandbox: str) -> None:
        self._call("RemovePodSandbox", field(1, sandbox))

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
