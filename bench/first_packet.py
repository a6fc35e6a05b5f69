"""connect() to the first, a middle and the last Service, against the number of Services: flat or not.

Everything happens in one network namespace: every pod address is local (an any-address route on lo), one server accepts
for all of them. The linear layout is kube-proxy's, loaded by the same tool. Microseconds, medians.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import peers
from cluster import cluster_ip
from form import Table, in_own_namespace, in_process_of_its_own, median
from proxies import MODES, loaded

ENDPOINTS = 2
WHERE = ("first", "middle", "last")


def prepare() -> None:
    """Make every address of pods and Services reachable within the namespace, and accept at port 8080."""
    for arguments in ("route add local 10.128.0.0/9 dev lo", "route add 10.96.0.0/12 dev lo src 10.128.255.254"):
        subprocess.run(["ip", *arguments.split()], check=True)
    server = socket.create_server(("0.0.0.0", 8080), backlog=4096)
    threading.Thread(target=_accept, args=(server,), daemon=True).start()


def _accept(server: socket.socket) -> None:
    while True:
        server.accept()[0].close()


def connect_times(address: str, connections: int) -> list[float]:
    """Return the microseconds of each connect()."""
    found = []
    for _ in range(connections):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            begin = time.perf_counter()
            client.connect((address, 80))
            found.append((time.perf_counter() - begin) * 1e6)
    return found


def ours(mode: str, services: int) -> None:
    loaded(mode, services, ENDPOINTS)


def linear(mode: str, services: int) -> None:
    subprocess.run(
        [f"{mode}-restore", "--noflush"],
        input=peers.iptables(services, ENDPOINTS) + peers.iptables_jumps(), text=True, check=True,
    )  # fmt: skip


def measure(layout: str, mode: str, services: int, connections: int) -> dict[str, float]:
    prepare()
    {"pynet": ours, "linear": linear}[layout](mode, services)
    numbers = {"first": 0, "middle": services // 2, "last": services - 1}
    rounds: dict[str, list[float]] = {where: [] for where in WHERE}
    for number in numbers.values():
        connect_times(cluster_ip(number), connections // 10)
    for _ in range(10):
        for where, number in numbers.items():
            rounds[where] += connect_times(cluster_ip(number), connections // 10)
    return {where: median(found) for where, found in rounds.items()}


def point(layout: str, mode: str, services: int, connections: int) -> dict[str, float]:
    return in_process_of_its_own(__file__, layout, mode, services, connections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="100,1000,5000,10000,20000")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--connections", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--point", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        layout, mode, services, connections, answer = args.point
        in_own_namespace()
        Path(answer).write_text(json.dumps(measure(layout, mode, int(services), int(connections))))
        return
    table = Table(
        "first_packet",
        "connect() to a Service, median of TCP handshakes, µs",
        ["mode", "layout", "services", *(f"{where} us" for where in WHERE), "against smallest"],
    )
    sizes = [int(size) for size in args.sizes.split(",")]
    kinds = [("pynet", mode) for mode in args.modes.split(",")] + [("linear", "iptables-legacy")]
    # sizes in the inner loop, kinds side by side in time: a slow minute of the machine strikes all alike
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for _ in range(args.runs):
        for size in sizes:
            for layout, mode in kinds:
                found.setdefault((layout, mode, size), []).append(point(layout, mode, size, args.connections))
    for layout, mode in kinds:
        base = 0.0
        for size in sizes:
            runs = found[layout, mode, size]
            # a slow phase of the machine only adds: the least of the runs' medians is the layout's own time
            least = {where: min(run[where] for run in runs) for where in WHERE}
            worst = max(least.values())
            base = base or worst
            table.add(mode, layout, size, *least.values(), worst / base)
    table.notes.append("against smallest: the slowest of the three, divided by the same mode's at the smallest size")
    table.notes.append(
        f"least median of {args.runs} runs of {args.connections} connections to each of the three Services"
    )
    table.plot("connect() to the last Service, µs", x="services", y="last us", series=["mode", "layout"])
    table.finish()


if __name__ == "__main__":
    main()
