"""The Kubernetes objects that pynet reads, as frozen structs: only the fields in use, with the API's own defaults.

Pure: knows JSON shapes, knows no file, socket or kernel. Field names follow the API (`spec.clusterIPs` is
`service.spec.cluster_ips`). A value that the API would refuse is refused here too, with the object and the field named
(`BadObject`); what the API leaves open is left open. Reference: Kubernetes API v1, discovery.k8s.io/v1,
networking.k8s.io/v1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

Protocol = Literal["TCP", "UDP", "SCTP"]


class BadObject(ValueError):
    """What cannot be read. `where`: origin, kind, name; `field`: the place in it; `ref`: its name if known."""

    def __init__(self, where: str, field: str, reason: str, ref: Ref | None = None) -> None:
        super().__init__(f"{where}: {field}: {reason}" if field else f"{where}: {reason}")
        self.where = where
        self.field = field
        self.reason = reason
        self.ref = ref


class _Api(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, rename="camel"):
    """Base of all API structs: immutable, compared by value, unknown fields ignored as the API's clients do."""


class OwnerReference(_Api, frozen=True, gc=False):
    """Who made an object."""

    kind: str = ""
    name: str = ""


class Metadata(_Api, frozen=True, gc=False):
    """ObjectMeta."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class ServicePort(_Api, frozen=True, gc=False):
    """One entry of Service.spec.ports. `target_port` is resolved by the EndpointSlice controller, never here."""

    port: int
    name: str = ""
    protocol: str = "TCP"
    node_port: int = 0
    target_port: int | str | None = None
    app_protocol: str | None = None


class ClientIPConfig(_Api, frozen=True, gc=False):
    """Session affinity's only option; seconds."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(_Api, frozen=True, gc=False):
    """Service.spec.sessionAffinityConfig."""

    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(_Api, frozen=True, gc=False):
    """Service.spec."""

    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: tuple[str, ...] | None = msgspec.field(name="clusterIPs", default=None)
    ip_families: tuple[str, ...] | None = None
    ip_family_policy: str | None = None
    ports: tuple[ServicePort, ...] | None = None
    selector: dict[str, str] | None = None
    external_ips: tuple[str, ...] | None = msgspec.field(name="externalIPs", default=None)
    load_balancer_source_ranges: tuple[str, ...] | None = None
    load_balancer_class: str | None = None
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    external_traffic_policy: str = "Cluster"
    internal_traffic_policy: str = "Cluster"
    health_check_node_port: int = 0
    publish_not_ready_addresses: bool = False
    traffic_distribution: str | None = None


class Ingress(_Api, frozen=True, gc=False):
    """One entry of Service.status.loadBalancer.ingress."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str | None = msgspec.field(name="ipMode", default=None)


class LoadBalancerStatus(_Api, frozen=True, gc=False):
    """Service.status.loadBalancer."""

    ingress: tuple[Ingress, ...] | None = None


class ServiceStatus(_Api, frozen=True, gc=False):
    """Service.status."""

    load_balancer: LoadBalancerStatus | None = None


class Service(_Api, frozen=True, gc=False, tag_field="kind", tag="Service"):
    """v1 Service."""

    metadata: Metadata = Metadata()
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus | None = None


class EndpointConditions(_Api, frozen=True, gc=False):
    """discovery.k8s.io/v1 EndpointConditions; None has the meaning that `SliceEndpoint`'s properties give it."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(_Api, frozen=True, gc=False):
    """A zone (or a node) for which an endpoint is meant."""

    name: str = ""


class EndpointHints(_Api, frozen=True, gc=False):
    """discovery.k8s.io/v1 EndpointHints."""

    for_zones: tuple[ForZone, ...] | None = None
    for_nodes: tuple[ForZone, ...] | None = None


class SliceEndpoint(_Api, frozen=True, gc=False):
    """One endpoint of an EndpointSlice. Only `addresses[0]` carries traffic."""

    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None

    @property
    def ready(self) -> bool:
        """Ready: absent means true."""
        return self.conditions is None or self.conditions.ready is None or self.conditions.ready

    @property
    def serving(self) -> bool:
        """Serving: absent means true (as kube-proxy takes it, also beside `ready: false`)."""
        return self.conditions is None or self.conditions.serving is None or self.conditions.serving

    @property
    def terminating(self) -> bool:
        """Terminating: absent means false."""
        return self.conditions is not None and bool(self.conditions.terminating)


