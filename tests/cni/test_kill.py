"""Killed at every step of ADD and of DEL: the next DEL, or GC, leaves zero residue, and the next ADD works.

Each call is a process of its own, forked from one that has everything loaded: starting Python anew takes far longer.
"""

from __future__ import annotations

import re
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


def conf(runtime: Runtime) -> dict[str, Any]:
    return runtime.conf(
        isDefaultGateway=True, ipMasq=True, macspoofchk=True, hairpinMode=True,
        ipam={"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/28"}], [{"subnet": "fd00:9::/120"}]]},
        runtimeConfig={
            "portMappings": [{"hostPort": 8080, "containerPort": 80}],
            "bandwidth": {"ingressRate": 8_000_000, "egressRate": 8_000_000},
        },
    )  # fmt: skip


def killed(pod: Pod, verb: str, at: str) -> None:
    with pytest.raises(CniFailure) as died:
        pod.runtime.call(verb, conf(pod.runtime), pod.container, pod.ns.path, env={"PYNET_CNI_KILL_AT": at})
    assert died.value.exit == -9, died.value


def recover(pod: Pod, how: str) -> None:
    if how == "DEL":
        pod.delete(conf(pod.runtime))
    else:
        pod.runtime.call("GC", conf(pod.runtime) | {"cni.dev/valid-attachments": []})


@pytest.mark.parametrize("how", ["DEL", "GC"])
def test_an_add_killed_anywhere(netns: Names, tmp_path: Path, how: str) -> None:
    runtime = Forking(netns("host"), tmp_path / "state")
    names = [name for name in steps("add") if name != "add-vlan"]
    assert len(names) >= 9
    before = residue(runtime.host)
    pod = Pod(runtime, netns("pod"))
    for at in names:
        killed(pod, "ADD", at)
        recover(pod, how)
        left = residue(runtime.host)
        if at == "add-end":  # it was all done: the bridge is a finished ADD's
            left["links"].pop("cni0")
            left["addresses"] = before["addresses"]
            left["qdisc"] = before["qdisc"]
        assert left == before, at
        assert "eth0" not in links(pod.ns), at
        pod.add(conf(runtime))
        pod.check()
        pod.delete()
        runtime.host.run("ip", "link", "del", "cni0")
        assert residue(runtime.host) == before, at


@pytest.mark.parametrize("how", ["DEL", "GC"])
def test_a_delete_killed_anywhere(netns: Names, tmp_path: Path, how: str) -> None:
    runtime = Forking(netns("host"), tmp_path / "state")
    pod = Pod(runtime, netns("pod"))
    pod.add(conf(runtime))
    pod.delete()
    before = residue(runtime.host)
    names = steps("del")
    assert len(names) >= 6
    for at in names:
        pod.add(conf(runtime))
        killed(pod, "DEL", at)
        recover(pod, how)
        assert residue(runtime.host) == before, at
        assert "eth0" not in links(pod.ns), at
    for number in range(13):  # no address was lost: the range has thirteen
        other = Pod(runtime, netns(f"p{number}"))
        other.add(conf(runtime) | {"runtimeConfig": {}})
