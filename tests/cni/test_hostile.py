"""Stores that are damaged, full or not writable, agents that hang or lie, calls that cross each other, odd names."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cni import client
from support.cni import CniFailure, Pod, Runtime, links, residue
from support.netns import Names

pytestmark = pytest.mark.root

SMALL = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/28"}]]}


# --- the store


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "missing", "another program's"])
def test_no_address_is_given_twice(runtime: Runtime, netns: Names, damage: str) -> None:
    conf = runtime.conf(isGateway=True, ipam=SMALL)
    first, second = Pod(runtime, netns("first")), Pod(runtime, netns("second"))
    first.add(conf)
    second.add(conf)
    first.delete()
    store = runtime.state / "ipam" / "net.db"
    whole = store.read_bytes()
    store.unlink()
    if damage != "missing":
        foreign = b"SQLite format 3\0" + bytes(84)
        contents = {"garbage": os.urandom(9000), "truncated": whole[:5000], "empty": b"", "another program's": foreign}
        store.write_bytes(contents[damage])
    assert runtime.call("STATUS", conf) == {}
    first.add(conf)
    assert first.ip != second.ip
    for one in (first, second):
        one.check()
        one.delete()


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_state_folder_that_takes_nothing(runtime: Runtime, netns: Names, kind: str) -> None:
    """ADD fails with code 5 and leaves nothing, STATUS says 50, DEL removes links and rules all the same."""
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL)
    old, new = Pod(runtime, netns("old")), Pod(runtime, netns("new"))
    old.add(conf)
    with Mounted(runtime.state, kind) as call:
        before = residue(runtime.host)
        code, answer = call("ADD", conf, new)
        assert (code, answer["code"]) == (1, 5), answer
        assert residue(runtime.host) == before
        code, answer = call("STATUS", conf, new)
        assert (code, answer["code"]) == (1, 50), answer
        code, answer = call("DEL", conf, old)
        assert "eth0" not in links(old.ns)
        assert old.container not in runtime.host.run("nft", "list", "ruleset")
    old.delete()
    new.add(conf)
    new.check()


class Mounted:
    """A private mount namespace in which the state folder is on a file system that takes nothing; calls go into it."""

    def __init__(self, folder: Path, kind: str) -> None:
        here = f"'{folder}'"
        work = f"mount --bind {here} {here} && mount -o remount,bind,ro {here}"
        if kind == "full":
            work = (
                f"mkdir {here}.old && mount --bind {here} {here}.old && mount -t tmpfs -o size=256k none {here}"
                f" && cp -a {here}.old/. {here} && (cat /dev/zero > {here}/rest 2>/dev/null || :)"
            )
        self._sleeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{work} && echo ready && exec sleep 100"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Callable[[str, dict[str, Any], Pod], tuple[int, dict[str, Any]]]:
        assert self._sleeper.stdout is not None
        assert self._sleeper.stdout.readline() == "ready\n"
        return self._call

    def __exit__(self, *_: object) -> None:
        self._sleeper.kill()
        self._sleeper.communicate()

    def _call(self, verb: str, conf: dict[str, Any], pod: Pod) -> tuple[int, dict[str, Any]]:
        environment = {
            "PATH": os.environ["PATH"], "CNI_COMMAND": verb, "CNI_CONTAINERID": pod.container, "CNI_IFNAME": "eth0",
            "CNI_NETNS": pod.ns.path, "CNI_PATH": "/nowhere",
        }  # fmt: skip
        done = subprocess.run(
            ["nsenter", f"--mount=/proc/{self._sleeper.pid}/ns/mnt", f"--net={pod.runtime.host.path}",
             str(pod.runtime.program)],
            input=json.dumps(conf), text=True, capture_output=True, env=environment, timeout=60, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else {}


# --- the agent


@pytest.fixture
def false_agent(runtime: Runtime) -> Iterator[socket.socket]:
    """A socket where the agent's is to be; what listens there is for the test to say."""
    runtime.state.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime.state / "pynetd.sock"))
        yield listener


