"""What a v1 Service asks of the proxy: its ports, addresses, policies, settled and checked field by field. Pure.

Knows the object and the annotations of ours; knows no endpoint, no node and no other Service.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

import msgspec

from proxy.plan import Family, ServerKey
from pynet.ipvs import SCHEDULERS
from pynet.objects import BadObject, Service, ServicePort

SCHEDULER_ANNOTATION = "pynet/scheduler"
REMOVAL_ANNOTATION = "pynet/removal"
WEIGHTS_ANNOTATION = "pynet/weights"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"

PROTOCOLS = ("TCP", "UDP", "SCTP")
AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400
MAX_PORTS = 20_000
MAX_ADDRESSES = 1_000
MAX_WEIGHT = 65_535
MAX_NAME = 253
_REMOVAL = re.compile(r"keep|reset|drain:[1-9][0-9]{0,5}")
_SCHEDULERS = ("random", *SCHEDULERS)
_SCHEDULER = re.compile("|".join(_SCHEDULERS))


class ServedPort(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service, in one address family."""

    key: ServerKey
    port: int
    cluster_ip: str = ""
    node_port: int = 0
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()

    @property
    def reachable_from_outside(self) -> bool:
        """Whether it has an address beside its cluster IP (what kube-proxy calls externally accessible)."""
        return bool(self.node_port or self.external_ips or self.load_balancer_ips)


class ServiceFacts(msgspec.Struct, frozen=True, gc=False):
    """What a Service asks for. `source_ranges`: None where everybody may come; `scheduler`: empty: the default one."""

    name: str
    created: str
    ports: dict[Family, tuple[ServedPort, ...]]
    external_local: bool = False
    internal_local: bool = False
    affinity_seconds: int = 0
    source_ranges: dict[Family, tuple[str, ...]] = {}
    health_check_node_port: int = 0
    scheduler: str = ""
    removal: str = "keep"
    weights: tuple[tuple[str, int], ...] = ()
    uid: str = ""


def canonical_address(text: str) -> tuple[Family, str] | None:
    """Return an address in its one usual spelling, and its family; None for what is no address.

    Leading zeros in IPv4 are read as decimal, as the Kubernetes API reads them; an IPv4-mapped address is IPv4.
    """
    try:
        inet_pton(AF_INET, text)
    except (OSError, ValueError):
        pass
    else:
        return Family.V4, text
    try:
        packed = inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        parts = text.split(".")
        if len(parts) == 4 and all(part.isascii() and part.isdigit() and int(part) < 256 for part in parts):
            return Family.V4, ".".join(str(int(part)) for part in parts)
        return None
    if packed.startswith(bytes(10) + b"\xff\xff"):
        return Family.V4, inet_ntop(AF_INET, packed[12:])
    return Family.V6, inet_ntop(AF_INET6, packed)


def canonical_network(text: str) -> tuple[Family, str] | None:
    """Return a network as `address/length` with its host bits cleared, and its family; None for what is none."""
    address, slash, length = text.strip().partition("/")
    found = canonical_address(address)
    if found is None or not slash or not length.isdigit():
        return None
    try:
        return found[0], str(ipaddress.ip_network(f"{found[1]}/{length}", strict=False))
    except ValueError:
        return None


def where(service: Service) -> str:
    """Return what names a Service in a message."""
    return f"Service {service.metadata.namespace}/{service.metadata.name}"


def is_served(service: Service) -> bool:
    """Whether a Service is the proxy's: no headless one, no ExternalName, no other proxy's."""
    spec = service.spec
    if PROXY_NAME_LABEL in (service.metadata.labels or {}) or spec.type == "ExternalName":
        return False
    return spec.cluster_ip not in ("", "None") or any(ip not in ("", "None") for ip in spec.cluster_ips or ())


