"""The lab's API server as its commands see it (`lab up --api`): started, ended, and where its kubeconfigs are."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from . import machine
from .state import Folder, LabError, NodeRecord, write

KUBECONFIG = "kubeconfig"
_PID = "api.pid"
_READY_SECONDS = 15.0


def kubeconfig(folder: Folder) -> Path:
    """Return the kubeconfig for whoever is on this machine."""
    return folder.path / KUBECONFIG


def node_kubeconfig(folder: Folder, node: NodeRecord) -> Path:
    """Return the kubeconfig for the daemons of a node."""
    return folder.path / f"{KUBECONFIG}-{node.subnet}"


def start(folder: Folder) -> None:
    """Start the API server of a lab whose underlay is there, and return when it answers."""
    kubeconfig(folder).unlink(missing_ok=True)
    log = folder.logs / "apiserver.log"
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "netnslab.bridge", folder.name],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=Path(__file__).resolve().parent.parent,
            env=machine.marked(folder.name),
            start_new_session=True,
        )
    write(folder.path / _PID, str(child.pid).encode())
    deadline = time.monotonic() + _READY_SECONDS
    while not kubeconfig(folder).exists():
        if child.poll() is not None or time.monotonic() > deadline:
            raise LabError("the lab's API server did not start", log=log.read_text(errors="replace")[-2000:])
        time.sleep(0.02)


def pid_of(folder: Folder) -> int:
    """Return the API server's process; 0: it does not run."""
    try:
        pid = int((folder.path / _PID).read_text())
        mine = b"netnslab.bridge" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return 0
    return pid if mine and machine.alive(pid) else 0


def stop(folder: Folder, *, kill: bool = False) -> None:
    """End the API server: as an operator does, or as a crash."""
    if pid := pid_of(folder):
        machine.end([pid], gently=0 if kill else 5)
