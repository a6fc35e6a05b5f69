"""kubectl, whichever is installed, against the server in small: what people do all day."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apiserver import Server

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
Kubectl = Callable[..., subprocess.CompletedProcess[str]]
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, labels: {a: b}}
spec:
  type: NodePort
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: metrics, port: 9090}
"""
EDITOR = "sed -i 's/port: 82$/port: 83/'"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def kubectl(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    home = tmp_path_factory.mktemp("home")
    (home / "config").write_text(server.kubeconfig())
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": str(home / "config"), "HOME": str(home), "EDITOR": EDITOR}

    def run(*words: str, given: str | None = None, fails: bool = False) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["kubectl", *words], input=given, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(autouse=True)
def nothing_left(server: Server) -> Iterator[None]:
    yield
    from apiserver.resources import NAMED

    for plural in ("services", "deployments", "pods"):
        for obj in server.store.all(NAMED[plural]):
            server.delete(obj)


def spec(kubectl: Kubectl, name: str = "web") -> dict[str, object]:
    return json.loads(kubectl("get", "svc", name, "-o", "json").stdout)["spec"]


def test_apply_get_change_delete(kubectl: Kubectl) -> None:
    assert "created" in kubectl("apply", "-f", "-", given=SERVICE).stdout
    first = spec(kubectl)
    assert "unchanged" in kubectl("apply", "-f", "-", given=SERVICE).stdout
    assert "configured" in kubectl("apply", "-f", "-", given=SERVICE.replace("9090", "9091")).stdout
    second = spec(kubectl)
    assert second["clusterIP"] == first["clusterIP"]
    ports = {port["name"]: port for port in second["ports"]}  # type: ignore[attr-defined]
    assert ports["http"]["nodePort"] == first["ports"][0]["nodePort"]  # type: ignore[index]
    assert ports["metrics"]["port"] == 9091
    table = kubectl("get", "svc", "-o", "wide").stdout.splitlines()
    assert table[0].split() == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"]
    assert table[1].split()[:2] == ["web", "NodePort"]
    assert "deleted" in kubectl("delete", "svc", "web").stdout
    assert "No resources found" in kubectl("get", "svc").stderr


PATCHES = {
    "strategic": ["-p", '{"spec":{"ports":[{"port":80,"targetPort":81}]}}'],
    "merge": ["--type=merge", "-p", '{"metadata":{"labels":{"a":null,"c":"d"}}}'],
    "json": ["--type=json", "-p", '[{"op":"replace","path":"/spec/ports/0/targetPort","value":81}]'],
}


@pytest.mark.parametrize("kind", PATCHES)
def test_patches(kubectl: Kubectl, kind: str) -> None:
    kubectl("apply", "-f", "-", given=SERVICE)
    kubectl("patch", "svc", "web", *PATCHES[kind])
    found = json.loads(kubectl("get", "svc", "web", "-o", "json").stdout)
    if kind == "merge":
        assert found["metadata"]["labels"] == {"c": "d"}
    else:
        assert [port["targetPort"] for port in found["spec"]["ports"]] == [81, 9090]


def test_a_status_is_changed_apart(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", given=SERVICE.replace("NodePort", "LoadBalancer"))
    status = '{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.7"}]}}}'
    kubectl("patch", "svc", "web", "--subresource=status", "--type=merge", "-p", status)
    assert "198.51.100.7" in kubectl("get", "svc", "web").stdout


def test_type_changes_give_and_take_back(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", given=SERVICE)
    kubectl("patch", "svc", "web", "-p", '{"spec":{"type":"ClusterIP"}}')
    found = spec(kubectl)
    assert not any("nodePort" in port for port in found["ports"])  # type: ignore[attr-defined]
    assert "externalTrafficPolicy" not in found
    kubectl("patch", "svc", "web", "-p", '{"spec":{"type":"LoadBalancer","externalTrafficPolicy":"Local"}}')
    assert spec(kubectl)["healthCheckNodePort"]


def test_server_side_apply_and_dry_run(kubectl: Kubectl) -> None:
    assert "dry run" in kubectl("apply", "--dry-run=server", "-f", "-", given=SERVICE).stdout
    kubectl("get", "svc", "web", fails=True)
    kubectl("apply", "--server-side", "-f", "-", given=SERVICE)
    kubectl("apply", "--server-side", "-f", "-", given=SERVICE.replace("labels: {a: b}", "labels: {c: d}"))
    assert json.loads(kubectl("get", "svc", "web", "-o", "json").stdout)["metadata"]["labels"] == {"c": "d"}
    assert kubectl("diff", "-f", "-", given=SERVICE.replace("8080", "8081"), fails=True).stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("port: 80,", "port: 0,"), "spec.ports[0].port: Invalid value: 0"),
        (("sessionAffinity", "sessionAffinity"), ""),
        (("targetPort: 8080", "targetPrt: 8080"), 'unknown field "spec.ports[0].targetPrt"'),
        (("name: metrics", "name: http"), "Duplicate value"),
        (("NodePort", "Magic"), "Unsupported value"),
        (("name: web", "name: -web"), "metadata.name"),
    ],
)
def test_mistakes_are_named(kubectl: Kubectl, change: tuple[str, str], says: str) -> None:
    if says:
        assert says in kubectl("apply", "-f", "-", given=SERVICE.replace(*change, 1), fails=True).stderr


