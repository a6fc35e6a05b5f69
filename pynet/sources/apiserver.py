"""The Kubernetes API server as a source: one list and watch for each kind, their changes merged into batches.

Wiring only: `reflector` decides what to ask and what an answer means, `transport` carries it. Here are the threads,
the waiting, and what is told to the log.
"""

from __future__ import annotations

import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from pynet.daemon import logs
from pynet.objects import BadObject, Object, Ref, ref_of
from pynet.sources import Batch
from pynet.sources.reflector import PAGE, Broken, Change, Delete, List, Reflector, Relist, Replace, Upsert, Watch
from pynet.sources.transport import Refused, Silent, Transport, Unreachable

log = logs.get(__name__)
IDLE = 75.0  # seconds of silence after which a watch is asked for again; bookmarks come every 60
INITIAL_IDLE = 5.0  # the same within a streaming list: a server that knows none says nothing at its end
LIFE = (300, 600)  # seconds that a watch lives, at random, so that a fleet does not return at once
BACKOFF = (0.5, 30.0)  # first and longest pause between failures, seconds; ±50 % at random
LONGEST_ASKED = 120.0  # seconds that we wait at most where a server, or whoever answers for it, asks for more
ABSENT_PAUSE = 300.0  # seconds until a resource that may be missing is asked for again
_ABSENT = (403, 404)  # as a server answers that does not let a resource be read, or does not have it
_STOP_WAIT = 2.0
_TOLD = 5  # different reasons that are logged of one interruption; all others only at level debug
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")


class Resource(msgspec.Struct, frozen=True):
    """Where a kind is served, and which of its objects matter to us (kube-proxy's own selectors).

    `optional`: a server that has none, or does not let us read it, is as good as one that has no object of it.
    """

    path: str
    labels: str = ""
    fields: str = ""
    optional: bool = False


RESOURCES = {
    "Service": Resource("/api/v1/services", "!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None"),
    "EndpointSlice": Resource("/apis/discovery.k8s.io/v1/endpointslices", "!service.kubernetes.io/headless"),
    "Node": Resource("/api/v1/nodes"),
    # since Kubernetes 1.33
    "ServiceCIDR": Resource("/apis/networking.k8s.io/v1/servicecidrs", optional=True),
}
# v1 Endpoints are not read from a cluster: its controller mirrors them into EndpointSlices.
_NEVER_SERVED = frozenset({"Endpoints"})


class Outcome(msgspec.Struct, frozen=True):
    """How one exchange with the server went.

    `problem`: what went wrong, or "". `fruitful`: it brought something. `barren`: it ended well, at once and without a
    word. `wait`: seconds that the server asks for. `fields_unknown`: it does not know the field selector. `absent`: why
    an optional resource cannot be read.
    """

    problem: str = ""
    fruitful: bool = False
    barren: bool = False
    wait: float = 0.0
    fields_unknown: bool = False
    absent: str = ""


