"""What the agent says of itself in `<state-dir>/status.json`, and how `pynetd status` prints it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from cni.node.nodes import Problem
from cni.node.routes import PROTOCOL, Underlay
from pynet import files

STATUS, NODE, LOCK = "status.json", "node.json", "pynetd.lock"


class Peer(msgspec.Struct, frozen=True, gc=False):
    """One pod CIDR of another node, how it is reached, and why so."""

    node: str
    address: str
    cidr: str
    how: str
    dev: str
    via: str
    mtu: int
    reason: str


class NodeFile(msgspec.Struct, frozen=True, rename="camel"):
    """What `node.json` says: the facts of this node that others than the agent may need."""

    name: str
    pod_cidrs: tuple[str, ...] = msgspec.field(name="podCIDRs", default=())
    mtu: int = 0
    bridge: str = ""
    underlay: tuple[Underlay, ...] = ()


class Status(msgspec.Struct, frozen=True, rename="camel"):
    """What `status.json` says."""

    node: NodeFile
    pid: int
    backend: str
    masquerade: str
    peers: tuple[Peer, ...] = ()
    problems: tuple[Problem, ...] = ()
    routes_wanted: int = 0
    routes_present: int = 0
    protocol: int = PROTOCOL


class Writer:
    """Writes the files when their contents changed."""

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir
        self._last: dict[str, bytes] = {}

    def write(self, status: Status) -> None:
        """Put `status` and its node into their files."""
        self._put(NODE, msgspec.json.encode(status.node))
        self._put(STATUS, msgspec.json.encode(status))

    def _put(self, name: str, data: bytes) -> None:
        if self._last.get(name) != data:
            files.replace(self._dir / name, data, durable=False)
            self._last[name] = data


def running(state_dir: Path) -> bool:
    """Say whether an agent holds the lock of that state directory."""
    try:
        descriptor = os.open(state_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def load(state_dir: Path) -> Status | None:
    """Return what the agent last said; None where it never did."""
    data = files.read(state_dir / STATUS)
    return None if data is None else msgspec.json.decode(data, type=Status)


def render(status: Status, alive: bool) -> str:
    """Return the status as text for a terminal."""
    node = status.node
    underlay = ", ".join(f"{place.address} on {place.dev} (MTU {place.mtu})" for place in node.underlay)
    head = [
        ("node", node.name),
        ("agent", f"running, pid {status.pid}" if alive else "NOT RUNNING; this is what it said last"),
        ("pod CIDRs", ", ".join(node.pod_cidrs) or "none: the Node has none yet"),
        ("pod MTU", str(node.mtu)),
        ("underlay", underlay or "none"),
        ("backend", status.backend),
        ("masquerade", status.masquerade),
        ("routes", f"{status.routes_present} of {status.routes_wanted} present (proto {status.protocol})"),
    ]
    lines = [f"{key + ':':<12}{value}" for key, value in head]
    rows = [("PEER", "ADDRESS", "POD CIDR", "HOW", "VIA", "DEV", "MTU", "WHY")]
    rows += [
        (p.node, p.address or "-", p.cidr, p.how, p.via or "-", p.dev or "-", str(p.mtu or "-"), p.reason)
        for p in status.peers
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    if status.problems:
        lines += ["", "PROBLEMS", *(f"  {problem.object}: {problem.reason}" for problem in status.problems)]
    return "\n".join(lines) + "\n"
