"""The machine under the lab: commands, network namespaces, processes, and the one mount that `ip netns` makes.

The only place that starts programs. Every process of a lab carries PYNET_LAB=NAME in its environment, and every
namespace the lab's prefix in its name, so that all of them can be found again whatever happened in between.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from . import state
from .state import LabError

NETNS = Path("/run/netns")
MARK = "PYNET_LAB"
# How many times slower than usual this machine is: what waits for something to happen waits as much longer. An emulated
# machine says so (tests/vm/guest).
SLOWNESS = float(os.environ.get("PYNET_LAB_SLOWNESS", "1"))


class HostFacts(msgspec.Struct, frozen=True):
    """What the machine was like before the first lab: whether /run/netns was there, and mounted."""

    netns_folder: bool
    netns_mount: bool


def run(
    command: Sequence[str],
    *,
    input: str | None = None,
    check: bool = True,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command; raise `LabError` with its output when it fails and `check` is true."""
    line = " ".join(command)
    try:
        done = subprocess.run(
            command, input=input, text=True, capture_output=True, timeout=timeout, check=False, env=env
        )
    except FileNotFoundError:
        raise LabError(f"{command[0]} is not installed", command=line) from None
    except subprocess.TimeoutExpired as expired:
        raise LabError(f"no end after {timeout:.0f} s", command=line, output=str(expired.stdout or "")) from None
    if check and done.returncode:
        raise LabError(f"exit status {done.returncode}", command=line, output=(done.stdout + done.stderr).strip())
    return done


def marked(lab: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a lab's process."""
    return {**os.environ, MARK: lab, **(extra or {})}


def inside(netns: str, *command: str) -> list[str]:
    """Return the command line that runs `command` in a namespace."""
    return ["ip", "netns", "exec", netns, *command]


def batch(lab: str, netns: str, lines: Sequence[str]) -> None:
    """Run `ip` commands inside a namespace, in one process."""
    if lines:
        run(["ip", "-n", netns, "-batch", "-"], input="\n".join(lines) + "\n", env=marked(lab))


def add_namespace(lab: str, netns: str) -> None:
    """Make a namespace, with its loopback up."""
    run(["ip", "netns", "add", netns], env=marked(lab))
    run(["ip", "-n", netns, "link", "set", "lo", "up"], env=marked(lab))


def sysctl(lab: str, netns: str, settings: Mapping[str, str]) -> None:
    """Write kernel settings of a namespace; those that this kernel does not have (without IPv6) are passed over."""
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    run(inside(netns, "sysctl", "-q", "-e", "-p", "-"), input=lines, env=marked(lab))


def start(lab: str, netns: str, command: Sequence[str], log: Path, extra: Mapping[str, str] | None = None) -> int:
    """Start a process in a namespace that outlives this command; return its id. Its output goes to `log`."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            inside(netns, *command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            env=marked(lab, extra),
            start_new_session=True,
        )
    _started[child.pid] = child
    return child.pid


_started: dict[int, subprocess.Popen[bytes]] = {}


def alive(pid: int) -> bool:
    """Return whether a process runs (one that has ended and waits for its parent does not)."""
    if pid in _started and _started[pid].poll() is not None:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def namespaces(lab: str) -> list[str]:
    """Return a lab's namespaces that there are."""
    try:
        return sorted(name for name in os.listdir(NETNS) if name.startswith(state.prefix(lab)))
    except FileNotFoundError:
        return []


def processes(lab: str, netns: Sequence[str] = ()) -> dict[int, str]:
    """Return the processes with the lab's mark or in one of its namespaces `netns`: id → command line.

    This process and its ancestors are left out.
    """
    inodes = set()
    for name in netns:
        with contextlib.suppress(OSError):
            inodes.add(f"net:[{os.stat(NETNS / name).st_ino}]")
    mark = f"{MARK}={lab}".encode()
    spared = _ancestors()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in spared:
            continue
        try:
            ours = os.readlink(f"/proc/{entry}/ns/net") in inodes or (
                mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            )
            if ours:
                found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
    return found


def processes_in(netns: str) -> list[int]:
    """Return the processes in one namespace."""
    done = run(["ip", "netns", "pids", netns], check=False)
    return [int(pid) for pid in done.stdout.split()]


def _ancestors() -> set[int]:
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def end(pids: Sequence[int], *, gently: float = 0.0) -> None:
    """End processes: with TERM, and after `gently` seconds with KILL; return when they are gone."""
    for how, seconds in ((signal.SIGTERM, gently), (signal.SIGKILL, 10.0)):
        pids = [pid for pid in pids if alive(pid)]
        if not pids or not seconds:
            continue
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        deadline = time.monotonic() + seconds
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.005)


def pause(least: float, asked: float) -> float:
    """Return how long to wait before asking again, in seconds, after a question that began at the time `asked`.

    Five times what the question took, so that who waits takes little of the processor from those it waits for: on an
    emulated machine, polling at a fixed pace took more than the start of the daemons did.
    """
    return min(1.0, max(least, 5 * (time.monotonic() - asked)))


def end_all(lab: str) -> None:
    """End every process of a lab, also those that are being started at this moment by one that is ended."""
    deadline = time.monotonic() + 20
    while found := processes(lab, namespaces(lab)):
        end(list(found))
        if time.monotonic() > deadline:
            raise LabError(f"processes that cannot be ended: {found}")


def delete_namespace(netns: str) -> None:
    """Remove a namespace; whatever is in it goes with it. Absent is fine."""
    run(["ip", "netns", "del", netns], check=False)
    if (NETNS / netns).exists():
        raise LabError(f"namespace {netns} cannot be removed", command=f"ip netns del {netns}")


def observe_host() -> HostFacts:
    """Return what the machine is like."""
    return HostFacts(NETNS.is_dir(), NETNS.is_dir() and _mounted(NETNS))


def remember_host(folder: state.Folder) -> None:
    """Write down what the machine was like before the first lab, and make this lab's folder."""
    path = state.ROOT / "host.json"
    with state.locked(state.ROOT / ".lock"):
        if not path.exists():
            state.write(path, msgspec.json.encode(observe_host()))
        folder.path.mkdir(exist_ok=True)


def restore_host() -> None:
    """Bring back what the machine was like, when no lab is left and nobody else's namespace either."""
    with state.locked(state.ROOT / ".lock"):
        if any(path.is_dir() for path in state.ROOT.iterdir()):
            return
        try:
            facts = msgspec.json.decode((state.ROOT / "host.json").read_bytes(), type=HostFacts)
        except (FileNotFoundError, msgspec.DecodeError):
            facts = observe_host()
        if NETNS.is_dir() and not os.listdir(NETNS):
            if not facts.netns_mount and _mounted(NETNS):
                run(["umount", "-n", str(NETNS)], check=False)  # -n: else umount leaves a folder /run/mount
            if not facts.netns_folder and not _mounted(NETNS):
                with contextlib.suppress(OSError):
                    NETNS.rmdir()
        for path in (state.ROOT / "host.json", state.ROOT / ".lock"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            state.ROOT.rmdir()


def _mounted(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)
