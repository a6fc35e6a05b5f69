"""`lab up` and `lab down`: from nothing to a cluster, and from whatever is there back to nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from . import agents, api, daemons, kernel, machine, network, pods, state, workloads
from . import topology as plan
from .cluster import Lab, node_record
from .progress import err, step
from .state import Folder, LabError, NodeRecord, Spec

DEMO = Path(__file__).resolve().parent.parent / "scenarios" / "demo.yaml"


def up(wanted: Spec, count: int | None, *, demo: bool = True) -> Lab:
    """Bring a lab up: a lab that is whole and as wanted is repaired, anything else is replaced."""
    try:
        return _up(wanted, count, demo)
    except kernel.Unable:
        remove(Folder(wanted.name))
        raise


def _up(wanted: Spec, count: int | None, demo: bool) -> Lab:
    folder = Folder(wanted.name)
    topology = plan.load(wanted.topology)
    count = topology.nodes.count if count is None else count
    if not 1 <= count <= plan.LIMIT:
        raise LabError(f"--nodes {count}: expected 1 to {plan.LIMIT}")
    with holding(folder):
        present = folder.read_spec()
        if present is not None and usable(folder, present, wanted, count):
            lab = Lab(folder, present)
            repair(lab)
            return lab
        if present is not None or machine.namespaces(folder.name) or machine.processes(folder.name):
            with step(f"removing what is left of lab {folder.name}"):
                clear(folder)
        with step(f"asking the kernel for what --mode {wanted.mode} needs"):
            kernel.demand_features(folder, wanted.mode, wanted.iptables_backend, wanted.ipv6)
        folder.make()
        nodes = tuple(node_record(folder, topology, wanted.ipv6, index) for index in range(1, count + 1))
        lab = Lab(folder, wanted)
        lab.save(nodes=nodes)
        title = f"network: {', '.join(node.name for node in nodes)} and client on {', '.join(topology.subnets)}"
        with step(title):
            build_network(lab)
        if wanted.api:
            with step("API server"):
                api.start(folder)
        with step("daemons: pynetd and pyproxy on every node"):
            start_nodes(lab, nodes)
        if demo:
            with step("demo: Deployment web with three pods, Services web and dns"):
                workloads.apply(lab, workloads.read(str(DEMO)))
        lab.save(complete=True)
        return lab


@contextlib.contextmanager
def holding(folder: Folder) -> Iterator[None]:
    """Hold a lab's lock, the machine's facts being written down before anything is made: one command changes a lab."""
    machine.remember_host(folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(state.locked(folder.path / ".lock", wait=False))
        except BlockingIOError:
            pid = state.holder(folder.path / ".lock")
            raise LabError(f"another lab command works on lab {folder.name!r} (process {pid})") from None
        yield


def usable(folder: Folder, present: Spec, wanted: Spec, count: int) -> bool:
    """Return whether the lab that is there is what is wanted, with all its namespaces."""
    alike = msgspec.structs.replace(present, nodes=(), complete=False) == wanted and len(present.nodes) == count
    there = set(machine.namespaces(folder.name))
    parts = {folder.netns("underlay"), folder.netns("client"), *(node.netns for node in present.nodes)}
    return present.complete and alike and there >= parts | {pod.netns for pod in folder.read_pods()}


def build_network(lab: Lab) -> None:
    """Make the underlay, and everybody's machine on it."""
    network.build_underlay(lab.folder, lab.topology, lab.spec.ipv6)
    jobs: list[Callable[[], None]] = [lambda: network.attach_client(lab.folder, lab.topology, lab.spec)]
    jobs += [lambda node=node: network.attach_node(lab.folder, lab.topology, node) for node in lab.spec.nodes]  # type: ignore[misc]
    pods.each_at_once(lambda job: job(), jobs)
    route_load_balancers(lab)


def route_load_balancers(lab: Lab) -> None:
    """Lead load-balancer addresses to the first node, as an announcer such as MetalLB would."""
    pool = lab.topology.ranges.get("load-balancers") or {}
    if lab.spec.nodes:
        first = lab.spec.nodes[0]
        lines = [
            f"route replace {pool[family]} via {address}"
            for family, address in first.addresses.items()
            if family in pool
        ]
        machine.batch(lab.folder.name, lab.folder.netns("underlay"), lines)


