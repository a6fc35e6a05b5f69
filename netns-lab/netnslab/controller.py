"""The cluster's own controllers, as far as a lab needs them: what an API server fills in, and EndpointSlices. Pure.

Facts: Kubernetes API v1, discovery.k8s.io/v1, and what kube-controller-manager's endpointslice controller writes:
named target ports resolved per pod, readiness, node names, zones, one set of slices per address family, a slice per
set of port numbers, at most 100 endpoints a slice, the last-change-trigger-time annotation.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from apiserver.allocation import Allocator, admitted
from apiserver.errors import ApiError
from pynet.objects import CLUSTER_SCOPED

from .state import PodRecord

Manifest = dict[str, Any]
SLICE_LIMIT = 100  # endpoints
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
SERVICE_NAME = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
CONTROLLER = "pynet-lab"
HEADLESS = "service.kubernetes.io/headless"
ZONE = "topology.kubernetes.io/zone"


class BadManifest(ValueError):
    """An object that the API would refuse; the message names the object and the field."""


def identity(manifest: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return kind, namespace and name."""
    metadata = manifest.get("metadata") or {}
    namespace = "" if manifest["kind"] in CLUSTER_SCOPED else metadata.get("namespace") or "default"
    return str(manifest["kind"]), namespace, str(metadata.get("name", ""))


def service_defaults(
    service: Manifest,
    existing: Mapping[str, Any] | None,
    others: Sequence[Mapping[str, Any]],
    ranges: Mapping[str, Mapping[str, str]],
    families: Sequence[str],
) -> Manifest:
    """Return a Service as the API server stores it. What is allocated starts from its name, so it stays the same.

    `existing`: the same Service as it is now, whose allocations stay; `others`: all other Services; `ranges`:
    networks by kind (`services`, `load-balancers`) and family; `families`: those of the cluster.
    """
    name = "/".join(identity(service)[1:])
    known = dict(existing) if existing else None
    allocator = Allocator([ranges["services"][family] for family in families], seed=zlib.crc32(name.encode()))
    try:
        result = admitted(dict(service), known, [dict(other) for other in others], allocator)
    except ApiError as error:
        raise BadManifest(error.message) from None
    if result["spec"]["type"] == "LoadBalancer" and not service.get("status"):
        had = ((known or {}).get("status") or {}).get("loadBalancer")
        result["status"] = {"loadBalancer": had} if had else _load_balancer(result["spec"], others, ranges)
    return result


def _free(network: str, key: str, taken: Collection[str]) -> str:
    """Return an address of `network` not in `taken`: where a search starts is told by `key`, so it stays the same."""
    whole = ipaddress.ip_network(network)
    size = min(whole.num_addresses, 1 << 16) - 2
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % size
    for step in range(size):
        address = str(whole[1 + (start + step) % size])
        if address not in taken:
            return address
    raise BadManifest(f"no address left in {network}")


