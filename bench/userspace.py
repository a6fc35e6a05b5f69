"""Requests through the userspace proxy beside the kernel modes, and beside no proxy at all, in one run.

One network namespace a mode: client, echo server and proxy are processes of their own; pod addresses are local. Short:
connect, one byte there and back, close. Kept: one byte there and back on an open connection. Dead: one of the Service's
two endpoints refuses; share of the short requests that fail.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from cluster import cluster_ip, objects, pod_ip
from form import Table, in_own_namespace, in_process_of_its_own, median, percentile
from proxies import Pipeline

from pynet.kernel.ipvs import Ipvs, IpvsMissing

MODES = ("direct", "iptables-legacy", "iptables-nft", "nftables", "ipvs", "userspace")
CLIENTS = 16
_LINGER = struct.pack("ii", 1, 0)


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if len(data) < 65536 and not data.startswith(b"B"):
            self._transport.write(data)

    def eof_received(self) -> None:
        self._transport.write(b"done")


def serve(ready: Event, hosts: list[str]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        for host in hosts:
            await loop.create_server(Echo, host, 8080, backlog=4096)
        ready.set()
        await asyncio.Event().wait()

    asyncio.run(run())


def hold(ready: Event, mode: str, endpoints: int) -> None:
    pipeline = Pipeline(mode)
    pipeline.cold(list(objects(1, endpoints)))
    ready.set()
    threading.Event().wait()


@contextlib.contextmanager
def beside(work: object, *arguments: object) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    child = context.Process(target=work, args=(ready, *arguments), daemon=True)  # type: ignore[arg-type]
    child.start()
    if not ready.wait(120):
        raise RuntimeError(f"{work}: not ready")
    try:
        yield
    finally:
        child.terminate()
        child.join()


def short(where: tuple[str, int]) -> float:
    """Return the microseconds of one short request."""
    begin = time.perf_counter()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        client.connect(where)
        client.sendall(b"x")
        if client.recv(1) != b"x":
            raise ConnectionResetError
    return (time.perf_counter() - begin) * 1e6


def kept(where: tuple[str, int], count: int) -> list[float]:
    found = []
    with socket.create_connection(where) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            begin = time.perf_counter()
            client.sendall(b"x")
            client.recv(1)
            found.append((time.perf_counter() - begin) * 1e6)
    return found


def rate(where: tuple[str, int], seconds: float) -> float:
    """Return the short requests a second of several clients at once."""
    counts = [0] * CLIENTS
    until = time.perf_counter() + seconds

    def run(index: int) -> None:
        while time.perf_counter() < until:
            short(where)
            counts[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def gigabits(where: tuple[str, int], mebibytes: int) -> float:
    data = b"B" * (1 << 20)
    with socket.create_connection(where) as client:
        begin = time.perf_counter()
        for _ in range(mebibytes):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        client.recv(4)
        return mebibytes * 8 * 1.048576e-3 / (time.perf_counter() - begin)


def failures(where: tuple[str, int], count: int) -> float:
    failed = 0
    for _ in range(count):
        try:
            short(where)
        except OSError:
            failed += 1
    return 100 * failed / count


def measure(mode: str, requests: int, seconds: float) -> dict[str, float]:
    for arguments in ("route add local 10.128.0.0/9 dev lo", "route add 10.96.0.0/12 dev lo src 10.128.255.254"):
        subprocess.run(["ip", *arguments.split()], check=True)
    service = (pod_ip(0), 8080) if mode == "direct" else (cluster_ip(0), 80)
    found: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(beside(serve, [pod_ip(0)]))
        if mode != "direct":
            stack.enter_context(beside(hold, mode, 1))
        for _ in range(requests // 10):
            short(service)
        times = [short(service) for _ in range(requests)]
        found |= {"short": median(times), "short99": percentile(times, 0.99)}
        found["kept"] = median(kept(service, requests))
        found["rate"] = rate(service, seconds)
        found["gigabits"] = gigabits(service, 256)
    found["dead"] = 0.0
    if mode != "direct":
        subprocess.run(["conntrack", "-F"], capture_output=True, check=False)
        with beside(serve, [pod_ip(0)]), beside(hold, mode, 2):
            found["dead"] = failures(service, requests // 4)
    return found


def has_ipvs() -> bool:
    try:
        Ipvs().close()
    except IpvsMissing:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        mode, requests, seconds, answer = args.point
        in_own_namespace()
        Path(answer).write_text(json.dumps(measure(mode, int(requests), float(seconds))))
        return
    columns = ["short p50 us", "short p99 us", "kept p50 us", "short/s", "Gbit/s", "failed with a dead endpoint %"]
    table = Table("userspace", "Requests through each mode, one Service", ["mode", *columns, "added to short, us"])
    modes = [mode for mode in args.modes.split(",") if mode != "ipvs" or has_ipvs()]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.runs):
        for mode in modes:
            found.setdefault(mode, []).append(in_process_of_its_own(__file__, mode, args.requests, args.seconds))
    base = median([run["short"] for run in found[modes[0]]])
    for mode in modes:
        middle = {name: median([run[name] for run in found[mode]]) for name in found[mode][0]}
        table.add(mode, *middle.values(), middle["short"] - base)
    table.notes.append(
        f"medians of {args.runs} runs; {CLIENTS} clients at once for short/s; server and client in Python"
    )
    if "ipvs" not in modes:
        table.notes.append(
            "ipvs: this kernel has none; all modes side by side on one that has: "
            "`tools/with-ipvs .venv/bin/python bench/userspace.py --requests 300 --seconds 0.5 --runs 1`"
        )
    table.finish()


if __name__ == "__main__":
    main()