def answering(listener: socket.socket, answer: bytes) -> threading.Thread:
    def serve() -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                while connection.recv(1 << 16):
                    pass
                connection.sendall(answer)

    listener.listen()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["nobody listens", "hangs up at once", "leaves it to us", "dies over the call"])
def test_an_agent_that_does_not_answer_is_done_without(
    runtime: Runtime, pod: Pod, false_agent: socket.socket, kind: str
) -> None:
    answers = {"hangs up at once": b"", "leaves it to us": client.NOT_MINE, "dies over the call": client.TAKEN}
    if kind in answers:
        answering(false_agent, answers[kind])
    pod.add(runtime.conf(isGateway=True, ipam=SMALL))
    false_agent.close()
    pod.check()


def test_an_agent_that_hangs_is_not_waited_for(runtime: Runtime, pod: Pod, false_agent: socket.socket) -> None:
    """It takes no call: the caller serves itself, and the agent, once it goes on, does not do the same again."""
    false_agent.listen()
    program = client_with(runtime, TAKING_SECONDS=1)
    pod.add(runtime.conf(isGateway=True, ipam=SMALL), program=program)
    connection, _ = false_agent.accept()
    with connection:
        assert b"CNI_COMMAND=ADD" in connection.recv(1 << 16)
        with pytest.raises(OSError, match="Broken pipe"):
            connection.sendall(client.TAKEN)
    false_agent.close()
    pod.check()


def test_an_agent_that_never_ends_a_call_is_told(runtime: Runtime, pod: Pod, false_agent: socket.socket) -> None:
    false_agent.listen()
    program = client_with(runtime, ANSWER_SECONDS=1)
    begun = threading.Event()
    held: list[socket.socket] = []

    def take() -> None:
        connection, _ = false_agent.accept()
        held.append(connection)
        connection.sendall(client.TAKEN)
        begun.set()

    threading.Thread(target=take, daemon=True).start()
    with pytest.raises(CniFailure, match="has taken the call and not answered") as told:
        pod.add(runtime.conf(ipam=SMALL), program=program)
    assert told.value.code == 11
    assert begun.is_set()
    held[0].close()


def client_with(runtime: Runtime, **constants: int) -> Path:
    """Return an executable that waits for other times."""
    root = Path(client.__file__).resolve().parents[1]
    lines = [f"#!{sys.executable} -IS", "import sys", f"sys.path.insert(0, {str(root)!r})", "from cni import client"]
    lines += [f"client.{name} = {value}" for name, value in constants.items()]
    program = runtime.state.parent / "impatient"
    program.write_text("\n".join([*lines, "sys.exit(client.main())", ""]))
    program.chmod(0o755)
    return program


# --- calls that cross


def test_calls_for_one_attachment_wait_for_each_other(runtime: Runtime, pod: Pod) -> None:
    """ADD and DEL of the same container at once, in any order: in the end all of it is there, or nothing."""
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL)

    def call(verb: str) -> str:
        try:
            runtime.call(verb, conf, pod.container, pod.ns.path)
        except CniFailure as failed:
            return failed.message
        return "done"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(call, ["ADD", "DEL"] * 4))
    assert said[1::2] == ["done"] * 4
    assert set(said) <= {"done", "interface eth0 already exists in the pod"}
    pod.delete(conf)
    pod.add(conf)
    pod.check()
    pod.delete()
    assert runtime.host.run("nft", "list", "ruleset") == ""


def test_two_adds_at_once_make_one_attachment(runtime: Runtime, pod: Pod) -> None:
    """Without IPAM nothing but the lock keeps the loser's undoing from the winner's link."""
    conf = runtime.conf()

    def add(_: int) -> dict[str, Any]:
        try:
            return runtime.call("ADD", conf, pod.container, pod.ns.path)
        except CniFailure as failed:
            assert "eth0 already exists" in failed.message  # noqa: PT017
            return {}

    with ThreadPoolExecutor(4) as pool:
        (pod.result,) = [found for found in pool.map(add, range(4)) if found]
    pod.check(conf)


