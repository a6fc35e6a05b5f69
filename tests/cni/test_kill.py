"""Killed at every step of ADD and of DEL: the next DEL, or GC, leaves zero residue, and the next ADD works.

Each call is a process of its own, forked from one that has everything loaded: starting Python anew takes far longer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.cni import CniFailure, Pod, Runtime, links, residue
from support.netns import Names, Namespace

pytestmark = pytest.mark.root

SOURCES = Path(__file__).resolve().parents[2] / "cni"
FORKING = """
import json, os, sys
from cni import ctl, verbs
from cni.context import Context
for line in sys.stdin:
    environment, stdin = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        ctl._KILL_AT = environment.pop("PYNET_CNI_KILL_AT", "")
        context = Context()
        answer = verbs.serve(environment, stdin.encode(), context)
        context.close()
        os.write(writing, answer.output.encode())
        os._exit(answer.code)
    os.close(writing)
    with open(reading) as pipe:
        output = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, output]), flush=True)
"""


class Forking(Runtime):
    """Calls the plugin in children of one process."""

    def __init__(self, host: Namespace, state: Path) -> None:
        super().__init__(host, state)
        self._parent = host.start(
            sys.executable, "-c", FORKING, cwd=SOURCES.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def call(
        self, command: str, conf: Any, container: str = "", netns: str = "", ifname: str = "eth0",
        env: dict[str, str] | None = None, program: Path | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        environment = self.environment(command, container, netns, ifname, env)
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps([environment, json.dumps(conf)]) + "\n")
        self._parent.stdin.flush()
        status, output = json.loads(self._parent.stdout.readline())
        if status:
            raise CniFailure(status, output, "")
        found: dict[str, Any] = json.loads(output) if output else {}
        return found


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