def facts_of(service: Service) -> ServiceFacts | None:
    """Return what `service` asks for, None where it is not the proxy's. Raise `BadObject` that names the field."""
    _check_size(service)
    if not is_served(service):
        return None
    meta, spec = service.metadata, service.spec
    name = f"{meta.namespace}/{meta.name}"
    external_local = _is_local(service, "externalTrafficPolicy", spec.external_traffic_policy)
    internal_local = _is_local(service, "internalTrafficPolicy", spec.internal_traffic_policy)
    cluster_ips = _cluster_ips(service)
    external_ips = _by_family(service, "spec.externalIPs", spec.external_ips or ())
    balancer_ips = _by_family(service, "status.loadBalancer.ingress", _ingress_ips(service))
    ports: dict[Family, tuple[ServedPort, ...]] = {}
    checked = _checked_ports(service)
    for family, cluster_ip in cluster_ips.items():
        outside = external_ips.get(family, ())
        balanced = balancer_ips.get(family, ())
        ports[family] = tuple(
            ServedPort(
                key=ServerKey(name, port.name, port.protocol),
                port=port.port,
                cluster_ip=cluster_ip,
                node_port=port.node_port,
                external_ips=outside,
                load_balancer_ips=balanced,
            )
            for port in checked
        )
    annotations = meta.annotations or {}
    is_health_checked = spec.type == "LoadBalancer" and external_local
    return ServiceFacts(
        name=name,
        created=meta.creation_timestamp or "",
        ports=ports,
        external_local=external_local,
        internal_local=internal_local,
        affinity_seconds=_affinity(service),
        source_ranges=_source_ranges(service),
        health_check_node_port=_port(service, "spec.healthCheckNodePort", spec.health_check_node_port, 0)
        if is_health_checked
        else 0,
        scheduler=_annotation(
            service, annotations, SCHEDULER_ANNOTATION, _SCHEDULER, f"one of {', '.join(_SCHEDULERS)}"
        ),
        removal=_annotation(service, annotations, REMOVAL_ANNOTATION, _REMOVAL, "keep, reset or drain:SECONDS")
        or "keep",
        weights=_weights(service, annotations.get(WEIGHTS_ANNOTATION, "")),
        uid=meta.uid,
    )


def _check_size(service: Service) -> None:
    spec = service.spec
    if len(service.metadata.name) > MAX_NAME or len(service.metadata.namespace) > MAX_NAME:
        raise BadObject(where(service)[:120] + "…", "metadata.name", f"longer than {MAX_NAME} characters")
    for field, count, limit in (
        ("spec.ports", len(spec.ports or ()), MAX_PORTS),
        ("spec.externalIPs", len(spec.external_ips or ()), MAX_ADDRESSES),
        ("spec.loadBalancerSourceRanges", len(spec.load_balancer_source_ranges or ()), MAX_ADDRESSES),
    ):
        if count > limit:
            raise BadObject(where(service), field, f"{count} entries; at most {limit} are taken")


def _is_local(service: Service, field: str, value: str) -> bool:
    if value not in ("", "Cluster", "Local"):
        raise BadObject(where(service), f"spec.{field}", f"expected Cluster or Local, found {value!r}")
    return value == "Local"


def _cluster_ips(service: Service) -> dict[Family, str]:
    """Return one cluster IP a family: the first of each, whatever ipFamilies says beside it."""
    spec = service.spec
    found: dict[Family, str] = {}
    for index, text in enumerate(spec.cluster_ips or (spec.cluster_ip,)):
        if text in ("", "None"):
            continue
        field = f"spec.clusterIPs[{index}]" if spec.cluster_ips else "spec.clusterIP"
        family, address = _address(service, field, text)
        found.setdefault(family, address)
    return found


def _ingress_ips(service: Service) -> list[str]:
    balancer = service.status.load_balancer if service.status else None
    ingress = (balancer.ingress if balancer else None) or ()
    return [entry.ip for entry in ingress if entry.ip and entry.ip_mode in (None, "", "VIP")]


def _by_family(service: Service, field: str, texts: Iterable[str]) -> dict[Family, tuple[str, ...]]:
    found: dict[Family, dict[str, None]] = {}
    for index, text in enumerate(texts):
        family, address = _address(service, f"{field}[{index}]", text)
        found.setdefault(family, {})[address] = None
    return {family: tuple(addresses) for family, addresses in found.items()}