class ApiServer:
    """A `Source`: Services, EndpointSlices, Nodes and ServiceCIDRs of a cluster."""

    def __init__(
        self,
        transport: Transport,
        kinds: frozenset[str],
        *,
        node: str | None = None,
        resources: Mapping[str, Resource] = RESOURCES,
        idle: float = IDLE,
        backoff: tuple[float, float] = BACKOFF,
        streaming: bool = True,
        page: int = PAGE,
        absent_pause: float = ABSENT_PAUSE,
    ) -> None:
        """`node`: of the kind Node, only this one. `streaming`: ask for streaming lists before paged ones."""
        self.kinds = kinds
        self._transport = transport
        self._idle = idle
        self._backoff = backoff
        self._streaming = streaming
        self._page = page
        self._absent_pause = absent_pause
        self._resources = {kind: resources[kind] for kind in sorted(kinds - _NEVER_SERVED)}
        if node is not None and "Node" in self._resources:
            self._resources["Node"] = Resource(resources["Node"].path, fields=f"metadata.name={node}")
        self._queue: queue.SimpleQueue[tuple[str, float, list[Change]]] = queue.SimpleQueue()

    def run(self, deliver: Callable[[Batch], None], stop: threading.Event) -> None:
        """Deliver batches from this thread until `stop` is set."""
        absent = self.kinds & _NEVER_SERVED
        if absent:
            deliver(Batch(replaced=absent, received=time.monotonic()))
        workers = [
            threading.Thread(target=self._follow, args=(kind, resource, stop), name=f"watch {kind}", daemon=True)
            for kind, resource in self._resources.items()
        ]
        for worker in workers:
            worker.start()
        while not stop.is_set():
            try:
                heard = [self._queue.get(timeout=0.5)]
            except queue.Empty:
                continue
            while not self._queue.empty():
                heard.append(self._queue.get())
            deliver(batch_of(heard))
        self._transport.close()
        deadline = time.monotonic() + _STOP_WAIT
        for worker in workers:
            worker.join(max(deadline - time.monotonic(), 0))

    def _follow(self, kind: str, resource: Resource, stop: threading.Event) -> None:
        """List and watch one kind until `stop` is set, whatever the server does."""
        reflector = Reflector(kind, streaming=self._streaming, page=self._page)
        failures = relists = 0
        is_absent = False
        told: set[str] = set()
        while not stop.is_set():
            following = not reflector.listing
            outcome = self._exchange(reflector, resource, stop)
            if stop.is_set():
                return
            if outcome.fields_unknown and resource.fields:
                resource = Resource(resource.path, resource.labels)  # an older server; the objects say it as well
            if outcome.absent:
                level = logging.DEBUG if is_absent else logging.INFO
                reason = logs.fields(kind=kind, reason=outcome.absent)
                log.log(level, "resource cannot be read here: going on as if there were none", extra=reason)
                is_absent = True
                stop.wait(self._absent_pause * random.uniform(0.5, 1.5))
                continue
            is_absent = is_absent and reflector.listing
            lost = following and reflector.listing  # the server answers, but our version is of no more use to it
            failures = failures + 1 if (outcome.problem or outcome.barren) and not (lost or outcome.fruitful) else 0
            if lost:
                relists += 1
            elif following and outcome.fruitful:
                relists = 0
            if outcome.problem:
                alike = _NUMBERS.sub("#", outcome.problem)
                level = logging.DEBUG if alike in told or len(told) >= _TOLD else logging.WARNING
                log.log(level, "watch interrupted; going on", extra=logs.fields(kind=kind, reason=outcome.problem))
                told.add(alike)
            elif told and outcome.fruitful and not reflector.listing:
                log.info("watch goes on", extra=logs.fields(kind=kind, version=reflector.version))
                told.clear()
            if failures or lost:
                stop.wait(max(self._pause(max(failures, relists)), min(outcome.wait, LONGEST_ASKED)))

    def _pause(self, attempt: int) -> float:
        """Return how long to wait after so many failures in a row, seconds."""
        first, longest = self._backoff
        return float(min(first * 2 ** min(attempt - 1, 16), longest) * random.uniform(0.5, 1.5))

    def _exchange(self, reflector: Reflector, resource: Resource, stop: threading.Event) -> Outcome:
        """Ask once and take in the answer."""
        request = reflector.request()
        query = query_of(request, resource)
        started = time.monotonic()
        fruitful = False
        try:
            if isinstance(request, List):
                changes = reflector.page(self._transport.get(resource.path, query))
                problem, wait = self._take(reflector.kind, changes, started)
                return Outcome(problem, fruitful=not problem, wait=wait)
            initial = request.initial
            idle = INITIAL_IDLE if initial else self._idle
            with self._transport.watch(resource.path, query, idle) as stream:
                for data in stream:
                    changes = reflector.feed(data)
                    fruitful = True
                    if initial and not reflector.listing:
                        initial = False
                        stream.allow_silence(self._idle)
                    problem, wait = self._take(reflector.kind, changes, time.monotonic())
                    if problem or stop.is_set():
                        return Outcome(problem, fruitful=fruitful and not problem, wait=wait)
            if initial:
                return Outcome(self._take(reflector.kind, reflector.interrupted("it ended early"), started)[0])
            return Outcome(fruitful=fruitful, barren=not fruitful and time.monotonic() - started < 1)
        except Refused as error:
            if error.status.code == 400 and resource.fields and "field label" in error.status.message:
                return Outcome(str(error), fields_unknown=True)
            if resource.optional and reflector.listing and error.status.code in _ABSENT:
                self._take(reflector.kind, reflector.absent(), started)
                return Outcome(absent=str(error))
            self._take(reflector.kind, reflector.refused(error.status), started)
            if isinstance(request, Watch) and request.initial and not reflector.streaming:
                log.debug("no streaming lists here", extra=logs.fields(kind=reflector.kind, reason=error))
                return Outcome()  # as servers before 1.32 answer, and those that were told to
            return Outcome(str(error), wait=error.retry_after)
        except Silent as error:
            if isinstance(request, Watch) and not reflector.listing:
                return Outcome(fruitful=True)  # a dead connection or a quiet server: ask again, from where we are
            self._take(reflector.kind, reflector.interrupted("no end of the initial events", silent=True), started)
            return Outcome(str(error))
        except Unreachable as error:
            self._take(reflector.kind, reflector.interrupted(str(error)), started)
            return Outcome(str(error), fruitful=fruitful and not reflector.listing)
        except Exception as error:
            log.exception("watch failed; going on", extra=logs.fields(kind=reflector.kind))
            return Outcome(f"{type(error).__name__}: {error}")

    def _take(self, kind: str, changes: list[Change], received: float) -> tuple[str, float]:
        """Hand changes on; return why their answer cannot be followed further, or "", and how long to wait then."""
        problem, wait = "", 0.0
        told: list[Change] = []
        for change in changes:
            if isinstance(change, BadObject):
                log.error("object cannot be read; its last good form stays", extra=logs.fields(reason=change))
            elif isinstance(change, Relist | Broken):
                problem = change.reason
                wait = change.wait if isinstance(change, Broken) else 0.0
            else:
                told.append(change)
        if told:
            self._queue.put((kind, received, told))
        return problem, wait


