"""The reflector against what a real server sent: however it is cut, repeated, reordered or broken."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynet.objects import BadObject, Object, Ref, ref_of
from pynet.sources.reflector import Broken, Change, Delete, List, Reflector, Relist, Replace, Upsert, Watch
from pynet.sources.transport import Status
from sources import recorded


def follow(known: dict[Ref, Object], changes: list[Change]) -> dict[Ref, Object]:
    """Return what a consumer knows after `changes`."""
    for change in changes:
        if isinstance(change, Replace):
            known = {ref_of(obj): obj for obj in change.objects}
        elif isinstance(change, Upsert):
            known = {**known, ref_of(change.object): change.object}
        elif isinstance(change, Delete):
            known = {ref: obj for ref, obj in known.items() if ref != change.ref}
    return known


def listed(kind: str, name: str) -> Reflector:
    """Return a reflector that has read a recorded list."""
    reflector = Reflector(kind, streaming=False)
    assert isinstance(reflector.request(), List)
    changes = reflector.page(recorded.body(name))
    assert [type(change) for change in changes] == [Replace]
    assert isinstance(reflector.request(), Watch)
    return reflector


def event(kind: str, version: int, name: str = "a", *, obj: str = "Service", **spec: Any) -> bytes:
    metadata = {"name": name, "namespace": "x", "resourceVersion": str(version)}
    return json.dumps(
        {"type": kind, "object": {"kind": obj, "apiVersion": "v1", "metadata": metadata, "spec": spec}}
    ).encode()


def ready() -> Reflector:
    """Return a reflector of Services that starts from nothing at version 10."""
    reflector = Reflector("Service", streaming=False)
    reflector.request()
    reflector.page(b'{"metadata":{"resourceVersion":"10"},"items":null}')
    reflector.request()
    return reflector


@pytest.mark.parametrize(
    ("kind", "name"), [("Service", "list-services"), ("EndpointSlice", "list-endpointslices"), ("Node", "list-nodes")]
)
def test_a_recorded_list_is_read_whole(kind: str, name: str) -> None:
    document = recorded.answer(name)["body"]
    reflector = listed(kind, name)
    wanted = {(item["metadata"].get("namespace", ""), item["metadata"]["name"]) for item in document["items"]}
    assert {(ref.namespace, ref.name) for ref in reflector.objects} == wanted
    assert reflector.version == document["metadata"]["resourceVersion"]


def test_pages_are_one_list() -> None:
    reflector = Reflector("Service", streaming=False, page=5)
    assert reflector.request() == List(5)
    assert reflector.page(recorded.body("page-1")) == []
    request = reflector.request()
    assert isinstance(request, List) and request.token == recorded.answer("page-1")["body"]["metadata"]["continue"]
    rest = recorded.answer("page-2")["body"]
    rest["metadata"].pop("continue", None)
    (replace,) = reflector.page(json.dumps(rest).encode())
    assert isinstance(replace, Replace)
    assert len(replace.objects) == len(recorded.answer("page-1")["body"]["items"]) + len(rest["items"])


def test_pages_that_expired_are_asked_for_anew_and_all_at_once() -> None:
    reflector = Reflector("Service", streaming=False, page=5)
    reflector.request()
    reflector.page(recorded.body("page-1"))
    reflector.request()
    assert isinstance(reflector.refused(Status("too old", "Expired", 410))[-1], Relist)
    assert reflector.request() == List(0)


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, 4000), max_size=60))
def test_a_watch_means_the_same_however_it_is_cut(cuts: list[int]) -> None:
    whole = listed("EndpointSlice", "list-endpointslices")
    text = recorded.lines("watch-endpointslices")
    expected = whole.feed(text)
    pieces = listed("EndpointSlice", "list-endpointslices")
    changes, at = [], 0
    for cut in [*cuts, len(text)]:
        changes += pieces.feed(text[at : at + cut])
        at += cut
    assert changes == expected
    assert pieces.objects == whole.objects
    assert pieces.version == whole.version


@pytest.mark.parametrize(
    ("kind", "name", "watch"),
    [
        ("Service", "list-services", "watch-services"),
        ("EndpointSlice", "list-endpointslices", "watch-endpointslices"),
        ("Node", "list-nodes", "watch-nodes"),
    ],
)
def test_a_recorded_watch_ends_where_its_last_events_say(kind: str, name: str, watch: str) -> None:
    reflector = listed(kind, name)
    last: dict[tuple[str, str], str | None] = {}
    for entry in recorded.watch(watch):
        meta = entry["object"]["metadata"]
        if entry["type"] != "BOOKMARK":
            gone = entry["type"] == "DELETED"
            last[meta.get("namespace", ""), meta["name"]] = None if gone else meta["resourceVersion"]
    reflector.feed(recorded.lines(watch))
    for (namespace, obj), version in last.items():
        found = reflector.objects.get(Ref(kind, namespace, obj))
        assert (found.metadata.resource_version if found else None) == version
    assert reflector.version == recorded.watch(watch)[-1]["object"]["metadata"]["resourceVersion"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Service", "watch-services-initial-events"), ("EndpointSlice", "watch-endpointslices-initial-events")],
)
def test_a_streaming_list_is_one_replacement_and_then_changes(kind: str, name: str) -> None:
    reflector = Reflector(kind)
    assert reflector.request() == Watch("", initial=True)
    changes = reflector.feed(recorded.lines(name))
    end = next(i for i, e in enumerate(recorded.watch(name)) if e["type"] == "BOOKMARK")
    assert isinstance(changes[0], Replace) and len(changes[0].objects) == end
    assert all(not isinstance(change, Replace | Relist | Broken) for change in changes[1:])
    assert reflector.request() == Watch(reflector.version)


def test_a_second_list_says_only_what_differs() -> None:
    reflector = listed("Service", "list-services")
    before = dict(reflector.objects)
    reflector.line(recorded.lines("watch-410-gone").strip())
    assert isinstance(reflector.request(), List)
    document = recorded.answer("list-services")["body"]
    gone = document["items"].pop()
    document["items"][0]["spec"]["sessionAffinity"] = "ClientIP"
    document["items"][0]["metadata"]["resourceVersion"] = "999"
    changes = reflector.page(json.dumps(document).encode())
    assert [type(change) for change in changes] == [Delete, Upsert]
    assert changes[0] == Delete(Ref("Service", gone["metadata"]["namespace"], gone["metadata"]["name"]))
    assert follow(before, changes) == reflector.objects


def test_gone_is_an_event_of_an_answer_that_went_well() -> None:
    reflector = ready()
    (change,) = reflector.feed(recorded.lines("watch-410-gone"))
    assert isinstance(change, Relist) and "too old resource version" in change.reason
    assert isinstance(reflector.request(), List)
    assert reflector.objects == {}


def test_a_bookmark_moves_the_version_and_nothing_else() -> None:
    reflector = ready()
    assert (
        reflector.line(b'{"type":"BOOKMARK","object":{"kind":"Service","metadata":{"resourceVersion":"44"},"spec":{}}}')
        == []
    )
    assert reflector.request() == Watch("44")


HARMLESS = [
    ("the same event twice", [event("ADDED", 11), event("ADDED", 11)], 1),
    ("a change that is older than what is known", [event("ADDED", 12, type="NodePort"), event("MODIFIED", 11)], 1),
    ("a change from before the deletion", [event("ADDED", 11), event("DELETED", 13), event("MODIFIED", 12)], 2),
    (
        "a deletion from before the object was made again",
        [event("ADDED", 11), event("ADDED", 14), event("DELETED", 13)],
        2,
    ),
    ("a deletion of something unknown", [event("DELETED", 11)], 0),
    ("the same deletion twice", [event("ADDED", 11), event("DELETED", 12), event("DELETED", 12)], 2),
    ("the repetition of what was deleted", [event("ADDED", 11), event("DELETED", 12), event("ADDED", 11)], 2),
]


@pytest.mark.parametrize(("lines", "told"), [row[1:] for row in HARMLESS], ids=[row[0] for row in HARMLESS])
def test_repetitions_and_disorder_change_nothing(lines: list[bytes], told: int) -> None:
    reflector = ready()
    changes = [change for line in lines for change in reflector.line(line)]
    assert len(changes) == told
    assert follow({}, changes) == reflector.objects


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"ports": "eighty"}, "spec.ports"),
        ({"ports": [{"port": "eighty"}]}, "spec.ports[0].port"),
        ({"clusterIPs": [1]}, "spec.clusterIPs[0]"),
    ],
)
def test_one_bad_object_does_not_take_down_the_list(bad: dict[str, Any], field: str) -> None:
    reflector = Reflector("Service", streaming=False)
    items = [{"metadata": {"name": name, "namespace": "x", "resourceVersion": "1"}, "spec": {}} for name in "abc"]
    items[1]["spec"] = bad  # type: ignore[assignment]
    reflector.request()
    changes = reflector.page(json.dumps({"metadata": {"resourceVersion": "9"}, "items": items}).encode())
    assert [type(change) for change in changes] == [BadObject, Replace]
    assert isinstance(changes[0], BadObject)
    assert (changes[0].where, changes[0].field) == ("Service x/b", field)
    assert {ref.name for ref in reflector.objects} == {"a", "c"}


def test_of_an_object_that_became_bad_the_last_good_form_stays() -> None:
    reflector = ready()
    reflector.line(event("ADDED", 11, clusterIP="10.96.0.1"))
    (bad,) = reflector.line(event("MODIFIED", 12, ports="eighty"))
    assert isinstance(bad, BadObject)
    assert len(reflector.objects) == 1
    assert reflector.version == "12"
    reflector.refused(Status("", "Expired", 410))
    reflector.request()
    page = {"metadata": {"resourceVersion": "13"}, "items": [json.loads(event("", 12, ports="eighty"))["object"]]}
    assert [type(change) for change in reflector.page(json.dumps(page).encode())] == [BadObject]
    assert len(reflector.objects) == 1


@pytest.mark.parametrize(
    "line", [b"{", b'{"type":"ADDED","object":{"metadata"}', b"<html>", b'{"type":1,"object":{}}', b"\xff\xfe"]
)
def test_an_unreadable_line_breaks_the_watch_and_at_last_the_version(line: bytes) -> None:
    reflector = ready()
    assert isinstance(reflector.feed(line + b"\n")[-1], Broken)
    assert reflector.request() == Watch("10")
    assert isinstance(reflector.feed(line + b"\n")[-1], Broken)
    reflector.request()
    assert isinstance(reflector.feed(line + b"\n")[-1], Relist)
    assert isinstance(reflector.request(), List)


def test_half_a_line_at_the_end_of_a_connection_is_forgotten() -> None:
    reflector = ready()
    assert reflector.feed(event("ADDED", 11)[:40]) == []
    reflector.request()
    assert len(reflector.feed(event("ADDED", 11) + b"\n")) == 1


@pytest.mark.parametrize("code", [400, 404, 422])
def test_a_server_without_streaming_lists_is_asked_for_pages(code: int) -> None:
    reflector = Reflector("Service")
    reflector.request()
    assert isinstance(reflector.refused(Status("sendInitialEvents is forbidden", "Invalid", code))[-1], Relist)
    assert isinstance(reflector.request(), List)


def test_a_server_that_ignores_streaming_lists_is_asked_for_pages() -> None:
    reflector = Reflector("Service")
    reflector.request()
    assert reflector.line(event("ADDED", 11)) == []
    assert isinstance(reflector.interrupted("silence", silent=True)[-1], Relist)
    assert isinstance(reflector.request(), List)


@pytest.mark.parametrize("code", [401, 403, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_does_not_cost_the_version(code: int) -> None:
    reflector = ready()
    for _ in range(10):
        assert isinstance(reflector.refused(Status("", "", code))[-1], Broken)
        assert reflector.request() == Watch("10")


def test_a_watch_that_always_fails_at_one_version_is_given_up() -> None:
    """As after "etcd event received with PrevKv=nil", which a server says again whenever it is asked."""
    reflector = ready()
    line = b'{"type":"ERROR","object":{"kind":"Status","code":500,"reason":"InternalError","message":"PrevKv=nil"}}'
    assert [type(reflector.line(line)[-1]) for _ in range(3)] == [Broken, Broken, Relist]


def test_a_version_of_the_future_is_given_up() -> None:
    reflector = ready()
    status = recorded.answer("error-rv-too-large")["body"]
    (change,) = reflector.refused(msgspec.convert(status, Status))
    assert isinstance(change, Relist)


def test_an_error_within_a_watch_says_how_long_to_wait() -> None:
    reflector = Reflector("Service")
    (reflector.listing, reflector.version) = (False, "5")
    status = b'{"code":429,"reason":"TooManyRequests","message":"slow","details":{"retryAfterSeconds":3}}'
    (change,) = reflector.feed(b'{"type":"ERROR","object":' + status + b"}\n")
    assert change == Broken("429 TooManyRequests: slow", 3.0)
    assert reflector.request() == Watch("5")