@pytest.mark.parametrize("records", ["kept", "lost"])
def test_a_network_does_not_touch_anothers_attachment_of_the_same_names(
    runtime: Runtime, netns: Names, records: str
) -> None:
    """An ADD that is refused because the interface is there is followed by DEL: the interface stays, it is not its."""
    pod, elsewhere = Pod(runtime, netns("pod")), netns("elsewhere")
    pod.add(runtime.conf(isGateway=True, ipMasq=True, ipam=SMALL, egressRate=8_000_000))
    other = runtime.conf(name="other", bridge="cni1", ipMasq=True, ipam={"type": "pynet-ipam", "subnet": "10.8.0.0/30"})
    if records == "lost":
        for path in runtime.state.glob("attachments.db*"):
            path.unlink()
    refusals = {pod.ns.path: "eth0 already exists", elsewhere.path: "is attached to network net"}
    for path, words in list(refusals.items())[: 2 if records == "kept" else 1]:
        with pytest.raises(CniFailure, match=words):
            runtime.call("ADD", other, pod.container, path)
        runtime.call("DEL", other, pod.container, path)
        runtime.call("GC", other | {"cni.dev/valid-attachments": []})
        pod.check()
        assert "eth0" not in links(elsewhere)
    runtime.call("ADD", other, pod.container, pod.ns.path, ifname="eth1")
    pod.delete()
    assert "eth1" in links(pod.ns)
    runtime.call("DEL", other, pod.container, pod.ns.path, ifname="eth1")
    assert runtime.host.run("nft", "list", "ruleset") == ""


def test_del_with_a_path_that_is_anothers_by_now(runtime: Runtime, netns: Names) -> None:
    """A process id in the path is used again (cri-o#2849); the second DEL has no record any more."""
    conf = runtime.conf(isGateway=True, ipam=SMALL)
    old, new = Pod(runtime, netns("old")), Pod(runtime, netns("new"))
    old.add(conf)
    new.add(conf)
    old.ns.run("ip", "link", "del", "eth0")
    for _ in range(2):
        old.delete(netns=new.ns.path)
        new.check()


# --- odd names and texts


ODD = [
    ({"CNI_IFNAME": "\udcff"}, "{}", 4, "no UTF-8"),
    ({"CNI_IFNAME": "eth%d"}, "{}", 4, "%"),
    ({"CNI_IFNAME": "é" * 8}, "{}", 4, "too long"),
    ({"CNI_NETNS": "/run/\udcff"}, "{}", 4, "no UTF-8"),
    ({"CNI_NETNS": "PIPE"}, "{}", 8, "not a network namespace"),
    ({"CNI_ARGS": "IgnoreUnknown=maybe"}, "{}", 4, "IgnoreUnknown"),
    ({}, '{"mtu": NaN}', 6, "NaN"),
    ({}, '{"x": -Infinity}', 6, "Infinity"),
    ({}, '{"mtu": 1e999}', 7, "mtu"),
    ({}, '{"ipam": {"type": "pynet-ipam", "subnet": "10.9.0.0/24", "resolvConf": "PIPE"}}', 5, "is not a file"),
    ({}, '{"ipam": {"type": "pynet-ipam", "subnet": "10.9.0.0/24", "resolvConf": "/dev/zero"}}', 5, "is not a file"),
]


