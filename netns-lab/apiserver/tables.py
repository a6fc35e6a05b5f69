"""What `kubectl get` prints: a Table of columns and cells for each kind. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from apiserver.resources import Resource

Json = dict[str, Any]
Column = tuple[str, int]  # name, priority (1: only with -o wide)
NONE = "<none>"


def table(resource: Resource, objects: Iterable[Json], meta: Json, include: str, *, columns: bool = True) -> Json:
    """Return the Table of `objects`. `include`: None, Metadata or Object, as includeObject asks."""
    names, cells = _PRINTERS.get(resource.kind, _PLAIN)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "columnDefinitions": [
            {
                "name": name,
                "type": "string",
                "format": "name" if name == "Name" else "",
                "description": "",
                "priority": priority,
            }
            for name, priority in names
        ]
        if columns
        else None,
        "rows": [{"cells": [obj["metadata"]["name"], *cells(obj)], "object": _object(obj, include)} for obj in objects],
    }


def _object(obj: Json, include: str) -> Json | None:
    if include == "None":
        return None
    if include == "Object":
        return obj
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def age(obj: Json) -> str:
    """Return how old an object is, as kubectl writes durations."""
    stamp = obj["metadata"].get("creationTimestamp")
    if not stamp:
        return "<unknown>"
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds())
    for limit, unit, name in ((120, 1, "s"), (600, 60, "m"), (10_800, 60, "m"), (172_800, 3600, "h")):
        if seconds < limit:
            rest = f"{seconds % 60}s" if limit == 600 and seconds % 60 else ""
            return f"{seconds // unit}{name}{rest}"
    return f"{seconds // 86400}d"


def _plain(obj: Json) -> list[Any]:
    return [age(obj)]


def _service(obj: Json) -> list[Any]:
    spec = obj["spec"]
    ports = [
        f"{port['port']}{':' + str(port['nodePort']) if port.get('nodePort') else ''}/{port['protocol']}"
        for port in spec.get("ports") or ()
    ]
    return [
        spec["type"],
        ",".join(spec.get("clusterIPs") or [])[:200].split(",")[0] or NONE,
        _external(obj),
        ",".join(ports) or NONE,
        age(obj),
        ",".join(f"{key}={value}" for key, value in sorted((spec.get("selector") or {}).items())) or NONE,
    ]


def _external(obj: Json) -> str:
    spec = obj["spec"]
    if spec["type"] == "ExternalName":
        return str(spec.get("externalName", ""))
    addresses = list(spec.get("externalIPs") or ())
    if spec["type"] == "LoadBalancer":
        ingress = ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
        addresses = [entry.get("ip") or entry.get("hostname") for entry in ingress] + addresses
        return ",".join(addresses) or "<pending>"
    return ",".join(addresses) or NONE


def _slice(obj: Json) -> list[Any]:
    ports = ",".join(str(port["port"]) if port.get("port") else "*" for port in obj.get("ports") or ())
    found = [address for endpoint in obj.get("endpoints") or () for address in endpoint["addresses"]]
    more = f" + {len(found) - 3} more..." if len(found) > 3 else ""
    return [obj.get("addressType"), ports or "<unset>", (",".join(found[:3]) + more) or "<unset>", age(obj)]


def _endpoints(obj: Json) -> list[Any]:
    found = [
        f"{address['ip']}:{port['port']}"
        for subset in obj.get("subsets") or ()
        for address in subset.get("addresses") or ()
        for port in subset.get("ports") or ()
    ]
    more = f" + {len(found) - 3} more..." if len(found) > 3 else ""
    return [(",".join(found[:3]) + more) or NONE, age(obj)]


def _node(obj: Json) -> list[Any]:
    status, spec = obj.get("status") or {}, obj.get("spec") or {}
    ready = next((c["status"] for c in status.get("conditions") or () if c.get("type") == "Ready"), None)
    state = {"True": "Ready", None: "Unknown"}.get(ready, "NotReady")
    if spec.get("unschedulable"):
        state += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    labels = obj["metadata"].get("labels") or {}
    roles = sorted(label[len(prefix) :] for label in labels if label.startswith(prefix))
    info = status.get("nodeInfo") or {}

    def address(kind: str) -> str:
        return next((a["address"] for a in status.get("addresses") or () if a.get("type") == kind), NONE)

    return [
        state,
        ",".join(roles) or NONE,
        age(obj),
        info.get("kubeletVersion", ""),
        address("InternalIP"),
        address("ExternalIP"),
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


def _pod(obj: Json) -> list[Any]:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    containers = status.get("containerStatuses") or ()
    ready = sum(bool(container.get("ready")) for container in containers)
    state = "Terminating" if obj["metadata"].get("deletionTimestamp") else status.get("phase") or "Pending"
    return [
        f"{ready}/{len(spec.get('containers') or ())}",
        state,
        str(sum(container.get("restartCount", 0) for container in containers)),
        age(obj),
        status.get("podIP") or NONE,
        spec.get("nodeName") or NONE,
        NONE,
        NONE,
    ]


def _namespace(obj: Json) -> list[Any]:
    return [(obj.get("status") or {}).get("phase", "Active"), age(obj)]


def _event(obj: Json) -> list[Any]:
    involved = obj.get("involvedObject") or {}
    seen = {"metadata": {"creationTimestamp": obj.get("lastTimestamp") or obj["metadata"].get("creationTimestamp")}}
    return [
        age(seen),
        obj.get("type"),
        obj.get("reason"),
        f"{str(involved.get('kind', '')).lower()}/{involved.get('name', '')}",
        obj.get("message"),
    ]


def _replicas(obj: Json) -> list[Any]:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    wanted = spec.get("replicas", 1)
    return [
        f"{status.get('readyReplicas', 0)}/{wanted}",
        str(status.get("updatedReplicas", status.get("replicas", 0))),
        str(status.get("availableReplicas", 0)),
        age(obj),
    ]


def _config_map(obj: Json) -> list[Any]:
    return [str(len(obj.get("data") or {}) + len(obj.get("binaryData") or {})), age(obj)]


def _columns(*names: str, wide: tuple[str, ...] = ()) -> list[Column]:
    return [("Name", 0), *((name, 0) for name in names), *((name, 1) for name in wide)]


_PLAIN: tuple[list[Column], Callable[[Json], list[Any]]] = (_columns("Age"), _plain)
_PRINTERS: dict[str, tuple[list[Column], Callable[[Json], list[Any]]]] = {
    "Service": (_columns("Type", "Cluster-IP", "External-IP", "Port(s)", "Age", wide=("Selector",)), _service),
    "EndpointSlice": (_columns("AddressType", "Ports", "Endpoints", "Age"), _slice),
    "Endpoints": (_columns("Endpoints", "Age"), _endpoints),
    "Node": (
        _columns(
            "Status",
            "Roles",
            "Age",
            "Version",
            wide=("Internal-IP", "External-IP", "OS-Image", "Kernel-Version", "Container-Runtime"),
        ),
        _node,
    ),
    "Pod": (
        _columns("Ready", "Status", "Restarts", "Age", wide=("IP", "Node", "Nominated Node", "Readiness Gates")),
        _pod,
    ),
    "Namespace": (_columns("Status", "Age"), _namespace),
    "Event": ([("Last Seen", 0), ("Type", 0), ("Reason", 0), ("Object", 0), ("Message", 0)], _event),
    "Deployment": (_columns("Ready", "Up-to-date", "Available", "Age"), _replicas),
    "ConfigMap": (_columns("Data", "Age"), _config_map),
}
