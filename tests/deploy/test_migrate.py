"""docs/migrate.md: its commands are ones that the programs take, and those for a cluster do there what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver import Server
from cni.node import main as pynetd
from proxy import flags

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs/migrate.md").read_text()
SERVICES = TEXT[TEXT.index("## Services") : TEXT.index("## Pods")]
KUBECTL = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
OLD = {
    "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
    "spec": {
        "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
        "template": {
            "metadata": {"labels": {"k8s-app": "kube-proxy"}},
            "spec": {"containers": [{"name": "kube-proxy", "image": "registry.example/kube-proxy:v1.36.2"}]},
        },
    },
}  # fmt: skip
Kubectl = Callable[[str], str]


def blocks(language: str, text: str) -> list[str]:
    """Return the blocks of code in a language, without what indents them."""
    found = re.findall(rf"(?ms)^( *)```{language}\n(.*?)^ *```", text)
    return [re.sub(rf"(?m)^{indent}", "", code) for indent, code in found]


@pytest.fixture
def kubectl(tmp_path: Path) -> Iterator[Kubectl]:
    with Server() as server:
        server.put(OLD, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}})
        (tmp_path / "kubeconfig").write_text(server.kubeconfig())
        environment = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}

        def run(command: str) -> str:
            done = subprocess.run(
                command.replace("NODE", "node-1"),
                shell=True,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            return done.stdout

        yield run


def read(kubectl: Kubectl, what: str) -> Any:
    return json.loads(kubectl(f"kubectl -n kube-system get {what} -o json"))


@KUBECTL
def test_kube_proxy_keeps_off_the_labelled_nodes(kubectl: Kubectl) -> None:
    patch, cleanup, *_ = blocks("sh", SERVICES)
    kubectl(patch)
    spec = read(kubectl, "ds kube-proxy")["spec"]["template"]["spec"]
    (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "pynet/services", "operator": "DoesNotExist"}]
    image = next(line for line in cleanup.splitlines() if line.startswith("kubectl"))
    assert kubectl(image) == "registry.example/kube-proxy:v1.36.2"
    for word, labels in (("=on", {"pynet/services": "on"}), ("-", {})):
        command = f"kubectl label node NODE pynet/services{word}"
        assert f"`{command}`" in SERVICES
        kubectl(command)
        assert read(kubectl, "node NODE")["metadata"].get("labels", {}) == labels


@KUBECTL
def test_pyproxy_keeps_to_the_labelled_nodes(kubectl: Kubectl, tmp_path: Path) -> None:
    (patches,) = blocks("yaml", SERVICES)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    with (tmp_path / "deploy/kustomization.yaml").open("a") as file:
        file.write(patches)
    kubectl(f"kubectl apply -k {tmp_path}/deploy")
    selectors = {
        name: read(kubectl, f"ds {name}")["spec"]["template"]["spec"]["nodeSelector"] for name in ("pyproxy", "pynetd")
    }
    assert selectors["pyproxy"] == {"kubernetes.io/os": "linux", "pynet/services": "on"}
    assert selectors["pynetd"] == {"kubernetes.io/os": "linux"}


def test_every_flag_is_one_of_its_program() -> None:
    known = {"pyproxy": flags.parser().format_help(), "pynetd": pynetd._parser().format_help()}
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", TEXT)
    spans = [*re.findall(r"`([^`]+)`", prose), *(line for code in blocks("sh", TEXT) for line in code.splitlines())]
    seen: set[str] = set()
    for span in spans:
        program = span.split()[0] if span.split() else ""
        helps = "".join(known.values()) if program.startswith("--") else known.get(program)
        if helps is None or program == "--cluster-cidr":  # the controller manager's
            continue
        for flag in re.findall(r"--[a-z][a-z0-9-]*", span):
            assert flag in helps, span
            seen.add(flag)
    assert {"--cleanup", "--backend", "--ipvs-fallback", "--cni-conf-dir"} <= seen
