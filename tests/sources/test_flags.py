"""The flags that choose a source: which one they mean, and what is wrong with those that mean none."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apiserver import Server
from pynet.sources import Batch
from pynet.sources.apievents import ApiEvents
from pynet.sources.apiserver import ApiServer
from pynet.sources.events import NoEvents
from pynet.sources.flags import NoSource, add_source_flags, events_from, source_from
from pynet.sources.manifests import Manifests


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_source_flags(parser)
    return parser.parse_args(list(words))


@pytest.fixture
def kubeconfig(tmp_path: Path) -> str:
    path = tmp_path / "kubeconfig"
    context = "{name: x, context: {cluster: x}}"
    path.write_text(
        f"{{current-context: x, contexts: [{context}], clusters: [{{name: x, cluster: {{server: a.example}}}}]}}"
    )
    return str(path)


def test_manifests(tmp_path: Path) -> None:
    args = parsed("--manifests", str(tmp_path))
    assert isinstance(source_from(args, {"Node"}), Manifests)
    assert isinstance(events_from(args, "pyproxy", "n"), NoEvents)


@pytest.mark.parametrize(
    "words", [["--master", "http://127.0.0.1:1"], ["--kube-api-qps", "50", "--kube-api-burst", "100"]]
)
def test_an_api_server(kubeconfig: str, words: list[str]) -> None:
    args = parsed("--kubeconfig", kubeconfig, *words, "--kube-api-content-type", "application/vnd.kubernetes.protobuf")
    assert isinstance(source_from(args, {"Node"}), ApiServer)
    assert isinstance(events_from(args, "pyproxy", "n"), ApiEvents)


def test_in_a_pod_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert isinstance(source_from(parsed(), {"Node"}), ApiServer)


WRONG = [
    ([], "no source"),
    (["--manifests", "x", "--master", "y"], "exclude each other"),
    (["--kubeconfig", "/nonexistent/config"], "no such file"),
]


@pytest.mark.parametrize(("words", "says"), WRONG)
def test_no_source_is_named(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NoSource, match=says):
        source_from(parsed(*words), {"Node"})


def test_only_the_own_node_is_asked_for(tmp_path: Path) -> None:
    with Server() as server:
        stop = threading.Event()

        def deliver(batch: Batch) -> None:
            if "Node" in batch.replaced:
                stop.set()

        source_from(parsed("--master", server.url), {"Node"}, node="n1").run(deliver, stop)
        assert [request.query["fieldSelector"] for request in server.requests][:1] == ["metadata.name=n1"]


def test_without_a_cluster_its_client_is_not_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, argparse; from pathlib import Path; from pynet.sources.flags import *\n"
        "p = argparse.ArgumentParser(); add_source_flags(p)\n"
        f"source_from(p.parse_args(['--manifests', {str(tmp_path)!r}]), {{'Node'}})\n"
        "assert not {'kubernetes', 'urllib3'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
