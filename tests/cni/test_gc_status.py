"""GC, STATUS, reclaiming what the dead hold, damage, and the agent's socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.cni import CniFailure, Pod, Runtime, links, residue
from support.netns import Names, Namespace

pytestmark = pytest.mark.root

SMALL = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/29"}]]}  # five addresses
AGENT = """
import sys
from cni.serve import Server
seen = []
server = Server(sys.argv[1], lambda verb, code, seconds: seen.append((verb, code)))
server.start(); print("ready", flush=True); sys.stdin.read(); server.close(); print(seen)
"""


def start_agent(host: Namespace, state: Path, **env: str) -> subprocess.Popen[str]:
    child = host.start(
        sys.executable, "-c", AGENT, str(state), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2], env=os.environ | env,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.fixture
def agent(runtime: Runtime) -> Iterator[subprocess.Popen[str]]:
    child = start_agent(runtime.host, runtime.state)
    yield child
    child.communicate()


def test_gc_frees_all_that_is_not_valid(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL)
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(4)]
    for pod in pods:
        pod.add(conf)
    foreign = runtime.conf(
        name="other", isGateway=True, bridge="cni1", ipMasq=True, ipam={"type": "pynet-ipam", "subnet": "10.8.0.0/24"}
    )
    stranger = Pod(runtime, netns("stranger"))
    stranger.add(foreign)
    pods[1].ns.close()
    valid = [{"containerID": pod.container, "ifname": "eth0"} for pod in pods[2:]]
    runtime.call("GC", conf | {"cni.dev/valid-attachments": valid})
    rules = runtime.host.run("nft", "list", "ruleset")
    assert [pod.container in rules for pod in pods] == [False, False, True, True]
    assert "eth0" not in links(pods[0].ns)
    for pod in pods[2:]:
        pod.check()
    stranger.check()
    runtime.call("GC", conf | {"cni.dev/valid-attachments": []})
    runtime.call("GC", foreign | {"cni.dev/valid-attachments": []})
    assert runtime.host.run("nft", "list", "ruleset") == ""


@pytest.mark.parametrize("entry", [{}, {"containerID": "c"}, {"containerID": 5, "ifname": "eth0"}, "c", None])
def test_gc_removes_nobody_when_it_cannot_read_who_is_valid(runtime: Runtime, pod: Pod, entry: Any) -> None:
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL)
    pod.add(conf)
    with pytest.raises(CniFailure, match="valid-attachments") as refused:
        runtime.call("GC", conf | {"cni.dev/valid-attachments": [entry]})
    assert refused.value.code == 7
    pod.check()


def test_gc_without_a_list_frees_only_what_is_gone(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL)
    here, gone = Pod(runtime, netns("here")), Pod(runtime, netns("gone"))
    here.add(conf)
    gone.add(conf)
    gone.vanish()
    runtime.call("GC", conf)
    assert gone.container not in runtime.host.run("nft", "list", "ruleset")
    here.check()


def test_gc_goes_on_past_errors_and_reports_all(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL)
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(2)]
    for pod in pods:
        pod.add(conf)
    runtime.host.run("nft", "flush", "map", "inet", "pynet-cni", "masquerade4")  # then they are looked for with nft
    with pytest.raises(CniFailure) as failed:
        runtime.call("GC", conf | {"cni.dev/valid-attachments": []}, env={"PATH": "/nowhere"})
    for pod in pods:
        assert pod.container in failed.value.message
        assert "eth0" not in links(pod.ns)
    runtime.call("GC", conf | {"cni.dev/valid-attachments": []})
    assert runtime.host.run("nft", "list", "ruleset") == ""


def test_status_counts_addresses(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf(isGateway=True, ipam=SMALL)
    assert runtime.call("STATUS", conf) == {}
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(5)]
    for pod in pods:
        pod.add(conf)
    with pytest.raises(CniFailure) as full:
        runtime.call("STATUS", conf)
    assert full.value.code == 50
    assert "0 of 5 addresses free" in full.value.details
    with pytest.raises(CniFailure) as later:
        Pod(runtime, netns("sixth")).add(conf)
    assert later.value.code == 11
    pods[2].ns.close()
    assert runtime.call("STATUS", conf) == {}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("ip link set cni0 down", "bridge cni0 is down"),
        ("sysctl -qw net.ipv4.ip_forward=0", "does not forward IPv4"),
        ("ip link del cni0", "bridge cni0 is missing"),
    ],
)
def test_status_tells_when_running_pods_suffer(runtime: Runtime, netns: Names, spoil: str, words: str) -> None:
    conf = runtime.conf(isGateway=True, ipam=SMALL)
    pod = Pod(runtime, netns("pod"))
    pod.add(conf)
    assert runtime.call("STATUS", conf) == {}
    runtime.host.run(*spoil.split())
    with pytest.raises(CniFailure) as told:
        runtime.call("STATUS", conf)
    assert told.value.code == 51
    assert words in told.value.message
    assert "10.9.0.1-10.9.0.6: 4 of 5 addresses free" in told.value.details
    pod.ns.close()
    assert runtime.call("STATUS", conf) == {}, "nobody suffers any more, and an ADD sets it right"


@pytest.mark.parametrize("keys", [{"vlan": 5000}, {"ipam": {"type": "nobody"}}, {"ipam": {"type": "pynet-ipam"}}])
def test_status_tells_what_add_would(runtime: Runtime, keys: dict[str, Any]) -> None:
    with pytest.raises(CniFailure) as told:
        runtime.call("STATUS", runtime.conf(**keys))
    assert told.value.code in (7, 50)


def test_addresses_of_dead_pods_are_reclaimed_when_none_is_left(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf(isGateway=True, ipam=SMALL)
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(5)]
    for pod in pods:
        pod.add(conf)
    pods[3].ns.close()
    heir = Pod(runtime, netns("heir"))
    assert heir.add(conf)["ips"][0]["address"] == f"{pods[3].ip}/29"


def test_a_damaged_database_is_rebuilt_from_running_pods(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf(isGateway=True, ipam=SMALL)
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(3)]
    for pod in pods:
        pod.add(conf)
    for name in ("ipam/net.db", "attachments.db"):
        (runtime.state / name).write_bytes(os.urandom(9000))
    more = [Pod(runtime, netns(f"m{number}")) for number in range(2)]
    found = [pod.add(conf)["ips"][0]["address"] for pod in more]
    assert len({*found, *(f"{pod.ip}/29" for pod in pods)}) == 5
    for pod in pods + more:
        pod.check()
        pod.delete()


def test_our_ipam_alone_tells_damage_and_touches_nothing(runtime: Runtime, netns: Names) -> None:
    conf = runtime.conf("1.0.0", ipam=SMALL) | {"type": "macvlan"}
    pod = Pod(runtime, netns("pod"))
    ipam = runtime.program.parent / "pynet-ipam"
    pod.add(conf, program=ipam)
    (runtime.state / "ipam/net.db").write_bytes(os.urandom(9000))
    with pytest.raises(CniFailure) as told:
        Pod(runtime, netns("next")).add(conf, program=ipam)
    assert told.value.code == 5
    assert "net.db" in told.value.message


# --- the agent


def test_the_agent_serves(runtime: Runtime, netns: Names, agent: subprocess.Popen[str]) -> None:
    conf = runtime.conf(isDefaultGateway=True, ipMasq=True, ipam={"type": "pynet-ipam", "subnet": "10.9.0.0/24"})
    before = residue(runtime.host)
    pods = [Pod(runtime, netns(f"p{number}")) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pod: pod.add(conf), pods))
        assert len({pod.ip for pod in pods}) == 8
        list(pool.map(lambda pod: pod.check(), pods))
        list(pool.map(lambda pod: pod.delete(), pods))
    after = residue(runtime.host)
    assert after["nft"] == before["nft"]
    assert set(after["links"]) - set(before["links"]) == {"cni0"}
    with pytest.raises(CniFailure) as refused:
        pods[0].add(conf | {"mtu": "x"})
    assert refused.value.code == 7
    output, _ = agent.communicate()
    assert output.count("'ADD', 0") == output.count("'CHECK', 0") == output.count("'DEL', 0") == 8


def test_the_agent_does_not_serve_another_namespaces_callers(
    runtime: Runtime, netns: Names, agent: subprocess.Popen[str]
) -> None:
    elsewhere = Runtime(netns("else"), runtime.state)
    pod = Pod(elsewhere, netns("pod"))
    pod.add(elsewhere.conf(isGateway=True, ipam=SMALL))
    assert "cni0" in links(elsewhere.host)
    assert "cni0" not in links(runtime.host)
    output, _ = agent.communicate()
    assert output.strip() == "[]"


def test_the_socket_is_roots(runtime: Runtime, agent: subprocess.Popen[str]) -> None:
    socket = runtime.state / "pynetd.sock"
    assert oct(socket.stat().st_mode)[-3:] == "600"
    agent.communicate()
    assert not socket.exists()


@pytest.mark.parametrize("at", ["add-start", "add-journal", "add-veth", "add-pod", "add-rules", "add-end"])
def test_an_agent_that_dies_over_an_add_loses_nothing(runtime: Runtime, netns: Names, at: str) -> None:
    child = start_agent(runtime.host, runtime.state, PYNET_CNI_KILL_AT=at)
    pod = Pod(runtime, netns("pod"))
    pod.add(runtime.conf(isDefaultGateway=True, ipMasq=True, ipam=SMALL))
    assert child.wait(10) != 0
    pod.check()
    rules = json.loads(runtime.host.run("nft", "-j", "list", "map", "inet", "pynet-cni", "masquerade4"))
    assert len(rules["nftables"][1]["map"]["elem"]) == 1
    pod.delete()
    assert runtime.host.run("nft", "list", "ruleset") == ""


@pytest.mark.slow
def test_a_full_bridge_is_named(runtime: Runtime, netns: Names) -> None:
    """1,023 ports are all a Linux bridge has: ADD answers 11, STATUS 50."""
    conf = runtime.conf(isGateway=True, ipam={"type": "pynet-ipam", "subnet": "10.9.0.0/16"})
    pod = Pod(runtime, netns("pod"))
    pod.add(conf)
    pair = "link add a{0} master cni0 type veth peer name b{0}\nlink set b{0} master cni0\n"
    runtime.host.run("ip", "-batch", "-", input="".join(pair.format(number) for number in range(511)))
    last = Pod(runtime, netns("last"))
    with pytest.raises(CniFailure) as refused:
        last.add(conf)
    assert refused.value.code == 11
    assert "1023" in refused.value.message
    assert "eth0" not in links(last.ns)
    with pytest.raises(CniFailure) as told:
        runtime.call("STATUS", conf)
    assert told.value.code == 50
    assert "1023" in told.value.details
    pod.check()