def _load_balancer(
    spec: Mapping[str, Any], others: Sequence[Mapping[str, Any]], ranges: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    pool = ranges.get("load-balancers") or {}
    taken = {
        ingress.get("ip")
        for other in others
        for ingress in ((other.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    }
    key = f"{spec['clusterIP']}"
    found = [_free(pool[family], key, taken) for family in spec["ipFamilies"] if family in pool]
    return {"loadBalancer": {"ingress": [{"ip": address, "ipMode": "VIP"} for address in found]}}


def family_of(address: str) -> str:
    """Return the family of an address, as the API names it."""
    return "IPv6" if ":" in address else "IPv4"


def selected(service: Mapping[str, Any], pods: Sequence[PodRecord]) -> list[PodRecord]:
    """Return the pods that a Service's selector chooses; a Service without a selector chooses none."""
    _, namespace, _ = identity(service)
    selector = (service.get("spec") or {}).get("selector") or {}
    if not selector:
        return []
    return [pod for pod in pods if pod.namespace == namespace and selector.items() <= pod.labels.items()]


def _numbers(service: Mapping[str, Any], pod: PodRecord) -> tuple[int, ...]:
    """Return a Service's target ports as numbers on this pod; 0 where the pod has no port of that name."""
    found = []
    for port in service["spec"]["ports"]:
        target = port.get("targetPort") or port["port"]
        if isinstance(target, str):
            named = (
                each.port for each in pod.ports if each.name == target and each.protocol.upper() == port["protocol"]
            )
            target = next(named, 0)
        found.append(int(target))
    return tuple(found)


def slices_of(
    service: Mapping[str, Any], pods: Sequence[PodRecord], zones: Mapping[str, str], changed: str
) -> list[Manifest]:
    """Return a Service's EndpointSlices. `zones`: zone by node; `changed`: the time of the change (RFC 3339)."""
    spec = service.get("spec") or {}
    if not spec.get("selector") or spec.get("type") == "ExternalName":
        return []
    chosen = sorted(
        (pod for pod in selected(service, pods) if pod.addresses), key=lambda pod: (pod.namespace, pod.name)
    )
    made = []
    for family in spec["ipFamilies"]:
        groups: dict[tuple[int, ...], list[PodRecord]] = {}
        for pod in chosen:
            if family in pod.addresses:
                groups.setdefault(_numbers(service, pod), []).append(pod)
        for numbers, members in sorted(groups.items()) or [((), [])]:
            for start in range(0, max(1, len(members)), SLICE_LIMIT):
                part = members[start : start + SLICE_LIMIT]
                made.append(_slice(service, family, numbers, part, zones, changed, start // SLICE_LIMIT))
    return made


def _slice(
    service: Mapping[str, Any],
    family: str,
    numbers: tuple[int, ...],
    members: Sequence[PodRecord],
    zones: Mapping[str, str],
    changed: str,
    index: int,
) -> Manifest:
    _, namespace, name = identity(service)
    spec = service["spec"]
    digest = hashlib.sha256(f"{family}/{numbers}/{index}".encode()).hexdigest()[:5]
    labels = {SERVICE_NAME: name, MANAGED_BY: CONTROLLER}
    if spec.get("clusterIP") == "None":
        labels[HEADLESS] = ""
    ports = [
        {"name": port.get("name", ""), "protocol": port["protocol"], "port": number}
        for port, number in zip(spec["ports"], numbers, strict=False)
        if number
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{digest}",
            "namespace": namespace,
            "labels": labels,
            "annotations": {TRIGGER_TIME: changed},
        },
        "addressType": family,
        "endpoints": [_endpoint(spec, pod, family, zones) for pod in members],
        "ports": ports,
    }


def _endpoint(spec: Mapping[str, Any], pod: PodRecord, family: str, zones: Mapping[str, str]) -> dict[str, Any]:
    published = bool(spec.get("publishNotReadyAddresses"))
    endpoint: dict[str, Any] = {
        "addresses": [pod.addresses[family]],
        "conditions": {
            "ready": published or (pod.ready and not pod.terminating),
            "serving": published or pod.ready,
            "terminating": pod.terminating,
        },
        "nodeName": pod.node,
        "zone": zones.get(pod.node, ""),
        "targetRef": {"kind": "Pod", "namespace": pod.namespace, "name": pod.name},
    }
    distribution = spec.get("trafficDistribution")
    if distribution in ("PreferClose", "PreferSameZone") and zones.get(pod.node):
        endpoint["hints"] = {"forZones": [{"name": zones[pod.node]}]}
    elif distribution == "PreferSameNode":
        endpoint["hints"] = {
            "forNodes": [{"name": pod.node}],
            "forZones": [{"name": zones.get(pod.node, "")}],
        }
    return endpoint


def same_but_for_time(left: Mapping[str, Any] | None, right: Mapping[str, Any]) -> bool:
    """Return whether two slices differ in nothing but their trigger time: then the old one stays."""
    if left is None:
        return False
    return bool(_timeless(left) == _timeless(right))


def _timeless(manifest: Mapping[str, Any]) -> Any:
    copy = json.loads(json.dumps(manifest))
    copy["metadata"].get("annotations", {}).pop(TRIGGER_TIME, None)
    return copy


def node_manifest(
    name: str, addresses: Mapping[str, str], pod_cidrs: Sequence[str], zone: str, labels: Mapping[str, str]
) -> Manifest:
    """Return the Node object of a node."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, ZONE: zone, **labels}},
        "spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": address} for address in addresses.values()),
                {"type": "Hostname", "address": name},
            ]
        },
    }
