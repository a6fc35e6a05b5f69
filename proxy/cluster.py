"""What is known of the cluster: Services, slices and the own Node, read from batches and indexed by Service. Pure.

Objects are checked as they come in; a bad one is reported and changes nothing: what was known of it before stands.
Knows no plan; says which Services a batch touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from proxy.cidrs import networks_of
from proxy.endpoints import SliceFacts, facts_of_endpoints, facts_of_slice
from proxy.services import ServiceFacts, facts_of
from pynet.objects import (
    BadObject,
    Endpoints,
    EndpointSlice,
    Metadata,
    Node,
    Object,
    Ref,
    Service,
    ServiceCIDR,
    ref_of,
)
from pynet.sources import Batch

KINDS = frozenset({"Service", "EndpointSlice", "Endpoints", "Node", "ServiceCIDR"})
SNAPSHOT = 1
_Facts = TypeVar("_Facts")


class Touched(msgspec.Struct, frozen=True):
    """What a batch changed: Services by name, and the objects that could not be read.

    `around`: what holds for all Services changed: the own Node, or the ServiceCIDRs.
    """

    services: frozenset[str] = frozenset()
    around: bool = False
    bad: tuple[tuple[BadObject, Object], ...] = ()
    triggers: tuple[tuple[str, str], ...] = ()


class Cluster:
    """The cluster as this node's proxy knows it."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._services: dict[str, ServiceFacts] = {}
        self._slices: dict[str, dict[str, SliceFacts]] = {}
        self._owner: dict[str, str] = {}
        self._endpoints: dict[str, tuple[SliceFacts, ...]] = {}
        self._cidrs: dict[str, tuple[str, ...]] = {}
        self.node: Node | None = None

    @property
    def services(self) -> dict[str, ServiceFacts]:
        """All Services that are ours to serve, by namespace/name; not to be changed."""
        return self._services

    @property
    def service_cidrs(self) -> frozenset[str]:
        """The networks of all ServiceCIDRs, of both families."""
        return frozenset(network for networks in self._cidrs.values() for network in networks)

    def slices(self, service: str) -> Iterable[SliceFacts]:
        """Return what is known of a Service's endpoints: its slices, or its Endpoints where it has no slice."""
        pieces = self._slices.get(service)
        return pieces.values() if pieces else self._endpoints.get(service, ())

    def told_of(self, service: str) -> Service:
        """Return a Service, by namespace/name, as far as an Event on it needs it: its names and uid."""
        namespace, _, name = service.partition("/")
        known = self._services.get(service)
        return Service(metadata=Metadata(name=name, namespace=namespace, uid=known.uid if known else ""))

    def snapshot(self) -> bytes:
        """Return all that is known, for `restore`."""
        pieces = {name: self._slices[owner][name] for name, owner in self._owner.items() if name in self._slices[owner]}
        return _ENCODER.encode(_State(SNAPSHOT, self._services, pieces, self._endpoints, self.node, self._cidrs))

    def restore(self, state: bytes) -> bool:
        """Begin with what an earlier `snapshot` knew; return whether it could be read. Only on an empty cluster."""
        try:
            known = _DECODER.decode(state)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return False
        if known.version != SNAPSHOT:
            return False
        self._services, self._endpoints = known.services, known.endpoints
        self._cidrs = known.cidrs
        if known.node and known.node.metadata.name == self._node_name:  # else the file came with an image or a copy
            self.node = known.node
        touched: set[str] = set()
        for name, piece in known.slices.items():
            self._put_slice(name, piece, touched)
        return True

    def apply(self, batch: Batch) -> Touched:
        """Take a batch in and return what it touched."""
        touched: set[str] = set()
        bad: list[tuple[BadObject, Object]] = []
        triggers: list[tuple[str, str]] = []
        around_before = self.node, self.service_cidrs
        deletes = [*batch.deletes, *self._absent(batch)]
        for ref in deletes:
            self._delete(ref, touched)
        for obj in batch.upserts:
            try:
                self._upsert(obj, touched, triggers)
            except BadObject as error:
                bad.append((error, obj))
        around = (self.node, self.service_cidrs) != around_before
        return Touched(frozenset(touched), around, tuple(bad), tuple(triggers))

    def _absent(self, batch: Batch) -> Iterable[Ref]:
        """Return what a replacing batch no longer names."""
        known: dict[str, Callable[[], Iterable[str]]] = {
            "Service": lambda: self._services,
            "EndpointSlice": lambda: self._owner,
            "Endpoints": lambda: self._endpoints,
            "Node": lambda: [self.node.metadata.name] if self.node else [],
            "ServiceCIDR": lambda: self._cidrs,
        }
        present = {ref_of(obj) for obj in batch.upserts} if batch.replaced else set()
        for kind in batch.replaced & known.keys():
            for name in known[kind]():
                namespace, _, short = name.rpartition("/")
                ref = Ref(kind, namespace, short)
                if ref not in present:
                    yield ref

    def _delete(self, ref: Ref, touched: set[str]) -> None:
        name = f"{ref.namespace}/{ref.name}"
        if ref.kind == "Service":
            if self._services.pop(name, None):
                touched.add(name)
        elif ref.kind == "EndpointSlice":
            self._put_slice(name, None, touched)
        elif ref.kind == "Endpoints":
            if self._endpoints.pop(name, None):
                touched.add(name)
        elif ref.kind == "Node" and self.node and ref.name == self.node.metadata.name:
            self.node = None
        elif ref.kind == "ServiceCIDR":
            self._cidrs.pop(ref.name, None)

    def _upsert(self, obj: Object, touched: set[str], triggers: list[tuple[str, str]]) -> None:
        name = f"{obj.metadata.namespace}/{obj.metadata.name}"
        if isinstance(obj, Service):
            if _put(self._services, name, facts_of(obj)):
                touched.add(name)
        elif isinstance(obj, EndpointSlice):
            piece = facts_of_slice(obj)
            if self._put_slice(name, piece, touched) and piece and piece.triggered:
                triggers.append((piece.service, piece.triggered))
        elif isinstance(obj, Endpoints):
            if _put(self._endpoints, name, facts_of_endpoints(obj) or None):
                touched.add(name)
        elif isinstance(obj, Node) and obj.metadata.name == self._node_name:
            self.node = obj
        elif isinstance(obj, ServiceCIDR):
            self._cidrs[obj.metadata.name] = networks_of(obj)

    def _put_slice(self, name: str, piece: SliceFacts | None, touched: set[str]) -> bool:
        """Keep, replace or forget a slice; it may have moved from one Service to another. Return whether it changed."""
        before = self._owner.get(name)
        known = self._slices.get(before, {}).get(name) if before is not None else None
        if known == piece:
            return False
        if before is not None:
            self._slices[before].pop(name)
            if not self._slices[before]:
                del self._slices[before]
            del self._owner[name]
            touched.add(before)
        if piece is not None:
            self._slices.setdefault(piece.service, {})[name] = piece
            self._owner[name] = piece.service
            touched.add(piece.service)
        return True


class _State(msgspec.Struct, frozen=True):
    """What a snapshot holds. `version` changes with the shape of anything in it, but for a field that may be absent."""

    version: int
    services: dict[str, ServiceFacts]
    slices: dict[str, SliceFacts]
    endpoints: dict[str, tuple[SliceFacts, ...]]
    node: Node | None
    cidrs: dict[str, tuple[str, ...]] = {}


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_State)


def _put(table: dict[str, _Facts], name: str, facts: _Facts | None) -> bool:
    """Keep `facts`, or forget what was known where there are none; return whether that changed anything."""
    if table.get(name) == facts:
        return False
    if facts is None:
        del table[name]
    else:
        table[name] = facts
    return True
