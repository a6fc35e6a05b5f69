"""The command `lab` as a user types it: one small lab, driven through the executable only."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netnslab.main import main
from support import sandbox

pytestmark = [pytest.mark.root, pytest.mark.lab]

LAB = sandbox.TESTS.parent / "netns-lab" / "lab"

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop}
spec:
  replicas: 2
  template:
    metadata: {labels: {app: shop}}
    spec: {containers: [{name: shop, ports: [{name: http, containerPort: 8080}]}]}
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {type: NodePort, selector: {app: shop}, ports: [{name: http, port: 80, targetPort: http, nodePort: 30888}]}
"""


class Shell:
    """A user's shell: `lab` of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *words: str, code: int = 0, **options: object) -> str:
        done = subprocess.run(
            [str(LAB), *words],
            text=True, capture_output=True, check=False, timeout=120, cwd="/",
            **{"env": {**os.environ, "LAB_NAME": self.name}, **options},
        )  # type: ignore[call-overload]  # fmt: skip
        assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def status(self) -> dict:
        return json.loads(self("status", "--json"))

    def fetch(self, where: str, url: str) -> dict:
        """Return what a pod's server says to curl, once the Service is there."""
        deadline = time.monotonic() + 10
        while True:
            done = subprocess.run(
                [str(LAB), "exec", "--name", self.name, where, "--", "curl", "-sS", "-m", "2", url],
                text=True, capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return json.loads(done.stdout)
            assert time.monotonic() < deadline, done.stderr


@pytest.fixture(scope="module")
def lab() -> Iterator[Shell]:
    shell = Shell(f"c{os.getpid()}")
    try:
        shell("up", "--empty")
        yield shell
    finally:
        shell("down")


def test_pods_are_added_served_and_removed(lab):
    said = lab("pod", "add", "db", "--node", "node2", "--labels", "app=db,tier=back", "--serve", "tcp:5432,udp:53")
    assert said.startswith("pod db on node2: 10.244.2.")
    (pod,) = [each for each in lab.status()["pods"] if each["name"] == "db"]
    assert pod["labels"] == {"app": "db", "tier": "back"}
    assert pod["serves"] == ["tcp:5432", "udp:53"]
    assert lab.fetch("node1", f"http://{pod['addresses'][0]}:5432/")["pod"] == "db"
    lab("pod", "check", "db")
    assert "already there" in lab("pod", "add", "db", "--node", "1", code=1)
    lab("pod", "rm", "db")
    assert "db" not in [each["name"] for each in lab.status()["pods"]]
    assert not Path(f"/run/netns/lab-{lab.name}-db").exists()


def test_a_deployment_and_its_service_are_applied_scaled_and_deleted(lab, tmp_path):
    (tmp_path / "shop.yaml").write_text(DEPLOYMENT)
    (tmp_path / "service.yaml").write_text(SERVICE)
    lab("apply", str(tmp_path / "shop.yaml"), str(tmp_path / "service.yaml"))
    (service,) = [each for each in lab.status()["services"] if each["name"] == "shop"]
    assert {each["pod"] for each in service["endpoints"]} == {"shop-1", "shop-2"}
    assert {each["node"] for each in service["endpoints"]} == {"node1", "node2"}
    assert lab.fetch("client", "http://172.31.0.12:30888/")["pod"] in ("shop-1", "shop-2")
    lab("scale", "shop", "4")
    lab("pod", "unready", "shop-3")
    (service,) = [each for each in lab.status()["services"] if each["name"] == "shop"]
    assert {each["pod"]: each["ready"] for each in service["endpoints"]} == {
        "shop-1": True, "shop-2": True, "shop-3": False, "shop-4": True,
    }  # fmt: skip
    assert "shop-4" in lab("status")
    lab("scale", "shop", "1")
    assert [each["name"] for each in lab.status()["pods"]] == ["shop-1"]
    lab("apply", "-", input=SERVICE.replace("port: 80,", "port: 81,"))
    (again,) = [each for each in lab.status()["services"] if each["name"] == "shop"]
    assert again["clusterIPs"] == service["clusterIPs"]
    lab("delete", str(tmp_path / "shop.yaml"), str(tmp_path / "service.yaml"))
    assert lab.status()["services"] == []
    assert lab.status()["pods"] == []


def test_exec_gives_back_what_the_command_gives(lab):
    assert lab("exec", "client", "--", "sh", "-c", "echo said; exit 7", code=7) == "said\n"
    assert "172.31.0.11" in lab("exec", "node1", "ip", "address")


def test_logs_say_what_the_daemons_wrote(lab):
    assert "program=pyproxy" in lab("logs", "node1", "--program", "pyproxy")
    assert "program=pynetd" in lab("logs")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pod", "add", "x", "--node", "9"], "no node '9'; there are: node1, node2"),
        (["pod", "add", "x", "--node", "1", "--serve", "http"], "expected [NAME=]PROTO:PORT"),
        (["pod", "add", "x", "--node", "1", "--labels", "app"], "expected KEY=VALUE"),
        (["pod", "add", "Über", "--node", "1"], "expected up to 40 characters"),
        (["pod", "add", "client", "--node", "1"], "that name is taken"),
        (["pod", "rm", "nobody"], "no pod 'nobody'"),
        (["scale", "nobody", "3"], "no Deployment 'nobody'"),
        (["exec", "nobody", "--", "true"], "nothing called 'nobody'"),
        (["exec", "client"], "no command given"),
        (["apply", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["check", "nonsense"], "no scenario 'nonsense'; there are:"),
        (["check", "partition"], "it needs at least 3 nodes"),
        (["node", "rm", "nobody"], "no node 'nobody'"),
    ],
)
def test_a_mistake_is_answered_with_what_was_expected(lab, words, says, monkeypatch, capsys):
    monkeypatch.setenv("LAB_NAME", lab.name)
    assert main(words) == 1
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: ConfigMap\nmetadata: {name: x}", "ConfigMap: the lab knows Service"),
        ("kind: Service\nmetadata: {}", "metadata.name: missing"),
        (
            "kind: Service\nmetadata: {name: x}\nspec: {type: Odd}",
            'Service "x" is invalid: spec.type: Unsupported value: "Odd"',
        ),
        ("- 1", "expected objects with apiVersion and kind"),
        ("a: [", "line 2, column 1"),
    ],
)
def test_a_bad_manifest_is_refused_by_field(lab, text, says, monkeypatch, capsys):
    monkeypatch.setenv("LAB_NAME", lab.name)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["apply", "-"]) == 1
    assert says in capsys.readouterr().err