@pytest.mark.parametrize(("env", "keys", "code", "words"), ODD, ids=[f"{row[0]}{row[1][:60]}" for row in ODD])
def test_what_is_odd_is_refused_and_never_waited_for(
    runtime: Runtime, pod: Pod, tmp_path: Path, env: dict[str, str], keys: str, code: int, words: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = residue(runtime.host)
    base = json.dumps(runtime.conf())[:-1]
    stdin = base + ("," if keys != "{}" else "") + keys.replace("PIPE", str(pipe))[1:]
    with pytest.raises(CniFailure) as refused:
        runtime.call(
            "ADD", stdin, pod.container, pod.ns.path,
            env={key: value.replace("PIPE", str(pipe)) for key, value in env.items()},
        )  # fmt: skip
    assert refused.value.code == code, refused.value
    assert words in refused.value.message + refused.value.details
    assert "Traceback" not in str(refused.value)
    assert residue(runtime.host) == before


def test_long_and_foreign_names_live_and_die(runtime: Runtime, netns: Names) -> None:
    names = {"ifname": "é☃-interface"}
    container = "c" + "0123456789" * 90
    pod = Pod(runtime, netns("pod"), container)
    conf = runtime.conf(name="n" * 200, isGateway=True, ipMasq=True, macspoofchk=True, ipam=SMALL)
    result = pod.add(conf, **names)
    assert result["interfaces"][2]["name"] == "é☃-interface"
    again = conf | {"prevResult": result}
    runtime.call("CHECK", again, container, pod.ns.path, **names)
    pod.delete(**names)
    assert runtime.host.run("nft", "list", "ruleset") == ""
    huge = conf | {"unknown": ["x" * 1000] * 5000, "args": {"cni": {str(n): n for n in range(9999)}}}
    pod.add(huge, **names)
    pod.delete(huge, **names)


def test_the_last_of_two_equal_keys_counts(runtime: Runtime, pod: Pod) -> None:
    """As Go's decoder has it."""
    text = json.dumps(runtime.conf(isGateway=True, ipam=SMALL))[:-1] + ', "mtu": 1300, "mtu": 1400}'
    result = runtime.call("ADD", text, pod.container, pod.ns.path)
    assert result["interfaces"][2]["mtu"] == 1400


def test_a_result_that_the_version_cannot_hold_is_undone(runtime: Runtime, pod: Pod) -> None:
    before = residue(runtime.host)
    with pytest.raises(CniFailure, match="needs at least one IP address"):
        pod.add(runtime.conf("0.2.0"))
    assert "eth0" not in links(pod.ns)
    assert residue(runtime.host) == before


def test_check_needs_the_result_of_add(runtime: Runtime, pod: Pod) -> None:
    pod.add(runtime.conf(isGateway=True, ipam=SMALL))
    with pytest.raises(CniFailure, match="prevResult is missing") as refused:
        runtime.call("CHECK", pod.conf, pod.container, pod.ns.path)
    assert refused.value.code == 7


def test_a_call_that_is_ended_is_removed_by_the_next(runtime: Runtime, pod: Pod) -> None:
    """A runtime that loses patience sends SIGTERM, and DEL."""
    conf = runtime.conf(isGateway=True, ipMasq=True, ipam={"type": "slow"})
    folder = runtime.state.parent / "plugins"
    folder.mkdir()
    begun = folder / "begun"
    (folder / "slow").write_text(f"#!/bin/sh\n[ $CNI_COMMAND = DEL ] || {{ : > '{begun}'; exec sleep 60; }}\n")
    (folder / "slow").chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"], "CNI_COMMAND": "ADD", "CNI_CONTAINERID": pod.container, "CNI_IFNAME": "eth0",
        "CNI_NETNS": pod.ns.path, "CNI_PATH": str(folder),
    }  # fmt: skip
    with subprocess.Popen(
        ["nsenter", f"--net={runtime.host.path}", str(runtime.program)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        child.stdin.write(json.dumps(conf))
        child.stdin.close()
        while not begun.exists() and child.poll() is None:
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(10)
    pod.delete(conf, env={"CNI_PATH": str(folder)})
    assert "eth0" not in links(pod.ns)
    assert runtime.host.run("nft", "list", "ruleset") == ""
