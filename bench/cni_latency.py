"""How long ADD and DEL take: ours with the agent, ours without, and Debian's reference plugins with the same features.

One host namespace a round; every pod is a namespace; each call is a process, as a runtime makes it. Serially: p50 and
p99 of the calls; several at once: the time a pod, from the first call to the last answer. Medians of rounds that take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from form import Table, median

PROGRAMS = Path(sys.executable).parent
REFERENCE = Path("/usr/lib/cni")
FEATURES = ("bare IPv4", "dual stack", "+ masquerade", "+ one host port")
AGENT = """
import sys, threading
from cni.serve import Server
server = Server(sys.argv[1]); server.start(); print("ready", flush=True); sys.stdin.read(); server.close()
"""


class Column(NamedTuple):
    name: str
    chain: Callable[[str, str, int], list[tuple[Path, dict[str, Any]]]]
    agent: bool


def ours(feature: str, state: str, port: int) -> list[tuple[Path, dict[str, Any]]]:
    conf = base() | {
        "type": "pynet-cni", "bridge": "cni0", "isDefaultGateway": True, "stateDir": state,
        "ipMasq": feature in FEATURES[2:], "ipam": {"type": "pynet-ipam", "ranges": ranges(feature)},
    }  # fmt: skip
    return [(PROGRAMS / "pynet-cni", conf | ports(feature, port))]


def reference(feature: str, state: str, port: int) -> list[tuple[Path, dict[str, Any]]]:
    bridge = base() | {
        "type": "bridge", "bridge": "cni0", "isDefaultGateway": True, "ipMasq": feature in FEATURES[2:],
        "ipam": {"type": "host-local", "ranges": ranges(feature), "dataDir": state},
    }  # fmt: skip
    chain = [(REFERENCE / "bridge", bridge)]
    if feature == FEATURES[3]:
        chain.append((REFERENCE / "portmap", base() | {"type": "portmap"} | ports(feature, port)))
    return chain


def base() -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": "bench"}


def ranges(feature: str) -> list[list[dict[str, str]]]:
    four = [[{"subnet": "10.64.0.0/16"}]]
    return [*four, [{"subnet": "fd00:64::/64"}]] if feature == "dual stack" else four


def ports(feature: str, port: int) -> dict[str, Any]:
    if feature != FEATURES[3]:
        return {}
    mapping = {"hostPort": port, "containerPort": 80, "protocol": "tcp"}
    return {"runtimeConfig": {"portMappings": [mapping]}, "capabilities": {"portMappings": True}}


def call(command: str, pod: str, chain: list[tuple[Path, dict[str, Any]]], result: Any = None) -> Any:
    """Run a chain's plugins one after the other (DEL: in reverse), from inside the host's namespace."""
    for program, conf in chain if command == "ADD" else chain[::-1]:
        environment = {
            "PATH": os.environ["PATH"], "CNI_COMMAND": command, "CNI_CONTAINERID": pod, "CNI_IFNAME": "eth0",
            "CNI_NETNS": f"/run/netns/{pod}", "CNI_PATH": f"{PROGRAMS}:{REFERENCE}",
        }  # fmt: skip
        stdin = json.dumps(conf | ({"prevResult": result} if result else {}))
        done = subprocess.run([program], input=stdin, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{program.name} {command}: {done.stdout}{done.stderr}")
        if command == "ADD":
            result = json.loads(done.stdout)
    return result


@contextmanager
def namespaces(names: list[str]) -> Iterator[None]:
    batch = "".join(f"netns add {name}\n" for name in names)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
    try:
        yield
    finally:
        batch = "".join(f"netns del {name}\n" for name in names)
        subprocess.run(["ip", "-force", "-batch", "-"], input=batch, text=True, check=False)


def enter(name: str) -> None:
    from pynet.kernel import netns

    fd = netns.open_path(f"/run/netns/{name}")
    netns.enter(fd)
    os.close(fd)


def round_of(
    pods: list[str], host: str, column: Column, feature: str, state: str, at_once: int
) -> tuple[list[float], list[float], float, float]:
    """Return each ADD's and DEL's seconds, and the time a pod of all ADDs and of all DELs."""
    results: dict[str, Any] = {}
    chains = {pod: column.chain(feature, state, 20000 + number) for number, pod in enumerate(pods)}

    def timed(command: str, pod: str) -> float:
        begun = time.perf_counter()
        answer = call(command, pod, chains[pod], results.get(pod))
        took = time.perf_counter() - begun
        if command == "ADD":
            results[pod] = answer
        return took

    found: list[Any] = []
    whole: list[float] = []
    for command in ("ADD", "DEL"):
        begun = time.perf_counter()
        with ThreadPoolExecutor(at_once, initializer=enter, initargs=(host,)) as pool:
            found.append(list(pool.map(lambda pod, command=command: timed(command, pod), pods)))
        whole.append((time.perf_counter() - begun) / len(pods))
    return found[0], found[1], whole[0], whole[1]


@contextmanager
def agent(host: str, state: str, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    command = ["ip", "netns", "exec", host, sys.executable, "-c", AGENT, state]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield
    finally:
        child.communicate(timeout=60)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] * 1000


@contextmanager
def stage(column: Column, count: int, feature: str = FEATURES[0]) -> Iterator[tuple[str, list[str], str]]:
    """Yield a host, so many pods, and a state folder; the bridge and all tables are there already."""
    host = f"bench{os.getpid()}h"
    pods = [f"bench{os.getpid()}p{number}" for number in range(count)]
    with ExitStack() as stack:
        state = tempfile.mkdtemp(prefix="pynet-bench-", dir="/run")
        stack.callback(shutil.rmtree, state, True)
        stack.enter_context(namespaces([host, *pods]))
        subprocess.run(["ip", "netns", "exec", host, "ip", "link", "set", "lo", "up"], check=True)
        stack.enter_context(agent(host, state, column.agent))
        round_of(pods[:1], host, column, feature, state, 1)
        yield host, pods, state


def measure(column: Column, feature: str, count: int, at_once: int) -> dict[str, float]:
    """Return the figures of one round, ms."""
    with stage(column, count, feature) as (host, pods, state):
        adds, dels, add, delete = round_of(pods, host, column, feature, state, at_once)
    return {
        "ADD p50": percentile(adds, 0.5), "ADD p99": percentile(adds, 0.99), "ADD a pod": add * 1000,
        "DEL p50": percentile(dels, 0.5), "DEL p99": percentile(dels, 0.99), "DEL a pod": delete * 1000,
    }  # fmt: skip


COLUMNS = (Column("agent", ours, True), Column("in process", ours, False), Column("reference", reference, False))


AGENT_ONLY, REFERENCE_ONLY = COLUMNS[0], COLUMNS[2]


def medians(columns: Sequence[Column], feature: str, count: int, at_once: int, runs: int) -> list[dict[str, float]]:
    """Return each column's figures: the median of rounds in which the columns take turns."""
    rounds = [[measure(column, feature, count, at_once) for column in columns] for _ in range(runs)]
    return [
        {figure: median([one[number][figure] for one in rounds]) for figure in rounds[0][number]}
        for number in range(len(columns))
    ]


