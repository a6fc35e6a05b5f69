"""pynetd among many nodes: from its start to ready, and from one changed Node to the kernel. Real process, real kernel.

`start`: exec to ready, manifests read, everything made. `restart`: the same where all is there. `reconcile`: the
agent's own first one. `node`: a Node's manifest renamed into place → its route is in the kernel; `gone`: removed → no
route; `mended`: a route deleted by hand → back. `CPU`: processor time of the agent, at its start and for one change.
Goals (1,000 peers): reconcile under 2 s, a node under 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from form import Table, in_own_namespace, median

from pynet.kernel.netevents import Watch, _events
from pynet.kernel.routes import Rtnetlink

PYNETD = Path(sys.executable).parent / "pynetd"
WAYS = {"direct": "172.16", "vxlan": "172.17"}


def node(number: int, subnet: str, dual: bool) -> dict[str, object]:
    high, low = divmod(number, 250)
    cidrs = [f"10.{64 + high}.{low}.0/24"] + ([f"fd00:{high}:{low}::/64"] if dual else [])
    ips = [f"{subnet}.{high}.{low + 1}"] + ([f"fd{subnet[-2:]}::{high}:{low + 1}"] if dual else [])
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": f"node-{number}"},
        "spec": {"podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": ip} for ip in ips]},
    }


class Agent:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"

    def start(self) -> float:
        """Start the agent; return the seconds until it says that it is ready."""
        self._log.write_text("")
        begin = time.perf_counter()
        with self._log.open("w") as log:
            arguments = [
                f"--manifests={self._folder / 'manifests'}",
                "--node-name=node-0",
                "--cluster-cidr=10.64.0.0/10",
            ]
            arguments += [f"--state-dir={self._folder / 'state'}", f"--cni-conf-dir={self._folder / 'conf'}"]
            self._process = subprocess.Popen([PYNETD, *arguments], stderr=log)
        while "msg=ready" not in self._log.read_text():
            if self._process.poll() is not None:
                raise SystemExit(self._log.read_text())
            time.sleep(0.005)
        return time.perf_counter() - begin

    def cpu(self) -> float:
        """Return the seconds of processor time that the agent and what it ran have used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    @staticmethod
    def first_reconcile() -> float:
        with socket.create_connection(("127.0.0.1", 10271), 5) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        return float(values["pynetd_reconcile_seconds_sum"]) / float(values["pynetd_reconcile_seconds_count"])


def wait_for(watch: Watch, dst: str, gone: bool) -> float:
    """Return when the kernel says that a route came or went."""
    while True:
        select.select([watch._socket], [], [], 10)
        for event in _events(watch._socket.recv(1 << 18), -1):
            if (event.what, event.dst, event.gone) == ("route", dst, gone):
                return time.perf_counter()


def changes(folder: Path, peers: int, subnet: str, dual: bool, times: int) -> tuple[float, float, float]:
    """Return medians of: a Node comes, it goes, a route is mended."""
    came, went, mended = [], [], []
    extra = node(peers + 1, subnet, dual)
    dst = extra["spec"]["podCIDRs"][0]  # type: ignore[index]
    other = node(1, subnet, dual)["spec"]["podCIDRs"][0]  # type: ignore[index]
    path, draft = folder / "manifests" / "extra.json", folder / "extra.json"
    watch, kernel = Watch(), Rtnetlink()
    for _ in range(times):
        draft.write_text(json.dumps(extra))
        begin = time.perf_counter()
        draft.rename(path)
        came.append(wait_for(watch, dst, False) - begin)
        time.sleep(0.3)
        begin = time.perf_counter()
        path.unlink()
        went.append(wait_for(watch, dst, True) - begin)
        time.sleep(0.3)
        kernel.links()
        route = next(route for route in kernel.routes(4) if route.dst == other)
        begin = time.perf_counter()
        kernel.delete([route])
        mended.append(wait_for(watch, other, False) - begin)
        time.sleep(0.3)
    watch.close()
    kernel.close()
    return median(came), median(went), median(mended)


def measure(table: Table, peers: int, way: str, dual: bool, times: int) -> None:
    subnet = WAYS[way]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "manifests").mkdir()
        nodes = [node(0, "172.16", dual), *(node(number, subnet, dual) for number in range(1, peers + 1))]
        content = {"apiVersion": "v1", "kind": "NodeList", "items": nodes}
        (folder / "manifests" / "nodes.json").write_text(json.dumps(content))
        agent = Agent(folder)
        try:
            start = agent.start()
            first, start_cpu = agent.first_reconcile(), agent.cpu()
            came, went, mended = changes(folder, peers, subnet, dual, times)
            change_cpu = (agent.cpu() - start_cpu) / (3 * times)
            agent.stop()
            restart = agent.start()
        finally:
            agent.stop()
        subprocess.run([PYNETD, "--cleanup", f"--state-dir={folder / 'state'}"], check=True, stderr=subprocess.DEVNULL)
    figures = [start, start_cpu, first, restart, *(1e3 * seconds for seconds in (change_cpu, came, went, mended))]
    table.add(peers, way + (", dual stack" if dual else ""), *figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default="100,1000,3000", help="numbers of peers, with commas")
    parser.add_argument("--changes", type=int, default=10, help="changes that a median is of")
    parser.add_argument("--quick", action="store_true", help="1,000 peers, three changes")
    args = parser.parse_args()
    in_own_namespace()
    for command in (
        "link add e0 type veth peer name e1",
        "link set e0 up",
        "link set e1 up",
        "address add 172.16.0.1/16 dev e0",
        "address add fd16::1/64 dev e0 nodad",
        "route add default via 172.16.255.254",
        "route add default via fd16::ffff",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    times = ("start s", "start CPU s", "reconcile s", "restart s", "change CPU ms", "node ms", "gone ms", "mended ms")
    columns = ("peers", "way", *times)
    table = Table("routes", "pynetd: routes to many nodes", columns)
    for peers in [1000] if args.quick else [int(part) for part in args.peers.split(",")]:
        for way, dual in (("direct", False), ("vxlan", False), ("vxlan", True)):
            measure(table, peers, way, dual, 3 if args.quick else args.changes)
    table.plot("one Node comes: time to the kernel", x="peers", y="node ms", series=["way"])
    table.notes.append("goals at 1,000 peers: reconcile under 2 s, one node under 50 ms")
    table.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