class SlicePort(_Api, frozen=True, gc=False):
    """One port of an EndpointSlice; no name or no number: not for a proxy."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None
    app_protocol: str | None = None


class EndpointSlice(_Api, frozen=True, gc=False, tag_field="kind", tag="EndpointSlice"):
    """discovery.k8s.io/v1 EndpointSlice."""

    metadata: Metadata = Metadata()
    address_type: str = ""
    endpoints: tuple[SliceEndpoint, ...] | None = None
    ports: tuple[SlicePort, ...] | None = None


class EndpointAddress(_Api, frozen=True, gc=False):
    """An address of v1 Endpoints."""

    ip: str = ""
    node_name: str | None = None


class EndpointPort(_Api, frozen=True, gc=False):
    """A port of v1 Endpoints."""

    port: int
    name: str = ""
    protocol: str = "TCP"


class EndpointSubset(_Api, frozen=True, gc=False):
    """A subset of v1 Endpoints: every address serves every port."""

    addresses: tuple[EndpointAddress, ...] | None = None
    not_ready_addresses: tuple[EndpointAddress, ...] | None = None
    ports: tuple[EndpointPort, ...] | None = None


class Endpoints(_Api, frozen=True, gc=False, tag_field="kind", tag="Endpoints"):
    """v1 Endpoints: read only where a Service has no EndpointSlice."""

    metadata: Metadata = Metadata()
    subsets: tuple[EndpointSubset, ...] | None = None


class Taint(_Api, frozen=True, gc=False):
    """A taint of a Node."""

    key: str = ""
    effect: str = ""


class NodeSpec(_Api, frozen=True, gc=False):
    """Node.spec."""

    pod_cidr: str = msgspec.field(name="podCIDR", default="")
    pod_cidrs: tuple[str, ...] | None = msgspec.field(name="podCIDRs", default=None)
    taints: tuple[Taint, ...] | None = None


class NodeAddress(_Api, frozen=True, gc=False):
    """One of Node.status.addresses."""

    type: str = ""
    address: str = ""


class NodeStatus(_Api, frozen=True, gc=False):
    """Node.status."""

    addresses: tuple[NodeAddress, ...] | None = None


class Node(_Api, frozen=True, gc=False, tag_field="kind", tag="Node"):
    """v1 Node."""

    metadata: Metadata = Metadata()
    spec: NodeSpec = NodeSpec()
    status: NodeStatus | None = None


class ServiceCIDRSpec(_Api, frozen=True, gc=False):
    """ServiceCIDR.spec: networks that cluster IPs are taken from."""

    cidrs: tuple[str, ...] | None = None


class ServiceCIDR(_Api, frozen=True, gc=False, tag_field="kind", tag="ServiceCIDR"):
    """networking.k8s.io/v1 ServiceCIDR."""

    metadata: Metadata = Metadata()
    spec: ServiceCIDRSpec = ServiceCIDRSpec()


Object = Service | EndpointSlice | Endpoints | Node | ServiceCIDR
KINDS: dict[str, type[Service] | type[EndpointSlice] | type[Endpoints] | type[Node] | type[ServiceCIDR]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Endpoints": Endpoints,
    "Node": Node,
    "ServiceCIDR": ServiceCIDR,
}
API_VERSIONS = {
    "Service": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "Endpoints": "v1",
    "Node": "v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
CLUSTER_SCOPED = frozenset({"Node", "ServiceCIDR"})


class Ref(msgspec.Struct, frozen=True, order=True):
    """What names an object within a source."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


def ref_of(obj: Object) -> Ref:
    """Return the name of `obj` within its source."""
    return Ref(type(obj).__name__, obj.metadata.namespace, obj.metadata.name)


def objects_of(document: Any, origin: str) -> Iterator[Object | BadObject]:
    """Yield what a decoded document holds: objects of the kinds in use, and a `BadObject` for each bad one.

    A `List` (or any `…List`) is walked; kinds not in use are passed over. Namespaced kinds without a namespace are in
    `default`, as `kubectl apply` would put them.
    """
    if document is None:
        return
    if not isinstance(document, Mapping):
        yield BadObject(origin, "", f"expected an object with apiVersion and kind, found {type(document).__name__}")
        return
    kind = document.get("kind")
    if not isinstance(kind, str) or not kind:
        yield BadObject(origin, "kind", "missing: every object needs apiVersion and kind")
        return
    if kind.endswith("List"):
        items = document.get("items")
        if not isinstance(items, list):
            yield BadObject(f"{origin}: {kind}", "items", "expected a list")
            return
        item_kind = kind[: -len("List")]
        for index, item in enumerate(items):
            if item_kind and isinstance(item, Mapping) and "kind" not in item:
                item = {"apiVersion": document.get("apiVersion", ""), **item, "kind": item_kind}
            yield from objects_of(item, f"{origin}: items[{index}]")
        return
    if kind in KINDS:
        try:
            yield decode(document, origin)
        except BadObject as bad:
            yield bad


def decode(document: Mapping[str, Any], origin: str) -> Object:
    """Return one object of a kind in use; raise `BadObject` that names the object and the field."""
    kind = str(document["kind"])
    raw = document.get("metadata")
    named: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    where = f"{origin}: {kind} {named.get('namespace') or ''}/{named.get('name') or ''}".replace(" /", " ")
    name = named.get("name")
    if not isinstance(name, str) or not name:
        raise BadObject(where, "metadata.name", "missing")
    namespace = "" if kind in CLUSTER_SCOPED else named.get("namespace") or "default"
    ref = Ref(kind, str(namespace), name)
    if document.get("apiVersion") != API_VERSIONS[kind]:
        expected = API_VERSIONS[kind]
        raise BadObject(where, "apiVersion", f"expected {expected}, found {document.get('apiVersion')!r}", ref)
    document = {**document, "metadata": {**named, "namespace": namespace}}
    try:
        return msgspec.convert(document, KINDS[kind], strict=True)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise BadObject(where, path.rstrip("`").lstrip("."), reason, ref) from None