def query_of(request: List | Watch, resource: Resource) -> dict[str, str]:
    """Return the query parameters of a request."""
    query: dict[str, str] = {}
    if resource.labels:
        query["labelSelector"] = resource.labels
    if resource.fields:
        query["fieldSelector"] = resource.fields
    if isinstance(request, List):
        if request.limit:
            query["limit"] = str(request.limit)
        if request.token:
            query["continue"] = request.token
        return query
    query |= {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(random.randint(*LIFE))}
    if request.initial:
        query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    query["resourceVersion"] = request.version
    return query


def batch_of(heard: Iterable[tuple[str, float, list[Change]]]) -> Batch:
    """Return what was heard, oldest first, as one batch: of each object the last word."""
    upserts: dict[Ref, Object] = {}
    deletes: dict[Ref, None] = {}
    replaced: set[str] = set()
    since = float("inf")
    for kind, received, changes in heard:
        since = min(since, received)
        for change in changes:
            if isinstance(change, Replace):
                replaced.add(kind)
                upserts.update((ref_of(obj), obj) for obj in change.objects)
            elif isinstance(change, Upsert):
                ref = ref_of(change.object)
                upserts[ref] = change.object
                deletes.pop(ref, None)
            elif isinstance(change, Delete):
                upserts.pop(change.ref, None)
                if change.ref.kind not in replaced:
                    deletes[change.ref] = None
    return Batch(tuple(upserts.values()), tuple(deletes), frozenset(replaced), since)