def test_up_repairs_what_has_ended(lab):
    lab("pod", "add", "kept", "--node", "1", "--serve", "tcp:80")
    address = lab.status()["pods"][0]["addresses"][0]
    for netns in (f"lab-{lab.name}-node1", f"lab-{lab.name}-kept"):
        pids = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True, check=True).stdout.split()
        assert pids
        for pid in pids:
            os.kill(int(pid), 9)
    assert {each["pynetd"] for each in lab.status()["nodes"]} == {"ended", "ready"}
    assert "starting pynetd of node1 again" in lab("up", "--empty")
    found = lab.status()
    assert {each["pyproxy"] for each in found["nodes"]} == {"ready"}
    assert found["pods"][0]["addresses"] == [address]
    assert lab.fetch("node2", f"http://{address}/")["pod"] == "kept"
    lab("pod", "rm", "kept")


def test_a_lab_that_is_not_there_is_said_so():
    assert "no lab 'nolab' is up" in Shell("nolab")("status", code=1)
    assert "expected 1 to 20 characters" in Shell("No-Lab")("status", code=1)


def test_without_root_one_line_says_why_and_77():
    def leave_root() -> None:
        os.setgid(65534)
        os.setuid(65534)

    said = Shell("x")("up", code=77, preexec_fn=leave_root)
    assert said.count("\n") == 1
    assert "needs root: it makes network namespaces" in said


def test_help_explains_every_command():
    said = Shell("x")("--help")
    for command in ("up", "down", "pod", "node", "apply", "delete", "scale", "exec", "status", "check", "logs"):
        assert f"\n    {command} " in said
