"""Kubernetes Events: what is told, how often, and that telling never costs anything."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from apiserver import Fault, Server
from apiserver.errors import ApiError
from apiserver.resources import NAMED
from pynet.objects import Metadata, Ref, Service
from pynet.sources.apievents import BURST, REPEAT_AFTER, ApiEvents
from pynet.sources.credentials import Credentials
from pynet.sources.transport import Transport

WEB = Service(metadata=Metadata(name="web", namespace="default", uid="1-2-3"))


class Clock:
    """A time that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def events(server: Server, clock: Clock) -> Iterator[ApiEvents]:
    made = ApiEvents(Transport(Credentials(None, server.url), qps=0), "pyproxy", "node1", clock=clock)
    yield made
    made.close()


def stored(server: Server, count: int) -> list[dict[str, Any]]:
    """Return the Events at the server, when there are so many."""
    deadline = time.monotonic() + 10
    while len(found := server.store.all(NAMED["events"])) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(found) == count
    return found


def test_an_event_names_object_reason_and_who_says_it(server: Server, events: ApiEvents) -> None:
    events.emit("Quarantined", "spec.ports[0].port: 0 is no port", WEB)
    (event,) = stored(server, 1)
    assert event["involvedObject"] == {
        "kind": "Service", "namespace": "default", "name": "web", "apiVersion": "v1", "uid": "1-2-3",
    }  # fmt: skip
    assert (event["reason"], event["type"], event["count"]) == ("Quarantined", "Warning", 1)
    assert event["source"] == {"component": "pyproxy", "host": "node1"}


def test_an_event_about_this_node(server: Server, events: ApiEvents) -> None:
    events.emit("ModeFallback", "no IPVS in this kernel: iptables instead", severity="Normal")
    (event,) = stored(server, 1)
    assert event["metadata"]["namespace"] == "default"
    assert event["involvedObject"] == {"kind": "Node", "name": "node1", "apiVersion": "v1", "uid": "node1"}


def test_a_repetition_is_counted_and_told_later(server: Server, events: ApiEvents, clock: Clock) -> None:
    for _ in range(50):
        events.emit("Quarantined", "bad", WEB)
    stored(server, 1)
    clock.now += REPEAT_AFTER + 1
    events.emit("Quarantined", "bad", WEB)
    events.close()
    assert stored(server, 1)[0]["count"] == 51


def test_many_different_events_are_limited(server: Server, events: ApiEvents) -> None:
    for number in range(BURST * 4):
        events.emit("Quarantined", "bad", Ref("Service", "default", f"s{number}"))
    stored(server, BURST)
    assert events.dropped == BURST * 3


def test_a_server_that_refuses_costs_nothing(server: Server, events: ApiEvents) -> None:
    server.faults.add(Fault("events", error=ApiError(403, "Forbidden", "no")))
    events.emit("Quarantined", "bad", WEB)
    events.emit("Other", "bad", WEB)
    assert stored(server, 1)[0]["reason"] == "Other"


def test_a_server_that_does_not_answer_holds_nobody_up(server: Server, events: ApiEvents) -> None:
    server.faults.add(Fault("events", hang=True))
    began = time.monotonic()
    for number in range(20):
        events.emit("Quarantined", "bad", Ref("Service", "default", f"s{number}"))
    assert time.monotonic() - began < 1
    server.stop()


def test_other_words_on_the_same_object_are_another_event(server: Server, events: ApiEvents) -> None:
    for message in ("port a", "port b", "port a"):
        events.emit("Quarantined", message, WEB)
    assert sorted(event["message"] for event in stored(server, 2)) == ["port a", "port b"]


def test_an_event_that_the_server_forgot_is_made_anew(server: Server, events: ApiEvents, clock: Clock) -> None:
    events.emit("Quarantined", "bad", WEB)
    server.delete(stored(server, 1)[0])
    stored(server, 0)
    clock.now += REPEAT_AFTER + 1
    events.emit("Quarantined", "bad", WEB)
    assert stored(server, 1)[0]["count"] == 2


@pytest.mark.parametrize("trouble", ["away", "failing", "busy"])
def test_an_event_waits_for_a_server_in_trouble(
    server: Server, events: ApiEvents, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr("pynet.sources.apievents._PAUSES", (*(0.05,) * 100, None))
    if trouble == "away":
        server.stop()
    else:
        code = 500 if trouble == "failing" else 429
        server.faults.add(Fault("events", times=3, error=ApiError(code, "", "no")))
    events.emit("ModeFallback", "no IPVS in this kernel: iptables instead")
    if trouble == "away":
        time.sleep(0.2)
        server.start()
    assert stored(server, 1)[0]["count"] == 1


# What the server demands of a v1 Event (validation.ValidateEventCreate, with no eventTime), and the fields that it has.
FIELDS = {
    "apiVersion", "kind", "metadata", "involvedObject", "reason", "message", "source", "firstTimestamp",
    "lastTimestamp", "count", "type", "eventTime", "series", "action", "related", "reportingComponent",
    "reportingInstance",
}  # fmt: skip


@pytest.mark.parametrize("about", [WEB, None, Ref("Service", "default", "n" * 253), Ref("Node", "", "a." * 120 + "b")])
def test_an_event_is_one_that_a_server_takes(server: Server, events: ApiEvents, about: Any) -> None:
    events.emit("Quarantined", "w" * 5000, about)
    (event,) = stored(server, 1)
    name = event["metadata"]["name"]
    assert len(name) <= 253 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", name)
    assert event["metadata"]["namespace"] == (event["involvedObject"].get("namespace") or "default")
    assert event.keys() <= FIELDS
    assert len(event["message"]) <= 1024 and len(event["reportingInstance"]) <= 128
    assert event["type"] in ("Normal", "Warning")
