"""What a lab remembers on disk, under /run/pynet-lab/NAME, and the locks that keep its commands from each other.

Files are written whole and renamed into place; whatever is missing or half-written, `lab down` needs none of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path("/run/pynet-lab")
NAME = re.compile(r"[a-z0-9]{1,20}")
THING = re.compile(r"[a-z0-9]([a-z0-9.-]{0,38}[a-z0-9])?")


class LabError(Exception):
    """A command of the lab failed. `command`: the command line that did; `output`, `log`: what explains it."""

    def __init__(self, message: str, *, command: str = "", output: str = "", log: str = "") -> None:
        super().__init__(message)
        self.command = command
        self.output = output
        self.log = log


class NodeRecord(msgspec.Struct, frozen=True):
    """A node. `netns`: its namespace, which keeps its name when the node gets another; `addresses`: by family."""

    name: str
    index: int
    netns: str
    subnet: str
    addresses: dict[str, str]
    pod_cidrs: tuple[str, ...]
    zone: str
    port: str  # its port on the switch


class Spec(msgspec.Struct, frozen=True):
    """A lab as it was asked for, and its nodes. `complete`: `lab up` came to its end; `api`: it has an API server."""

    name: str
    topology: str = "flat"
    mode: str = "iptables"
    ipv6: bool = False
    scheduler: str = ""
    iptables_backend: str = ""
    pyproxy_args: tuple[str, ...] = ()
    pynetd_args: tuple[str, ...] = ()
    nodes: tuple[NodeRecord, ...] = ()
    complete: bool = False
    api: bool = False


class PodPort(msgspec.Struct, frozen=True):
    """A port that a pod serves. `host_port`: 0, or the node's port that leads to it."""

    protocol: str  # tcp or udp
    port: int
    name: str = ""
    host_port: int = 0


class Attachment(msgspec.Struct, frozen=True):
    """One CNI ADD, as a runtime caches it: each plugin's request without prevResult, and the result."""

    requests: tuple[dict[str, Any], ...]
    result: dict[str, Any]


class PodRecord(msgspec.Struct, frozen=True):
    """A pod. `owner`: the Deployment it belongs to; `attachment`: None until wired."""

    name: str
    namespace: str
    node: str
    netns: str
    container_id: str
    labels: dict[str, str]
    ports: tuple[PodPort, ...]
    ready: bool = True
    terminating: bool = False
    owner: str = ""
    attachment: Attachment | None = None

    @property
    def key(self) -> str:
        """The pod's name among all pods of the lab: the namespace left out where it is `default`."""
        return key_of(self.namespace, self.name)

    @property
    def addresses(self) -> dict[str, str]:
        """The pod's addresses, by family."""
        found: dict[str, str] = {}
        for each in (self.attachment.result if self.attachment else {}).get("ips", ()):
            address = each["address"].split("/")[0]
            found.setdefault("IPv6" if ":" in address else "IPv4", address)
        return found


class DeploymentRecord(msgspec.Struct, frozen=True):
    """A Deployment: so many pods of one kind. `node`: where they are pinned, or empty."""

    name: str
    namespace: str
    replicas: int
    labels: dict[str, str]
    ports: tuple[PodPort, ...]
    node: str = ""

    @property
    def key(self) -> str:
        """The Deployment's name among all of the lab."""
        return key_of(self.namespace, self.name)


def key_of(namespace: str, name: str) -> str:
    """Return how an object is called in the lab: NAME, or NAMESPACE.NAME outside of `default`."""
    return name if namespace == "default" else f"{namespace}.{name}"


class Folder:
    """The places of one lab's state."""

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise LabError(f"--name {name}: expected 1 to 20 characters of a-z and 0-9")
        self.name = name
        self.path = ROOT / name
        self.manifests = self.path / "manifests"
        self.pods = self.path / "pods"
        self.deployments = self.path / "deployments"
        self.agents = self.path / "agents"
        self.logs = self.path / "logs"

    def node(self, netns: str) -> Path:
        """Return the folder of a node: its daemons' state, its CNI configuration."""
        return self.path / "nodes" / netns

    def netns(self, thing: str) -> str:
        """Return the name of the network namespace of a node, a pod, `underlay` or `client`."""
        return f"{prefix(self.name)}{thing}"

    def make(self) -> None:
        """Make the folders."""
        for path in (self.manifests, self.pods, self.deployments, self.agents, self.logs):
            path.mkdir(parents=True, exist_ok=True)

    def read_spec(self) -> Spec | None:
        """Return the lab's spec; None: there is no lab, or none that got this far."""
        try:
            return msgspec.json.decode((self.path / "lab.json").read_bytes(), type=Spec)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def write_spec(self, spec: Spec) -> None:
        """Remember the lab's spec."""
        write(self.path / "lab.json", msgspec.json.encode(spec))

    def read_pods(self) -> list[PodRecord]:
        """Return all pods, by name."""
        return [msgspec.json.decode(path.read_bytes(), type=PodRecord) for path in sorted(self.pods.glob("*.json"))]

    def write_pod(self, pod: PodRecord) -> None:
        """Remember a pod."""
        write(self.pods / f"{pod.key}.json", msgspec.json.encode(pod))

    def forget_pod(self, pod: PodRecord) -> None:
        """Forget a pod."""
        (self.pods / f"{pod.key}.json").unlink(missing_ok=True)

    def read_deployments(self) -> list[DeploymentRecord]:
        """Return all Deployments, by name."""
        found = sorted(self.deployments.glob("*.json"))
        return [msgspec.json.decode(path.read_bytes(), type=DeploymentRecord) for path in found]

    def write_deployment(self, deployment: DeploymentRecord) -> None:
        """Remember a Deployment."""
        write(self.deployments / f"{deployment.key}.json", msgspec.json.encode(deployment))

    def forget_deployment(self, key: str) -> None:
        """Forget a Deployment."""
        (self.deployments / f"{key}.json").unlink(missing_ok=True)


def prefix(name: str) -> str:
    """Return what the names of all of a lab's network namespaces begin with."""
    return f"lab-{name}-"


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.rename(path)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`; it says who holds it. Raise BlockingIOError when it is held and `wait` is false.

    The file may be removed by its holder (`lab down`): whoever gets a lock on a removed file tries anew.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _same_file(descriptor, path):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                yield
                return
        finally:
            os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def holder(path: Path) -> int:
    """Return the process that holds the lock file `path`, 0: nobody."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 20, 0).decode(errors="replace")
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return 0
