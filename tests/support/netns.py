"""Network namespaces that a test makes and removes: `Namespace`, and `Names` that hands them out under unique names."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

_counter = itertools.count()


class Namespace:
    """One named network namespace; `run` runs a command in it, `start` leaves one running until the namespace goes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"
        self._children: list[subprocess.Popen[str]] = []
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.batch("link set lo up")

    def run(self, *command: str, check: bool = True, input: str | None = None, timeout: float = 60) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            input=input, text=True, capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(
                f"{self.name}: {' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def batch(self, *lines: str) -> None:
        """Run commands of `ip` here, one a line, in one process."""
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(
            ["ip", "-n", self.name, "-batch", "-"], input=text, text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise AssertionError(f"{self.name}: ip -batch: {done.stderr}\n{text}")

    def start(self, *command: str, **options: object) -> subprocess.Popen[str]:
        child: subprocess.Popen[str] = subprocess.Popen(  # type: ignore[call-overload]
            ["ip", "netns", "exec", self.name, *command],
            **{"text": True, "stdin": subprocess.DEVNULL, **options},
        )
        self._children.append(child)
        return child

    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def close(self) -> None:
        deadline = time.monotonic() + 5
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for child in self._children:
            child.kill()
            child.wait()
            for stream in (child.stdout, child.stderr):
                if stream:
                    stream.close()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


class Names:
    """Hands out namespaces with names that no other test, worker or run has; removes them all at the end."""

    def __init__(self) -> None:
        self._made: list[Namespace] = []

    def __call__(self, hint: str = "ns") -> Namespace:
        made = Namespace(f"pt{os.getpid()}-{next(_counter)}-{hint}")
        self._made.append(made)
        return made

    def close(self) -> None:
        for namespace in reversed(self._made):
            namespace.close()


def connect(left: Namespace, right: Namespace, left_if: str, right_if: str) -> None:
    """Join two namespaces by a veth pair, both ends up, no addresses."""
    left.batch(f"link add {left_if} type veth peer name {right_if} netns {right.name}", f"link set {left_if} up")
    right.batch(f"link set {right_if} up")


def programs() -> Path:
    """Return the folder of the installed programs (`pynet-cni`, `pynetd`, `pyproxy`)."""
    return Path(__file__).resolve().parents[2] / ".venv" / "bin"