def features(chosen: Sequence[str], concurrencies: Sequence[int], count: int, runs: int) -> None:
    """ADD and DEL with each feature, by how many are called at once."""
    table = Table(
        "cni", "The CNI plugin: ADD and DEL, ms",
        ["feature", "at once", "figure", *(column.name for column in COLUMNS), "agent / reference"],
    )  # fmt: skip
    for feature in chosen:
        for at_once in concurrencies:
            found = medians(COLUMNS, feature, max(count, at_once * 2), at_once, runs)
            single = ("ADD p50", "ADD p99", "DEL p50", "DEL p99")
            for figure in single if at_once == 1 else ("ADD a pod", "DEL a pod"):
                values = [one[figure] for one in found]
                table.add(feature, at_once, figure, *values, values[0] / values[2])
    table.notes.append(f"medians of {runs} rounds; serially at least {count} pods a round")
    table.notes.append("goals: bare IPv4 no slower than the reference, one host port at most a third of its time")
    table.finish()


def many(count: int, runs: int) -> None:
    """A crowd of ADDs at once, then of DELs."""
    table = Table("cni-many", f"{count} pods at once, ms a pod", ["what", "ADD", "DEL"])
    both = (AGENT_ONLY, REFERENCE_ONLY)
    for column, found in zip(both, medians(both, FEATURES[0], count, count, runs), strict=True):
        table.add(column.name, found["ADD a pod"], found["DEL a pod"])
    table.notes += [f"medians of {runs} rounds", "goals: ADD under 8 ms a pod, DEL quicker than the reference's"]
    table.finish()


def full(count: int) -> None:
    """A node that fills up: the first ADDs beside the last ones."""
    table = Table("cni-full", f"A node of {count} pods, one after the other: ADD p50, ms", ["what", "first", "last"])
    part = count // 10
    for column in (AGENT_ONLY, REFERENCE_ONLY):
        with stage(column, count) as (host, pods, state):
            adds, *_ = round_of(pods, host, column, FEATURES[0], state, 1)
        table.add(column.name, percentile(adds[:part], 0.5), percentile(adds[-part:], 0.5))
    table.notes.append(f"first and last: of {part} pods each")
    table.finish()


def reservations(sizes: Sequence[int]) -> None:
    """One ADD beside reservations that other pods hold."""
    from cni.ipam import ranges as ipam_ranges
    from cni.ipam.store import Owner, Store

    table = Table("cni-reservations", "ADD and DEL beside reservations, p50, ms", ["reservations", "ADD", "DEL"])
    for size in sizes:
        with stage(AGENT_ONLY, 30) as (host, pods, state):
            if size:
                conf = ipam_ranges.parse(ours(FEATURES[0], state, 0)[0][1], {}, "1.0.0", state)
                store = Store(conf.data_dir, conf.network)
                for number in range(size):
                    store.reserve(conf, Owner(f"held{number}", "eth0"), (), 0.0)
                store.close()
            adds, dels, *_ = round_of(pods, host, AGENT_ONLY, FEATURES[0], state, 1)
        table.add(size, percentile(adds, 0.5), percentile(dels, 0.5))
    table.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="pods a serial round")
    parser.add_argument("--runs", type=int, default=3, help="rounds of each kind")
    parser.add_argument("--quick", action="store_true", help="bare IPv4 and one host port, serial and 8 at once")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("cni_latency: needs root: it makes network namespaces")
    if options.quick:
        features((FEATURES[0], FEATURES[3]), (1, 8), options.count, 1)
        return
    features(FEATURES, (1, 8, 32), options.count, options.runs)
    many(300, options.runs)
    full(1000)
    reservations((0, 1000, 4000))


if __name__ == "__main__":
    main()