def _address(service: Service, field: str, text: str) -> tuple[Family, str]:
    found = canonical_address(text)
    if found is None:
        raise BadObject(where(service), field, f"{text[:60]!r} is no IP address")
    parsed = ipaddress.ip_address(found[1])
    if parsed.is_loopback or parsed.is_unspecified or parsed.is_multicast:  # it would take what is not a Service's
        raise BadObject(where(service), field, f"{text[:60]!r} is a loopback, multicast or unspecified address")
    return found


def _checked_ports(service: Service) -> tuple[ServicePort, ...]:
    seen = set()
    for index, port in enumerate(service.spec.ports or ()):
        field = f"spec.ports[{index}]"
        _port(service, f"{field}.port", port.port, 1)
        _port(service, f"{field}.nodePort", port.node_port, 0)
        if port.protocol not in PROTOCOLS:
            raise BadObject(where(service), f"{field}.protocol", f"expected TCP, UDP or SCTP, found {port.protocol!r}")
        if len(port.name) > MAX_NAME:
            raise BadObject(where(service), f"{field}.name", f"longer than {MAX_NAME} characters")
        if (port.name, port.protocol) in seen:
            raise BadObject(where(service), f"{field}.name", f"{port.name!r} is the name of an earlier port as well")
        seen.add((port.name, port.protocol))
    return service.spec.ports or ()


def _port(service: Service, field: str, number: int, least: int) -> int:
    if not least <= number <= 65535:
        raise BadObject(where(service), field, f"expected a port from {least} to 65535, found {number}")
    return number


def _affinity(service: Service) -> int:
    spec = service.spec
    if spec.session_affinity in ("", "None"):
        return 0
    if spec.session_affinity != "ClientIP":
        raise BadObject(
            where(service), "spec.sessionAffinity", f"expected None or ClientIP, found {spec.session_affinity!r}"
        )
    client_ip = spec.session_affinity_config.client_ip if spec.session_affinity_config else None
    seconds = client_ip.timeout_seconds if client_ip else None
    if seconds is None:
        return AFFINITY_SECONDS
    if not 0 < seconds <= MAX_AFFINITY_SECONDS:
        raise BadObject(
            where(service),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            f"expected 1 to {MAX_AFFINITY_SECONDS} seconds, found {seconds}",
        )
    return seconds


def _source_ranges(service: Service) -> dict[Family, tuple[str, ...]]:
    """Return the ranges of each family that is restricted; one that holds everybody restricts nothing."""
    found: dict[Family, dict[str, None]] = {}
    for index, text in enumerate(service.spec.load_balancer_source_ranges or ()):
        network = canonical_network(text)
        if network is None:
            field = f"spec.loadBalancerSourceRanges[{index}]"
            raise BadObject(where(service), field, f"{text[:60]!r} is no network: expected ADDRESS/LENGTH")
        found.setdefault(network[0], {})[network[1]] = None
    return {
        family: tuple(networks)
        for family, networks in found.items()
        if not any(network.endswith("/0") for network in networks)
    }


def _annotation(
    service: Service, annotations: dict[str, str], name: str, allowed: re.Pattern[str], expected: str
) -> str:
    value = annotations.get(name, "").strip()
    if value and not allowed.fullmatch(value):
        raise BadObject(where(service), f"metadata.annotations[{name}]", f"expected {expected}, found {value[:60]!r}")
    return value


def _weights(service: Service, text: str) -> tuple[tuple[str, int], ...]:
    """Return `address or node name → weight` from `10.244.1.5=3,worker-2=1`."""
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = entry.rpartition("=")
        if not equals or not name or not number.isdigit() or not 1 <= int(number) <= MAX_WEIGHT:
            raise BadObject(
                where(service),
                f"metadata.annotations[{WEIGHTS_ANNOTATION}]",
                f"expected ADDRESS=WEIGHT or NODE=WEIGHT (1 to {MAX_WEIGHT}), found {entry[:60]!r}",
            )
        address = canonical_address(name)
        found.append((address[1] if address else name, int(number)))
    return tuple(found)
