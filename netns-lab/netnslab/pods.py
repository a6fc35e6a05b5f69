"""Pods: made as a runtime makes them (namespace, CNI ADD, process), and removed so that nothing of them is left."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from . import agents, machine, runtime
from .cluster import Lab
from .state import THING, LabError, PodPort, PodRecord, key_of

AT_ONCE = 4  # pods made or removed in parallel
RESERVED = ("client", "underlay", "probe")
Item = TypeVar("Item")
Made = TypeVar("Made")


def parse_ports(text: str) -> tuple[PodPort, ...]:
    """Return the ports of `--serve`: [NAME=]PROTO:PORT, separated by commas."""
    found = []
    for each in filter(None, text.split(",")):
        name, _, rest = each.rpartition("=")
        protocol, _, port = rest.partition(":")
        if protocol not in ("tcp", "udp") or not port.isdigit() or not 0 < int(port) < 65536:
            raise LabError(f"--serve {each}: expected [NAME=]PROTO:PORT, such as tcp:8080 or dns=udp:53")
        found.append(PodPort(protocol, int(port), name))
    return tuple(found)


def parse_labels(text: str) -> dict[str, str]:
    """Return the labels of `--labels`: KEY=VALUE, separated by commas."""
    found = {}
    for each in filter(None, text.split(",")):
        key, equals, value = each.partition("=")
        if not key or not equals:
            raise LabError(f"--labels {each}: expected KEY=VALUE")
        found[key] = value
    return found


def record(
    lab: Lab,
    name: str,
    node: str,
    *,
    namespace: str = "default",
    labels: dict[str, str] | None = None,
    ports: tuple[PodPort, ...] = (),
    owner: str = "",
) -> PodRecord:
    """Return a pod that is not yet made."""
    key = key_of(namespace, name)
    if not THING.fullmatch(key):
        raise LabError(f"pod {key!r}: expected up to 40 characters of a-z, 0-9, '-' and '.'")
    if key in RESERVED or any(key == each.name for each in lab.spec.nodes):
        raise LabError(f"pod {key!r}: that name is taken")
    where = lab.node(node)
    netns = lab.folder.netns(key)
    identifier = hashlib.sha256(f"{netns}/{where.index}".encode()).hexdigest()
    return PodRecord(name, namespace, where.name, netns, identifier, labels or {}, ports, owner=owner)


def create(lab: Lab, pod: PodRecord) -> PodRecord:
    """Make a pod; return it with what it got. When a step fails, nothing of it stays."""
    node = lab.node(pod.node)
    if (machine.NETNS / pod.netns).exists():
        raise LabError(f"pod {pod.key!r} is already there")
    try:
        machine.add_namespace(lab.folder.name, pod.netns)
        pid = agents.start(lab.folder, pod.key, pod.netns, pod.ports)
        pod = msgspec.structs.replace(pod, attachment=runtime.add(lab.folder, node, pod))
        lab.folder.write_pod(pod)
        agents.wait(lab.folder, pod.key, pid)
    except BaseException:
        _erase(lab, pod)
        raise
    return pod


def _erase(lab: Lab, pod: PodRecord) -> None:
    machine.end(machine.processes_in(pod.netns))
    machine.delete_namespace(pod.netns)
    (lab.folder.agents / f"{pod.key}.sock").unlink(missing_ok=True)
    (lab.folder.logs / f"{pod.key}.log").unlink(missing_ok=True)
    lab.folder.forget_pod(pod)


def create_all(lab: Lab, pods: Sequence[PodRecord]) -> list[PodRecord]:
    """Make pods, some at a time."""
    made = each_at_once(lambda pod: create(lab, pod), pods)
    lab.sync()
    return made


def remove_all(lab: Lab, pods: Sequence[PodRecord]) -> None:
    """Remove pods: first from the Services' endpoints, then from the nodes."""
    for pod in pods:
        lab.folder.write_pod(msgspec.structs.replace(pod, ready=False, terminating=True))
    lab.sync()

    def remove(pod: PodRecord) -> None:
        machine.end(machine.processes_in(pod.netns))
        if any(node.name == pod.node for node in lab.spec.nodes):
            runtime.delete(lab.folder, lab.node(pod.node), pod)
        _erase(lab, pod)

    each_at_once(remove, pods)
    lab.sync()


def change(lab: Lab, key: str, **changes: bool) -> PodRecord:
    """Change a pod's readiness (`ready`) or begin its end (`terminating`)."""
    pod = msgspec.structs.replace(lab.pod(key), **changes)
    lab.folder.write_pod(pod)
    lab.sync()
    return pod


def each_at_once(work: Callable[[Item], Made], items: Sequence[Item], at_once: int = AT_ONCE) -> list[Made]:
    """Return `work` of each item, some at a time; the first error is raised when all have ended."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, item) for item in items]
    return [future.result() for future in futures]


def check(lab: Lab, pod: PodRecord) -> None:
    """Raise `LabError` when a plugin finds the pod's wiring wrong."""
    runtime.check(lab.folder, lab.node(pod.node), pod)
