"""The API server's source against the server in small: whatever goes wrong, what is known becomes what is there."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from apiserver import Fault, Server
from apiserver.errors import ApiError
from pynet.objects import Metadata, Object, Ref, Service, ref_of
from pynet.sources import Batch
from pynet.sources.apiserver import ApiServer, batch_of
from pynet.sources.credentials import Credentials
from pynet.sources.reflector import Delete, Replace, Upsert
from pynet.sources.transport import Transport

KINDS = frozenset({"Service", "EndpointSlice", "Node", "ServiceCIDR"})
PATIENCE = 20.0


def service(name: str, address: str = "10.96.0.9", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": address, "ports": [{"port": 80}], **spec},
    }


def node(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": "10.244.1.0/24"}}


def service_cidr(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name},
        "spec": {"cidrs": ["10.96.0.0/16"]},
    }


class Consumer:
    """What a daemon would know: everything delivered so far, applied."""

    def __init__(self, server: Server, **options: Any) -> None:
        self.known: dict[Ref, Object] = {}
        self.batches: list[Batch] = []
        self.replaced: set[str] = set()
        self.changes = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        transport = Transport(Credentials(None, server.url), qps=0)
        source = ApiServer(transport, KINDS, **{"backoff": (0.02, 0.1), **options})
        self.kinds = source.kinds
        self._thread = threading.Thread(target=source.run, args=(self._deliver, self._stop))
        self._thread.start()

    def _deliver(self, batch: Batch) -> None:
        with self._changed:
            self.batches.append(batch)
            self.known = {ref: obj for ref, obj in self.known.items() if ref.kind not in batch.replaced}
            for ref in batch.deletes:
                assert ref in self.known, "a deletion of what was never there"
                del self.known[ref]
            for obj in batch.upserts:
                assert self.known.get(ref_of(obj)) != obj, "a change that changes nothing"
                self.known[ref_of(obj)] = obj
            self.changes += len(batch.upserts) + len(batch.deletes)
            self.replaced |= batch.replaced
            self._changed.notify_all()

    def names(self, kind: str = "Service") -> set[str]:
        return {ref.name for ref in self.known if ref.kind == kind}

    def wait(self, names: set[str], kind: str = "Service") -> None:
        with self._changed:
            reached = self._changed.wait_for(lambda: kind in self.replaced and self.names(kind) == names, PATIENCE)
        assert reached, f"expected {names}, know {self.names(kind)}"

    def close(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("pynet.sources.apiserver.INITIAL_IDLE", 0.5)
    with Server() as running:
        yield running


@pytest.fixture
def consumer(server: Server) -> Iterator[Consumer]:
    made = Consumer(server)
    yield made
    made.close()


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_snapshot_and_then_changes(server: Server, consumer: Consumer) -> None:
    consumer.wait(set())
    server.put(service("a"), node("n1"))
    consumer.wait({"a"})
    consumer.wait({"n1"}, "Node")
    server.put(service("b"))
    server.delete(service("a"))
    consumer.wait({"b"})
    wait_for(lambda: consumer.replaced == KINDS, f"know {consumer.replaced}")  # each kind is listed by itself


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming list", "paged list"])
def test_the_selectors_are_kube_proxys(server: Server, streaming: bool) -> None:
    server.put(service("plain"), service("headless", "None"), service("other"), node("n1"), node("n2"))
    other = service("other", "10.96.0.10")
    other["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "x"}
    server.put(other)
    consumer = Consumer(server, node="n2", streaming=streaming)
    try:
        consumer.wait({"plain"})
        consumer.wait({"n2"}, "Node")
        plain = service("plain")
        plain["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "x"}
        server.put(plain)  # it leaves the selection: DELETED
        consumer.wait(set())
        server.put(service("plain"))
        consumer.wait({"plain"})
    finally:
        consumer.close()


def test_many_objects_come_in_pages(server: Server) -> None:
    names = {f"s{index}" for index in range(40)}
    server.put(*(service(name) for name in names))
    consumer = Consumer(server, streaming=False, page=7)
    try:
        consumer.wait(names)
        assert len([request for request in server.requests if request.query.get("limit") == "7"]) >= 6
    finally:
        consumer.close()


PAGED = {
    "the connection is closed after each page": [Fault("services", "list", times=None, hangup=True)],
    "pages are compressed": [Fault("services", "list", times=None, gzip=True)],
    "410 in the middle": [
        Fault("services", "list", times=3),
        Fault("services", "list", error=ApiError(410, "Expired", "too old")),
    ],
    "500 in the middle": [
        Fault("services", "list", times=2),
        Fault("services", "list", times=2, error=ApiError(500, "InternalError", "etcd is away")),
    ],
}


@pytest.mark.parametrize("faults", PAGED.values(), ids=PAGED.keys())
def test_pages_are_one_list_whatever_comes_between(server: Server, faults: list[Fault]) -> None:
    names = {f"s{index}" for index in range(40)}
    server.put(*(service(name) for name in names))
    server.faults.add(*copy.deepcopy(faults))
    consumer = Consumer(server, streaming=False, page=7)
    try:
        consumer.wait(names)
        server.put(service("new"))
        consumer.wait(names | {"new"})
        assert consumer.changes == 41
    finally:
        consumer.close()


FAULTS = {
    "the connection is cut within a line": Fault("services", "watch", times=4, after=1, cut=True),
    "the watch ends well after each event": Fault("services", "watch", times=4, after=1, close=True),
    "the watch ends well at once": Fault("services", "watch", times=4, after=0, close=True),
    "events come twice": Fault("services", "watch", times=None, duplicate=True),
    "410 as an event": Fault("services", "watch", times=3, after=1, gone=True),
    "410 as an answer": Fault("services", "watch", times=3, error=ApiError(410, "Expired", "too old")),
    **{
        f"{code} as an event": Fault("services", "watch", times=2, after=1, tells=ApiError(code, reason, "in trouble"))
        for code, reason in (
            (429, "TooManyRequests"),
            (500, "InternalError"),
            (503, "ServiceUnavailable"),
            (504, "Timeout"),
        )
    },
    "an error without a code as an event": Fault("services", "watch", times=5, after=1, tells=ApiError(0, "", "")),
    "answers are compressed": Fault("services", times=None, gzip=True),
    "a line is no JSON": Fault("services", "watch", times=4, after=1, garbage=True),
    "the server is busy": Fault("services", "watch", times=3, error=ApiError(429, "TooManyRequests", "slow down")),
    "the server fails": Fault("services", "watch", times=3, error=ApiError(500, "InternalError", "etcd is away")),
    "the server is not authorised yet": Fault("services", "watch", times=3, error=ApiError(403, "Forbidden", "no")),
    "an old server knows no streaming list": Fault(
        "services", "watch", error=ApiError(422, "Invalid", "sendInitialEvents is forbidden")
    ),
    "bytes come one by one": Fault("services", "watch", times=None, drip=1),
    "there are no bookmarks": Fault("services", "watch", times=3, quiet=True, after=2, close=True),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_no_change_is_lost_or_told_twice(server: Server, fault: Fault) -> None:
    server.put(service("before"))
    server.faults.add(copy.copy(fault))
    consumer = Consumer(server)
    try:
        consumer.wait({"before"})
        for index in range(6):
            server.put(service(f"s{index}"))
            time.sleep(0.02)  # so that changes and connections fall together in different ways
        server.delete(service("s0"))
        server.put(service("s1", type="NodePort"))
        consumer.wait({"before", "s1", "s2", "s3", "s4", "s5"})
        wait_for(lambda: consumer.known[Ref("Service", "default", "s1")].spec.type == "NodePort", "s1 changed")  # type: ignore[union-attr]
    finally:
        consumer.close()


def test_changes_while_the_history_is_lost_are_found_by_a_new_list(server: Server, consumer: Consumer) -> None:
    server.put(service("stays"), service("goes"), service("changes"))
    consumer.wait({"stays", "goes", "changes"})
    told = consumer.changes
    server.stop()
    server.delete(service("goes"))
    server.put(service("new"), service("changes", type="NodePort"))
    server.store.compact()
    server.start()
    consumer.wait({"stays", "changes", "new"})
    wait_for(lambda: consumer.changes == told + 3, f"exactly three changes, not {consumer.changes - told}")


def test_a_restarted_server_is_followed_from_where_we_were(server: Server, consumer: Consumer) -> None:
    server.put(service("a"))
    consumer.wait({"a"})
    server.stop()
    server.put(service("b"))
    server.start()
    consumer.wait({"a", "b"})
    lists = [
        request
        for request in server.requests
        if request.plural == "services" and not request.query.get("resourceVersion")
    ]
    assert len(lists) == 1


def test_a_server_restored_to_an_older_state_is_believed(server: Server, consumer: Consumer) -> None:
    server.put(service("a"), *(service("b", f"10.96.1.{index}") for index in range(5)))
    consumer.wait({"a", "b"})
    server.stop()
    with Server(port=server.port) as younger:
        younger.put(service("c"))
        consumer.wait({"c"})


def test_a_server_that_is_not_there_yet_is_waited_for(server: Server) -> None:
    server.stop()
    consumer = Consumer(server)
    try:
        server.start()
        server.put(service("a"))
        consumer.wait({"a"})
    finally:
        consumer.close()


def test_a_connection_that_fell_silent_is_noticed(server: Server) -> None:
    server.bookmark_every = 0.05
    server.put(service("a"))
    # The streaming list and its end pass, then silence on an open connection: no event, no bookmark, no FIN.
    server.faults.add(Fault("services", "watch", after=2, stall=True))
    consumer = Consumer(server, idle=0.5)
    try:
        consumer.wait({"a"})
        server.put(service("b"))
        consumer.wait({"a", "b"})
    finally:
        consumer.close()


def test_an_unanswered_request_is_given_up(server: Server) -> None:
    server.faults.add(Fault("services", hang=True))
    server.put(service("a"))
    consumer = Consumer(server, idle=0.5)
    try:
        consumer.wait({"a"})
    finally:
        consumer.close()


def test_a_server_that_ignores_streaming_lists_is_noticed(server: Server) -> None:
    server.put(service("a"))
    server.faults.add(Fault("services", "watch", quiet=True, after=1, stall=True))
    consumer = Consumer(server)
    try:
        consumer.wait({"a"})
        server.put(service("b"))
        consumer.wait({"a", "b"})
    finally:
        consumer.close()


def test_an_unknown_field_selector_is_done_without(server: Server) -> None:
    server.field_selectors = False
    server.put(service("a"))
    consumer = Consumer(server)
    try:
        consumer.wait({"a"})
    finally:
        consumer.close()


def warned(caplog: pytest.LogCaptureFixture, kind: str = "Service") -> list[str]:
    """Return the reasons of the warnings about a kind."""
    fields = [getattr(record, "pynet_fields", {}) for record in caplog.records if record.levelname == "WARNING"]
    return [str(each["reason"]) for each in fields if each["kind"] == kind]


def test_a_server_without_streaming_lists_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    with Server(streaming=False) as server:
        server.put(service("a"))
        consumer = Consumer(server, backoff=(60, 60))  # it is asked for pages at once
        try:
            consumer.wait({"a"})
            assert not warned(caplog)
        finally:
            consumer.close()


def test_a_storm_of_errors_is_told_once_a_reason_and_met_with_patience(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.put(service("a"))
    consumer = Consumer(server)
    try:
        consumer.wait({"a"})
        before = consumer.changes
        storm = [ApiError(500, "InternalError", f"etcd {number}") for number in range(20)]
        for error in (*storm, ApiError(403, "Forbidden", "no")):
            server.faults.add(Fault("services", error=error))
        server.drop_connections()
        server.put(service("b"))
        consumer.wait({"a", "b"})
        told = warned(caplog)
        assert [reason[:3] for reason in told if reason[:1].isdigit()] == ["500", "403"]
        lists = [each for each in server.requests if each.plural == "services" and not each.query["resourceVersion"]]
        assert len(lists) == 1, "it is followed from where we were"
        assert consumer.changes == before + 1
    finally:
        consumer.close()


def test_a_server_that_asks_for_a_days_patience_is_asked_again_sooner(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pynet.sources.apiserver.LONGEST_ASKED", 0.2)
    busy = ApiError(429, "TooManyRequests", "slow down", {"retryAfterSeconds": 86400}, {"Retry-After": "86400"})
    consumer = Consumer(server)
    try:
        consumer.wait(set())
        within = server.faults.add(Fault("services", "watch", tells=busy))
        server.drop_connections()
        wait_for(lambda: within.met, "it is told within the watch")
        server.put(service("a"))
        consumer.wait({"a"})
        server.faults.add(Fault("services", "watch", error=busy))
        server.drop_connections()
        server.put(service("b"))
        consumer.wait({"a", "b"})
    finally:
        consumer.close()


def test_a_watch_that_always_ends_at_once_is_met_with_patience(server: Server) -> None:
    server.put(service("a"))
    consumer = Consumer(server, backoff=(0.05, 60))
    try:
        consumer.wait({"a"})
        server.faults.add(Fault("services", "watch", times=None, close=True))
        asked = len(server.requests)
        server.drop_connections()
        time.sleep(1)  # pauses of 50, 100, 200, 400 ms and so on, give or take the half
        assert len([each for each in server.requests[asked:] if each.plural == "services"]) < 8
    finally:
        consumer.close()


def test_the_servers_own_time_out_is_no_trouble(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pynet.sources.apiserver.LIFE", (1, 1))
    consumer = Consumer(server)
    try:
        consumer.wait(set())
        watched = len(server.requests)
        wait_for(lambda: len(server.requests) > watched, "the watch is asked for again")
        server.put(service("a"))
        consumer.wait({"a"})
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
    finally:
        consumer.close()


def test_a_bad_object_is_named_and_the_others_arrive(
    server: Server, consumer: Consumer, caplog: pytest.LogCaptureFixture
) -> None:
    server.put(service("a"), service("bad", ports="eighty"), service("b"))
    consumer.wait({"a", "b"})
    assert [r for r in caplog.records if "Service default/bad: spec.ports" in str(getattr(r, "pynet_fields", ""))]


def test_stopping_takes_no_time(server: Server) -> None:
    consumer = Consumer(server)
    consumer.wait(set())
    started = time.monotonic()
    consumer.close()
    assert time.monotonic() - started < 2


def test_endpoints_are_said_to_be_none() -> None:
    with Server() as server:
        stop = threading.Event()
        batches: list[Batch] = []
        source = ApiServer(Transport(Credentials(None, server.url)), KINDS | {"Endpoints"})

        def deliver(batch: Batch) -> None:
            batches.append(batch)
            if frozenset().union(*(b.replaced for b in batches)) == source.kinds:
                stop.set()

        source.run(deliver, stop)


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming list", "paged list"])
@pytest.mark.parametrize("status", [403, 404])
def test_service_cidrs_that_cannot_be_read_count_as_none_until_they_can(
    streaming: bool, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Server() as server:
        error = ApiError(status, "Forbidden" if status == 403 else "NotFound", "no servicecidrs for you")
        lost = server.faults.add(Fault("servicecidrs", times=None, error=error))
        consumer = Consumer(server, streaming=streaming, absent_pause=0.1)
        try:
            consumer.wait(set(), "ServiceCIDR")
            consumer.wait(set())
            wait_for(lambda: lost.met >= 4, "it is asked for again")
            server.faults.clear()
            server.put(service_cidr("kubernetes"))
            consumer.wait({"kubernetes"}, "ServiceCIDR")
            wait_for(lambda: consumer.replaced == KINDS, f"know {consumer.replaced}")
            told = [record for record in caplog.records if record.levelno >= logging.INFO]
            assert [record.getMessage().partition(":")[0] for record in told] == ["resource cannot be read here"]
        finally:
            consumer.close()


def test_a_batch_has_the_last_word_on_each_object() -> None:
    def made(name: str, version: str) -> Object:
        return Service(metadata=Metadata(name=name, namespace="x", resource_version=version))

    a1, a2, b1 = made("a", "1"), made("a", "2"), made("b", "1")
    gone = Ref("Service", "x", "b")
    assert batch_of(
        [("Service", 2.0, [Upsert(a1), Upsert(b1)]), ("Service", 3.0, [Upsert(a2), Delete(gone)])]
    ) == Batch((a2,), (gone,), frozenset(), 2.0)
    assert batch_of([("Service", 1.0, [Replace((a1, b1)), Delete(gone)])]) == Batch(
        (a1,), (), frozenset({"Service"}), 1.0
    )
    assert batch_of([("Service", 1.0, [Delete(gone), Upsert(b1)])]) == Batch((b1,), (), frozenset(), 1.0)
