"""The server in small against the recorded one: the same questions get answers of the same shape and the same words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import urllib3

from apiserver import Server
from sources import recorded

CHANGES = {"resourceVersion", "uid", "creationTimestamp", "managedFields", "generation"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that holds the recorded cluster, stored in the order of the recorded versions."""
    with Server(service_ranges=("10.96.0.0/16", "fd00:10:96::/108")) as running:
        kinds = {"list-services-all": "Service", "list-endpointslices": "EndpointSlice", "list-nodes": "Node"}
        for name, kind in kinds.items():
            document = recorded.answer(name)["body"]
            for item in document["items"]:
                item["metadata"] = {key: value for key, value in item["metadata"].items() if key not in CHANGES}
                running.put({"apiVersion": document["apiVersion"], "kind": kind, **item})
        yield running


def ask(
    server: Server, path: str, method: str = "GET", accept: str = "application/json", body: Any = None, token: str = ""
) -> Any:
    pools = urllib3.PoolManager()  # of its own: a port may have been another server's a moment ago
    return pools.request(
        method, server.url + path,
        headers={"Accept": accept, "Content-Type": "application/json", "Authorization": f"Bearer {token}"},
        body=None if body is None else json.dumps(body), retries=False,
    )  # fmt: skip


def shape(value: Any) -> Any:
    """Return which fields there are, and of which type, at every depth."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in sorted(value.items()) if key not in CHANGES}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def names(document: Any) -> list[tuple[str, str]]:
    return [(item["metadata"].get("namespace", ""), item["metadata"]["name"]) for item in document["items"]]


@pytest.mark.parametrize(
    "name",
    [
        "list-services",
        "list-services-all",
        "list-endpointslices",
        "list-nodes",
        "list-services-field-selector",
        "page-1",
    ],
)
def test_a_list_with_these_selectors(server: Server, name: str) -> None:
    real = recorded.answer(name)
    found = ask(server, real["request"]["path"])
    assert found.status == real["status"]
    assert names(found.json()) == names(real["body"])
    for ours, theirs in zip(found.json()["items"], real["body"]["items"], strict=True):
        assert shape(ours) == shape(theirs)


def test_pages_follow_each_other(server: Server) -> None:
    whole = names(ask(server, "/api/v1/services").json())
    found: list[tuple[str, str]] = []
    query = {"limit": "5"}
    while True:
        page = ask(server, "/api/v1/services?" + urlencode(query)).json()
        found += names(page)
        assert page["metadata"].get("remainingItemCount", 0) == len(whole) - len(found)
        if not page["metadata"].get("continue"):
            break
        query["continue"] = page["metadata"]["continue"]
    assert found == whole


def test_pages_show_one_version_of_a_changing_list(server: Server) -> None:
    first = ask(server, "/api/v1/nodes?limit=1").json()
    server.put({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "zz"}})
    rest = ask(server, "/api/v1/nodes?" + urlencode({"limit": 9, "continue": first["metadata"]["continue"]})).json()
    server.delete({"kind": "Node", "metadata": {"name": "zz"}})
    assert names(rest) == [("", "node2")]
    assert rest["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


@pytest.mark.parametrize("name", ["table-services", "table-endpointslices", "table-nodes"])
def test_a_table_has_the_columns_and_cells(server: Server, name: str) -> None:
    real = recorded.answer(name)
    found = ask(server, real["request"]["path"], accept=real["request"]["accept"]).json()
    columns = [column["name"] for column in real["body"]["columnDefinitions"]]
    assert [column["name"] for column in found["columnDefinitions"]] == columns
    assert [column["priority"] for column in found["columnDefinitions"]] == [
        column["priority"] for column in real["body"]["columnDefinitions"]
    ]
    age = columns.index("Age")
    held = {row["cells"][0] for row in found["rows"]}  # the recorded lists leave out what the proxy's selectors do
    assert held
    rows = [row for row in real["body"]["rows"] if row["cells"][0] in held]
    for ours, theirs in zip(found["rows"], rows, strict=True):
        assert ours["cells"][:age] + ours["cells"][age + 1 :] == theirs["cells"][:age] + theirs["cells"][age + 1 :]
        assert ours["object"]["kind"] == theirs["object"]["kind"]


@pytest.mark.parametrize("name", ["error-404", "page-bad-continue", "list-exact-old-resourceversion"])
def test_an_error_in_the_same_words(server: Server, name: str) -> None:
    real = recorded.answer(name)
    if name.startswith("list-exact"):  # before anything was there
        found = ask(server, "/api/v1/services?resourceVersion=1&resourceVersionMatch=Exact")
        assert found.json()["items"] == []
        return
    found = ask(server, real["request"]["path"])
    assert found.status == real["status"]
    assert found.json() == real["body"]


def test_a_version_of_the_future(server: Server) -> None:
    real = recorded.answer("error-rv-too-large")
    split = urlsplit(real["request"]["path"])
    query = dict(parse_qsl(split.query)) | {"timeoutSeconds": "1"}
    found = ask(server, f"{split.path}?{urlencode(query)}")
    assert (found.status, found.headers["Retry-After"]) == (real["status"], real["headers"]["Retry-After"])
    assert found.json()["details"] == real["body"]["details"]


def test_invalid_ports_in_the_same_words(server: Server) -> None:
    real = recorded.answer("error-422")
    ports = [{"port": 70000, "targetPort": 70000}]
    bad = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bad"}, "spec": {"ports": ports}}
    found = ask(server, "/api/v1/namespaces/shop/services", "POST", body=bad)
    assert (found.status, found.json()) == (real["status"], real["body"])


def test_a_node_port_that_is_taken_in_the_same_words(server: Server) -> None:
    real = recorded.answer("error-409-nodeport")
    spec = {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]}
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "np2"}, "spec": spec}
    found = ask(server, "/api/v1/namespaces/shop/services", "POST", body=body)
    assert (found.status, found.json()) == (real["status"], real["body"])


def test_who_is_not_known_is_told_so() -> None:
    real = recorded.answer("error-401")
    with Server(tokens={"x"}) as server:
        found = ask(server, real["request"]["path"])
        assert (found.status, found.json()) == (real["status"], real["body"])


@pytest.mark.parametrize("name", ["discovery-api", "discovery-apis-discovery-v1"])
def test_discovery(server: Server, name: str) -> None:
    real = recorded.answer(name)
    found = ask(server, real["request"]["path"]).json()
    for each in real["body"].get("resources", ()):
        each.pop("storageVersionHash", None)
    found.pop("serverAddressByClientCIDRs", None)
    real["body"].pop("serverAddressByClientCIDRs", None)
    assert found == real["body"]


@pytest.mark.parametrize(
    ("path", "name"), [("/api", "discovery-aggregated-api"), ("/apis", "discovery-aggregated-apis")]
)
def test_aggregated_discovery_of_what_is_served(server: Server, path: str, name: str) -> None:
    real = recorded.answer(name)
    found = ask(server, path, accept=real["request"]["accept"])
    assert found.headers["Content-Type"] == real["headers"]["Content-Type"]
    theirs = {
        (group["metadata"].get("name", ""), each["resource"]): each
        for group in real["body"]["items"]
        for version in group["versions"]
        for each in version["resources"]
    }
    for group in found.json()["items"]:
        for each in group["versions"][0]["resources"]:
            real_one = theirs[group["metadata"].get("name", ""), each["resource"]]
            for field in ("responseKind", "scope", "singularResource", "verbs", "shortNames", "categories"):
                assert each.get(field) == real_one.get(field), (each["resource"], field)


def watched(server: Server, path: str, seconds: float = 1) -> list[dict[str, Any]]:
    """Return the events of a watch of so many seconds."""
    found = ask(server, f"{path}&timeoutSeconds={seconds:.0f}")
    assert found.status == 200
    return [json.loads(line) for line in found.data.splitlines()]


def test_a_watch_from_too_old_a_version(server: Server) -> None:
    (real,) = recorded.watch("watch-410-gone")
    with Server() as other:
        other.store.compact()
        (event,) = watched(other, "/api/v1/services?watch=1&resourceVersion=1")
    assert {**event["object"], "message": ""} == {**real["object"], "message": ""}
    assert event["object"]["message"].startswith("too old resource version: 1 (")


@pytest.mark.parametrize("name", ["watch-services-initial-events", "watch-endpointslices-initial-events"])
def test_a_streaming_list(server: Server, name: str) -> None:
    text = (recorded.CORPUS / f"{name}.ndjson").read_text().splitlines()[0]
    split = urlsplit(json.loads(text)["request"])
    query = dict(parse_qsl(split.query, keep_blank_values=True)) | {"timeoutSeconds": "1"}
    events = watched(server, f"{split.path}?{urlencode(query)}")
    real = recorded.watch(name)
    end = next(index for index, event in enumerate(real) if event["type"] == "BOOKMARK")
    assert [event["type"] for event in events] == [event["type"] for event in real[: end + 1]]
    ours = sorted(event["object"]["metadata"]["name"] for event in events[:-1])
    assert ours == sorted(event["object"]["metadata"]["name"] for event in real[:end])
    bookmark = events[-1]["object"]
    assert shape(bookmark) == shape(real[end]["object"])
    assert bookmark["metadata"]["annotations"] == real[end]["object"]["metadata"]["annotations"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("watch-services", "/api/v1/services"),
        ("watch-endpointslices", "/apis/discovery.k8s.io/v1/endpointslices"),
        ("watch-nodes", "/api/v1/nodes"),
    ],
)
def test_a_bookmark_looks_like_theirs(name: str, path: str) -> None:
    real = [event for event in recorded.watch(name) if event["type"] == "BOOKMARK"]
    with Server(bookmark_every=0.1) as server:
        events = watched(server, f"{path}?watch=1&resourceVersion=1&allowWatchBookmarks=true")
    marks = [event for event in events if event["type"] == "BOOKMARK"]
    assert marks and shape(marks[0]) == shape(real[0])


def test_what_leaves_the_selection_is_deleted_for_the_watch() -> None:
    with Server() as server:
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"clusterIP": "10.96.0.9"}}
        server.put(service)
        start = server.store.version
        server.put({**service, "metadata": {"name": "a", "labels": {"x": "y"}}})
        server.put(service)
        events = watched(server, f"/api/v1/services?watch=1&labelSelector=%21x&resourceVersion={start}")
    assert [event["type"] for event in events] == ["DELETED", "ADDED"]
    assert "labels" not in events[0]["object"]["metadata"]
    assert int(events[0]["object"]["metadata"]["resourceVersion"]) == start + 1


def test_who_may_not_is_told_so() -> None:
    """Roles allow by verb, group and resource; the words are kube-apiserver's."""
    account = "system:serviceaccount:kube-system:reader"
    rule = {"apiGroups": [""], "resources": ["services"], "verbs": ["list"]}
    base = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    with Server(tokens={"t": account, "boss": "system:masters"}) as server:
        server.put(
            {**base, "kind": "ClusterRole", "metadata": {"name": "reads"}, "rules": [rule]},
            {
                **base,
                "kind": "ClusterRoleBinding",
                "metadata": {"name": "reader"},
                "roleRef": {"kind": "ClusterRole", "name": "reads"},
                "subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "reader"}],
            },
        )
        assert ask(server, "/api/v1/services", token="t").status == 200
        assert ask(server, "/api/v1/nodes", token="boss").status == 200
        found = ask(server, "/api/v1/services?watch=1", token="t")
    assert (found.status, found.json()) == (
        403,
        {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Forbidden",
            "message": f'services is forbidden: User "{account}" cannot watch resource "services" in API group "" '
            "at the cluster scope",
            "details": {"kind": "services"}, "code": 403,
        },
    )  # fmt: skip
