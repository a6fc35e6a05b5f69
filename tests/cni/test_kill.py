"""Killed at every step of ADD and of DEL: the next DEL, or GC, leaves zero residue, and the next ADD works.

Each call is a process of its own, forked from one that has everything loaded: starting Python anew takes far longer.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from support.cni import CniFailure, Forking, Pod, Runtime, links, residue
from support.netns import Names

pytestmark = pytest.mark.root

SOURCES = Path(__file__).resolve().parents[2] / "cni"


def steps(verb: str) -> list[str]:
    """Return the names of all steps in the code, so that a new one is tested without being listed here."""
    found = {name for path in SOURCES.rglob("*.py") for name in re.findall(r'\bstep\("([a-z-]+)"\)', path.read_text())}
    return sorted(name for name in found if name.startswith(verb))


RANGES = [[{"subnet": "10.9.0.0/28"}], [{"subnet": "fd00:9::/120"}]]
CAPABILITIES = {
    "portMappings": [
        {"hostPort": 8080, "containerPort": 80}, {"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
    ],
    "bandwidth": {"ingressRate": 8_000_000, "egressRate": 8_000_000},
}  # fmt: skip


def conf(runtime: Runtime, kind: str) -> dict[str, Any]:
    """Return a configuration with everything, by our own IPAM and nftables, or by host-local and iptables."""
    keys = {
        "isDefaultGateway": True, "ipMasq": True, "macspoofchk": True, "hairpinMode": True, "portIsolation": True,
        "runtimeConfig": CAPABILITIES,
    }  # fmt: skip
    if kind == "own":
        return runtime.conf(ipam={"type": "pynet-ipam", "ranges": RANGES}, **keys)
    ipam = {"type": "host-local", "ranges": RANGES, "dataDir": str(runtime.state / "networks")}
    return runtime.conf("1.0.0", ipam=ipam, ipMasqBackend="iptables", **keys)


def left(runtime: Runtime) -> dict[str, Any]:
    """Return all that an attachment could leave: in the kernel, in our databases, in host-local's folder."""
    found = residue(runtime.host)
    found["nft"] = re.sub(
        r"table ip6? nat \{\n(\tchain POSTROUTING \{[^}]*\}\n)?\}\n", "", found["nft"]
    )  # iptables keeps it
    commands = "conntrack -L -p udp 2>/dev/null; echo ----; ip neigh show; echo ----; bridge fdb show"
    flows, neighbours, forwarding = runtime.host.run("sh", "-c", commands).split("----\n")
    found["flows"] = flows.splitlines()
    found["neighbours"] = [line for line in neighbours.splitlines() if not line.startswith("fe80")]  # not IPAM's
    found["forwarding"] = re.findall(r"02:00:00:00:00:77", forwarding)
    for name, query in (("attachments", "attachments"), ("attachments", "ports"), ("ipam/net", "reservations")):
        path = runtime.state / f"{name}.db"
        if path.exists():
            with closing(sqlite3.connect(path)) as db:
                found[query] = db.execute(f"SELECT * FROM {query}").fetchall()
        found.setdefault(query, [])
    files = (runtime.state / "networks").glob("net/*")
    found["host-local"] = [path.name for path in files if not re.match("lock|last_reserved_ip", path.name)]
    return found


def use(pod: Pod) -> None:
    """Leave what traffic of a pod leaves: a flow of its own, one to its host port, neighbours, a forwarding entry."""
    runtime = pod.runtime
    flow = f"-I -p udp --timeout 90 --sport 9 --src {pod.ip} --dst 192.0.2.9 --dport 53"
    to_port = f"-I -p udp --timeout 90 --sport 9 --src 192.0.2.9 --dst 192.0.2.1 --dport 5353 --dst-nat {pod.ip}:53"
    for line in (flow, to_port):
        runtime.host.run("conntrack", *line.split())
    port = next(name for name, link in links(runtime.host).items() if name.startswith("veth"))
    addresses = [each["address"].partition("/")[0] for each in pod.result["ips"]]
    runtime.host.batch(*(f"neigh replace {one} lladdr 02:00:00:00:00:77 dev cni0 nud stale" for one in addresses))
    runtime.host.run("bridge", "fdb", "replace", "02:00:00:00:00:77", "dev", port, "master")


def killed(pod: Pod, verb: str, at: str, kind: str) -> None:
    with pytest.raises(CniFailure) as died:
        pod.runtime.call(verb, conf(pod.runtime, kind), pod.container, pod.ns.path, env={"PYNET_CNI_KILL_AT": at})
    assert died.value.exit == -9, died.value


def recover(pod: Pod, how: str, kind: str) -> None:
    if how == "DEL":
        pod.delete(conf(pod.runtime, kind))
    else:
        pod.runtime.call("GC", conf(pod.runtime, kind) | {"cni.dev/valid-attachments": []})


WAYS = [("DEL", "own"), ("GC", "own"), ("DEL", "delegated")]


@pytest.mark.parametrize(("how", "kind"), WAYS)
def test_an_add_killed_anywhere(netns: Names, tmp_path: Path, how: str, kind: str) -> None:
    runtime = Forking(netns("host"), tmp_path / "state")
    names = [name for name in steps("add") if name != "add-vlan"]
    assert len(names) >= 9
    pod = Pod(runtime, netns("pod"))
    pod.add(conf(runtime, kind))
    pod.delete()
    runtime.host.run("ip", "link", "del", "cni0")
    before = left(runtime)
    for at in names:
        killed(pod, "ADD", at, kind)
        recover(pod, how, kind)
        after = left(runtime)
        if at == "add-end":  # it was all done: the bridge is a finished ADD's
            after["links"].pop("cni0")
            after["addresses"] = before["addresses"]
            after["qdisc"] = before["qdisc"]
        assert after == before, at
        assert "eth0" not in links(pod.ns), at
        pod.add(conf(runtime, kind))
        pod.check()
        pod.delete()
        runtime.host.run("ip", "link", "del", "cni0")
        assert left(runtime) == before, at


@pytest.mark.parametrize(("how", "kind"), WAYS)
def test_a_delete_killed_anywhere(netns: Names, tmp_path: Path, how: str, kind: str) -> None:
    runtime = Forking(netns("host"), tmp_path / "state")
    pod = Pod(runtime, netns("pod"))
    pod.add(conf(runtime, kind))
    pod.delete()
    before = left(runtime)
    names = steps("del")
    assert len(names) >= 6
    for at in names:
        pod.add(conf(runtime, kind))
        use(pod)
        assert len(left(runtime)["flows"]) == 2
        killed(pod, "DEL", at, kind)
        recover(pod, how, kind)
        assert left(runtime) == before, at
        assert "eth0" not in links(pod.ns), at
    for number in range(13):  # no address was lost: the range has thirteen
        other = Pod(runtime, netns(f"p{number}"))
        other.add(conf(runtime, kind) | {"runtimeConfig": {}})