def test_a_watch_in_a_table(kubectl: Kubectl, server: Server, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(server.kubeconfig())
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": str(tmp_path / "config"), "HOME": str(tmp_path)}
    before = len(server.requests)
    watch = subprocess.Popen(["kubectl", "get", "svc", "-w"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not any(each.verb == "watch" for each in server.requests[before:]) and time.monotonic() < deadline:
            time.sleep(0.02)
        kubectl("apply", "-f", "-", given=SERVICE)
        assert watch.stdout is not None
        assert watch.stdout.readline().split()[0] == "NAME"
        assert watch.stdout.readline().split()[:2] == ["web", "NodePort"]
    finally:
        watch.kill()
        watch.wait()


def test_pods_and_deployments(kubectl: Kubectl) -> None:
    kubectl("run", "one", "--image=x", "--port=80")
    kubectl("expose", "pod", "one", "--port=80")
    assert spec(kubectl, "one")["selector"] == {"run": "one"}
    kubectl("delete", "pod", "one")
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}}}},
    }  # fmt: skip
    kubectl("apply", "-f", "-", given=json.dumps(deployment))
    kubectl("scale", "deploy/web", "--replicas=3")
    assert "0/3" in kubectl("get", "deploy").stdout


def test_what_kubectl_sends_as_protobuf(kubectl: Kubectl) -> None:
    kubectl("create", "namespace", "made")
    kubectl("create", "service", "nodeport", "web", "--tcp=80:http", "--node-port=30123")
    port = spec(kubectl)["ports"][0]  # type: ignore[index]
    assert (port["port"], port["targetPort"], port["nodePort"]) == (80, "http", 30123)
    kubectl("create", "deployment", "web", "--image=x", "--replicas=2", "--port=8080")
    found = json.loads(kubectl("get", "deploy", "web", "-o", "json").stdout)["spec"]
    assert found["replicas"] == 2
    assert found["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] == 8080
    kubectl("create", "configmap", "settings", "--from-literal=a=b")
    assert json.loads(kubectl("get", "cm", "settings", "-o", "json").stdout)["data"] == {"a": "b"}
    kubectl("delete", "ns/made", "cm/settings")


def test_namespaces_hold_and_take_along(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", given='{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop"}}')
    kubectl("apply", "-n", "shop", "-f", "-", given=SERVICE)
    assert "web" in kubectl("get", "svc", "-A").stdout
    kubectl("delete", "ns", "shop")
    assert "No resources found" in kubectl("get", "svc", "-n", "shop").stderr
    kubectl("apply", "-n", "nowhere", "-f", "-", given=SERVICE, fails=True)


def test_describe_labels_and_selectors(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", given=SERVICE)
    kubectl("label", "svc", "web", "x=y")
    kubectl("annotate", "svc", "web", "note=1")
    assert kubectl("get", "svc", "-l", "x in (y,z),a", "-o", "name").stdout.strip() == "service/web"
    assert "No resources found" in kubectl("get", "svc", "-l", "x!=y").stderr
    assert "Internal Traffic Policy:" in kubectl("describe", "svc", "web").stdout


def test_an_apply_that_takes_anothers_field_is_a_conflict(kubectl: Kubectl) -> None:
    kubectl("apply", "--server-side", "-f", "-", given=SERVICE)
    other = SERVICE.replace("targetPort: 8080", "targetPort: 8081")
    words = ("apply", "--server-side", "--field-manager=other", "-f", "-")
    said = kubectl(*words, given=other, fails=True).stderr
    assert (
        'Apply failed with 1 conflict: conflict with "kubectl": .spec.ports[port=80,protocol="TCP"].targetPort' in said
    )
    kubectl(*words, "--force-conflicts", given=other)
    assert "8081" in json.dumps(spec(kubectl)["ports"])
    said = kubectl("apply", "--server-side", "-f", "-", given=SERVICE, fails=True).stderr
    assert 'conflict with "other"' in said
    kubectl("delete", "svc", "web")
    kubectl("apply", "--server-side", "-f", "-", given=SERVICE)  # nobody's any more


def test_explain(kubectl: Kubectl) -> None:
    assert "VIP, or Proxy" in kubectl("explain", "svc.status.loadBalancer.ingress.ipMode").stdout
    assert "hostPort" in kubectl("explain", "deploy.spec.template.spec.containers.ports", "--recursive").stdout
    for kind in ("nodes", "pods", "endpointslices"):
        assert "FIELDS:" in kubectl("explain", kind).stdout


def test_edit_and_an_apply_that_moves_a_port(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", given=SERVICE)
    kubectl("apply", "-f", "-", given=SERVICE.replace("port: 80,", "port: 82,"))
    ports = spec(kubectl)["ports"]
    assert isinstance(ports, list)
    assert {each["port"] for each in ports} == {82, 9090}
    kubectl("edit", "svc", "web")
    assert "83" in json.dumps(spec(kubectl)["ports"])