def start_nodes(lab: Lab, nodes: Sequence[NodeRecord]) -> None:
    """Write the Node objects, start all daemons and agents, and return when all are ready."""
    for node in nodes:
        lab.put_node(node)
    for node in nodes:
        for program in daemons.PROGRAMS:
            daemons.start(lab.folder, lab.spec, node, program)
    names = [(node.name, node.netns) for node in nodes]
    if not (lab.folder.agents / "client.sock").exists():
        names.append(("client", lab.folder.netns("client")))
    for name, netns in names:
        ports = pods.parse_ports(CLIENT_PORTS) if name == "client" else ()
        agents.start(lab.folder, name, netns, ports)
    for name, _ in names:
        agents.wait(lab.folder, name)
    with ThreadPoolExecutor(8) as pool:
        waits = [
            pool.submit(daemons.wait, lab.folder, lab.spec, node, program)
            for node in nodes
            for program in daemons.PROGRAMS
        ]
    for done in waits:
        done.result()


CLIENT_PORTS = "tcp:9000,udp:9000"  # what the client serves: the outside, for pods that call there


def repair(lab: Lab) -> None:
    """Start again what has ended in a lab whose namespaces are all there."""
    if lab.spec.api and not api.pid_of(lab.folder):
        with step("starting the API server again"):
            api.start(lab.folder)
    for node in lab.spec.nodes:
        lost = [program for program in daemons.PROGRAMS if not daemons.pid_of(lab.folder, node, program)]
        revive(lab, node.name, node.netns)
        for program in lost:
            with step(f"starting {program} of {node.name} again"):
                daemons.start(lab.folder, lab.spec, node, program)
                daemons.wait(lab.folder, lab.spec, node, program)
    revive(lab, "client", lab.folder.netns("client"), CLIENT_PORTS)
    for pod in lab.pods():
        ports = ",".join(f"{port.protocol}:{port.port}" for port in pod.ports)
        revive(lab, pod.key, pod.netns, ports)
    lab.sync()
    err.print(f"lab {lab.spec.name} is up", style="green")


def revive(lab: Lab, name: str, netns: str, ports: str = "") -> None:
    """Start a machine's agent again if it does not answer."""
    try:
        agents.ask(lab.folder, name, {"operation": "ping"}, timeout=5)
    except LabError:
        with step(f"starting the server of {name} again"):
            pid = agents.start(lab.folder, name, netns, pods.parse_ports(ports))
            agents.wait(lab.folder, name, pid)


def clear(folder: Folder) -> None:
    """Remove all of a lab but its lock: processes, namespaces, files. Needs nothing of what the lab wrote down."""
    machine.end_all(folder.name)
    for netns in machine.namespaces(folder.name):
        machine.delete_namespace(netns)
    if folder.path.is_dir():
        for path in folder.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()


def down(name: str) -> None:
    """Remove a lab and leave the machine as it was before; fine when there is none, or half of one."""
    folder = Folder(name)
    if not folder.path.exists() and not machine.namespaces(name) and not machine.processes(name):
        machine.restore_host()
        err.print(f"no lab {name} is there")
        return
    with step(f"removing lab {name}"):
        interrupt(folder)
        remove(folder)


def remove(folder: Folder) -> None:
    """Remove all of a lab, and what the first lab brought to the machine if this was the last."""
    with holding(folder):
        clear(folder)
        shutil.rmtree(folder.path)
    machine.restore_host()


def interrupt(folder: Folder) -> None:
    """End a lab command that is at work on this lab."""
    deadline = time.monotonic() + 10
    while pid := state.holder(folder.path / ".lock"):
        if pid == os.getpid() or time.monotonic() > deadline:
            return
        try:
            os.kill(pid, signal.SIGTERM if time.monotonic() < deadline - 5 else signal.SIGKILL)
        except ProcessLookupError:
            continue
        time.sleep(0.05)
