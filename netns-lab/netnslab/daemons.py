"""The two daemons of every node: how they are started, whether they are ready, and what their logs say."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from . import agents, api, machine
from . import topology as plan
from .state import Folder, LabError, NodeRecord, Spec, write

PROGRAMS = ("pynetd", "pyproxy")
HEALTH_PORTS = {"pynetd": 10248, "pyproxy": 10256}
METRICS_PORTS = {"pynetd": 10247, "pyproxy": 10249}
READY_PATHS = {"pynetd": "/readyz", "pyproxy": "/healthz"}
READY_SECONDS = 120.0  # an emulated machine takes its time; a daemon that ends is noticed at once


def command(folder: Folder, spec: Spec, node: NodeRecord, program: str) -> list[str]:
    """Return the command line of a node's daemon."""
    topology = plan.load(spec.topology)
    place = folder.node(node.netns)
    line = [
        str(Path(sys.executable).parent / program),
        f"--kubeconfig={api.node_kubeconfig(folder, node)}" if spec.api else f"--manifests={folder.manifests}",
        f"--healthz-bind-address=127.0.0.1:{HEALTH_PORTS[program]}",
        f"--metrics-bind-address=127.0.0.1:{METRICS_PORTS[program]}",
    ]
    cluster = ",".join(plan.cluster_cidrs(topology, spec.ipv6))
    if program == "pynetd":
        line += [f"--node-name={node.name}", f"--state-dir={place / 'state'}", f"--cni-conf-dir={place / 'cni'}"]
        line += [f"--cluster-cidr={cluster}", *spec.pynetd_args]
    else:
        line += [f"--mode={spec.mode}", f"--hostname-override={node.name}", f"--cluster-cidr={cluster}"]
        line.append("--audit-period=5s")  # a careless hand's work is undone while one looks on
        if spec.scheduler:
            line.append(f"--{'ipvs-' if spec.mode == 'ipvs' else ''}scheduler={spec.scheduler}")
        line += spec.pyproxy_args
    return line


def log_path(folder: Folder, node: NodeRecord, program: str) -> Path:
    """Return where a daemon's output goes."""
    return folder.logs / f"{node.netns.removeprefix(folder.netns(''))}.{program}.log"


def _pid_path(folder: Folder, node: NodeRecord, program: str) -> Path:
    return folder.node(node.netns) / f"{program}.pid"


def start(folder: Folder, spec: Spec, node: NodeRecord, program: str) -> None:
    """Start one daemon."""
    place = folder.node(node.netns)
    for name in ("state", "cni"):
        (place / name).mkdir(parents=True, exist_ok=True)
    extra = {"XTABLES_LOCKFILE": str(place / "xtables.lock")}
    if spec.iptables_backend:
        extra["PATH"] = f"{_backend_folder(place, spec.iptables_backend)}:/usr/sbin:/usr/bin:/sbin:/bin"
    pid = machine.start(
        folder.name, node.netns, command(folder, spec, node, program), log_path(folder, node, program), extra
    )
    write(_pid_path(folder, node, program), str(pid).encode())


def _backend_folder(place: Path, backend: str) -> Path:
    """Return a folder of links that makes `iptables` mean the chosen back end, as update-alternatives does."""
    folder = place / f"iptables-{backend}"
    folder.mkdir(exist_ok=True)
    for family in ("iptables", "ip6tables"):
        for tool in ("", "-save", "-restore"):
            link = folder / f"{family}{tool}"
            if not link.is_symlink():
                link.symlink_to(f"/usr/sbin/{family}-{backend}{tool}")
    return folder


def pid_of(folder: Folder, node: NodeRecord, program: str) -> int:
    """Return the process of a daemon; 0: it does not run."""
    try:
        pid = int(_pid_path(folder, node, program).read_text())
    except (FileNotFoundError, ValueError):
        return 0
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return 0
    mine = not line or program.encode() in line  # empty for an instant while a program takes the place of another
    return pid if mine and machine.alive(pid) else 0


def stop(folder: Folder, node: NodeRecord, program: str, *, kill: bool = False) -> None:
    """End a daemon: as an operator does, or as a crash."""
    pid = pid_of(folder, node, program)
    if pid:
        machine.end([pid], gently=0 if kill else 10)
    _pid_path(folder, node, program).unlink(missing_ok=True)


def ready(folder: Folder, node: NodeRecord, program: str) -> tuple[bool, str]:
    """Return whether a daemon says that it is ready, and what it says."""
    status, body = agents.http_status(folder, node.name, "127.0.0.1", HEALTH_PORTS[program], READY_PATHS[program])
    return status == 200, f"{status} {body.strip()}" if status else body.strip()


def wait(folder: Folder, spec: Spec, node: NodeRecord, program: str) -> None:
    """Return when a daemon is ready; raise `LabError` with its log when it ends or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        asked = time.monotonic()
        good, says = ready(folder, node, program)
        if good:
            return
        running = pid_of(folder, node, program)
        if not running or time.monotonic() > deadline:
            raise LabError(
                f"{program} of {node.name} " + ("is not ready: " + says if running else "has ended"),
                command=" ".join(machine.inside(node.netns, *command(folder, spec, node, program))),
                log=tail(log_path(folder, node, program)),
            )
        time.sleep(machine.pause(0.02, asked))


def tail(path: Path, lines: int = 20) -> str:
    """Return the last lines of a log."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
