"""/statusz and /flagz: the form that a request's Accept header asks for, as Kubernetes' components give it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import yaml

from proxy.zpages import zpages_routes
from pynet.daemon.http import Server, serve

TEXT, NONE = "text/plain; charset=utf-8", ""
BETA = "application/json;v=v1beta1;g=config.k8s.io;as=Statusz"
ALPHA = "application/json;g=config.k8s.io;v=v1alpha1;as=Statusz"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = serve("127.0.0.1:0", zpages_routes({"v": "2", "proxy-mode": "nftables"}, ("/metrics", "/healthz")))
    assert made
    yield made
    made.close()


def ask(server: Server, path: str, accept: str | None) -> tuple[int, str, str, str | None]:
    """Return status, content type, body and the header Warning."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.address[1]}{path}")
    if accept is not None:
        request.add_header("Accept", accept)
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.status, reply.headers["Content-Type"], reply.read().decode(), reply.headers["Warning"]
    except urllib.error.HTTPError as error:
        return error.code, NONE, error.read().decode(), None


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, TEXT),
        ("", TEXT),
        ("*/*", TEXT),
        ("text/*", TEXT),
        ("text/plain", TEXT),
        ("text/plain; charset=UTF-8", TEXT),
        ("text/html, */*;q=0.1", TEXT),
        ("application/json;v=foo;g=config.k8s.io;as=Statusz,*/*", TEXT),
        (BETA, "application/json"),
        (ALPHA, "application/json"),
        (f"text/plain;q=0.5, {BETA}", "application/json"),
        (f"{BETA};q=0.5, text/plain", TEXT),
        (BETA.replace("json", "yaml"), "application/yaml"),
        ("application/json", NONE),
        ("application/xml", NONE),
        ("application/json;v=v1beta1;g=config.k8s.io", NONE),
        ("application/json;v=v1beta1;g=config.k8s.io;as=Flagz", NONE),
        ("application/json;v=v1;g=config.k8s.io;as=Statusz", NONE),
        ("application/cbor;v=v1beta1;g=config.k8s.io;as=Statusz", NONE),
        ("text/plain;charset=latin1", NONE),
        ("*/*;q=0", NONE),
        (";;,,=", NONE),
    ],
)
def test_the_form_asked_for(server: Server, accept: str | None, kind: str) -> None:
    status, found, body, _ = ask(server, "/statusz", accept)
    assert (status, found) == ((200, kind) if kind else (406, NONE))
    assert body


def test_what_the_objects_say(server: Server) -> None:
    *_, body, warning = ask(server, "/statusz", BETA)
    told = json.loads(body)
    assert {**told, "startTime": "", "binaryVersion": "", "uptimeSeconds": 0} == {
        "kind": "Statusz", "apiVersion": "config.k8s.io/v1beta1", "metadata": {"name": "kube-proxy"}, "startTime": "",
        "uptimeSeconds": 0, "binaryVersion": "", "paths": ["/flagz", "/healthz", "/metrics", "/statusz"],
    }  # fmt: skip
    assert warning is None
    assert told["binaryVersion"]
    assert told["startTime"].endswith("Z")
    *_, body, warning = ask(server, "/statusz", f"{ALPHA},{BETA}")
    assert json.loads(body)["apiVersion"] == "config.k8s.io/v1alpha1"
    assert warning and warning.startswith("299 - ")
    *_, body, _ = ask(server, "/flagz", BETA.replace("json", "yaml").replace("Statusz", "Flagz"))
    assert yaml.safe_load(body) == {
        "kind": "Flagz", "apiVersion": "config.k8s.io/v1beta1", "metadata": {"name": "kube-proxy"},
        "flags": {"proxy-mode": "nftables", "v": "2"},
    }  # fmt: skip
    assert ask(server, "/flagz", None)[2].startswith("\nkube-proxy flagz\nWarning: ")
