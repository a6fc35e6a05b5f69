"""What the API does to an object on its way in, beside Services: names, defaults, validation, strict fields. Pure."""

from __future__ import annotations

import ipaddress
import random
import re
from typing import Any

from apiserver import errors
from apiserver.errors import Cause
from apiserver.resources import Resource

Json = dict[str, Any]
_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_NAME_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_RBAC_KINDS = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
_PORT = {"name", "port", "protocol", "appProtocol"}
# kind → path → fields that exist there; what is not named is not checked ("*": any key)
_KNOWN: dict[str, dict[str, set[str]]] = {
    "Service": {
        "": {"apiVersion", "kind", "metadata", "spec", "status"},
        "spec": {
            "allocateLoadBalancerNodePorts",
            "clusterIP",
            "clusterIPs",
            "externalIPs",
            "externalName",
            "externalTrafficPolicy",
            "healthCheckNodePort",
            "internalTrafficPolicy",
            "ipFamilies",
            "ipFamilyPolicy",
            "loadBalancerClass",
            "loadBalancerIP",
            "loadBalancerSourceRanges",
            "ports",
            "publishNotReadyAddresses",
            "selector",
            "sessionAffinity",
            "sessionAffinityConfig",
            "trafficDistribution",
            "type",
        },
        "spec.ports[]": _PORT | {"targetPort", "nodePort"},
        "spec.sessionAffinityConfig": {"clientIP"},
        "spec.sessionAffinityConfig.clientIP": {"timeoutSeconds"},
    },
    "EndpointSlice": {
        "": {"apiVersion", "kind", "metadata", "addressType", "endpoints", "ports"},
        "endpoints[]": {
            "addresses",
            "conditions",
            "deprecatedTopology",
            "hints",
            "hostname",
            "nodeName",
            "targetRef",
            "zone",
        },
        "endpoints[].conditions": {"ready", "serving", "terminating"},
        "endpoints[].hints": {"forZones", "forNodes"},
        "ports[]": _PORT,
    },
}


def named(obj: Json) -> Json:
    """Return the object with a name made of its generateName, where it has no name."""
    meta = obj["metadata"]
    if meta.get("name") or not meta.get("generateName"):
        return obj
    tail = "".join(random.choices(_ALPHABET, k=5))
    return {**obj, "metadata": {**meta, "name": meta["generateName"] + tail}}


def unknown_fields(obj: Json) -> list[str]:
    """Return the paths of fields that the kind does not have, as a strict decoding names them."""
    known = _KNOWN.get(str(obj.get("kind")), {})
    return sorted(_unknown(known, "", "", obj)) if known else []


def _unknown(known: dict[str, set[str]], path: str, shown: str, value: Any) -> list[str]:
    found: list[str] = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += _unknown(known, f"{path}[]", f"{shown}[{index}]", item)
    elif isinstance(value, dict) and path != "metadata":
        for key, item in value.items():
            here = f"{shown}.{key}".lstrip(".")
            if path in known and key not in known[path]:
                found.append(here)
            else:
                found += _unknown(known, f"{path}.{key}".lstrip("."), here, item)
    return found


def with_defaults(resource: Resource, obj: Json) -> Json:
    """Return the object as it is stored, with what the API fills in."""
    if resource.kind == "Namespace":
        labels = {"kubernetes.io/metadata.name": obj["metadata"]["name"], **(obj["metadata"].get("labels") or {})}
        meta = {**obj["metadata"], "labels": labels}
        return {**obj, "metadata": meta, "status": obj.get("status") or {"phase": "Active"}}
    if resource.kind == "EndpointSlice":
        ports = [{"name": "", "protocol": "TCP", **port} for port in obj.get("ports") or ()]
        return {**obj, "endpoints": obj.get("endpoints") or [], "ports": ports}
    if resource.kind == "Pod":
        return _pod(obj)
    if resource.scale:
        return {**obj, "spec": {"replicas": 1, **(obj.get("spec") or {})}, "status": obj.get("status") or {}}
    if resource.kind == "Node":
        return {**obj, "spec": _node_spec(obj.get("spec") or {}), "status": obj.get("status") or {}}
    return obj


def _node_spec(spec: Json) -> Json:
    if spec.get("podCIDR") and not spec.get("podCIDRs"):
        return {**spec, "podCIDRs": [spec["podCIDR"]]}
    if spec.get("podCIDRs") and not spec.get("podCIDR"):
        return {**spec, "podCIDR": spec["podCIDRs"][0]}
    return spec


def _pod(obj: Json) -> Json:
    spec: Json = {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "terminationGracePeriodSeconds": 30}
    spec |= {"serviceAccountName": "default", "schedulerName": "default-scheduler", **(obj.get("spec") or {})}
    containers = []
    for container in spec.get("containers") or ():
        container = dict(container)
        if container.get("ports"):
            container["ports"] = [{"protocol": "TCP", **port} for port in container["ports"]]
        containers.append(container)
    spec["containers"] = containers
    return {**obj, "spec": spec, "status": {"phase": "Pending", **(obj.get("status") or {})}}


def check(resource: Resource, obj: Json) -> None:
    """Raise 422 for what the API would refuse."""
    found: list[Cause] = []
    name = obj["metadata"].get("name") or ""
    if not name:
        found.append(Cause("metadata.name", "Required value: name or generateName is required", "FieldValueRequired"))
    elif resource.kind not in ("Service", *_RBAC_KINDS) and (not _SUBDOMAIN.match(name) or len(name) > 253):
        found.append(Cause("metadata.name", f'Invalid value: "{name}": {_NAME_TEXT}'))
    if resource.kind == "EndpointSlice":
        found += _slice_problems(obj)
    if resource.kind == "Pod" and not obj["spec"]["containers"]:
        found.append(Cause("spec.containers", "Required value", "FieldValueRequired"))
    if found:
        raise errors.invalid(resource.group, resource.kind, name, found)


def _slice_problems(obj: Json) -> list[Cause]:
    found: list[Cause] = []
    family = obj.get("addressType") or ""
    families = ("FQDN", "IPv4", "IPv6")
    if not family:
        found.append(Cause("addressType", "Required value", "FieldValueRequired"))
    elif family not in families:
        listed = ", ".join(f'"{choice}"' for choice in families)
        text = f'Unsupported value: "{family}": supported values: {listed}'
        found.append(Cause("addressType", text, "FieldValueNotSupported"))
    for index, endpoint in enumerate(obj["endpoints"]):
        field = f"endpoints[{index}].addresses"
        addresses = endpoint.get("addresses") or ()
        if not addresses:
            text = "Required value: must contain at least 1 address"
            found.append(Cause(field, text, "FieldValueRequired"))
        for at, address in enumerate(addresses):
            if family in ("IPv4", "IPv6") and not _is_ip(address, family):
                text = f'Invalid value: "{address}": must be a valid {family} address'
                found.append(Cause(f"{field}[{at}]", text))
    seen: set[str] = set()
    for index, port in enumerate(obj["ports"]):
        number = port.get("port")
        if number is not None and not (isinstance(number, int) and 1 <= number <= 65535):
            text = f"Invalid value: {number}: must be between 1 and 65535, inclusive"
            found.append(Cause(f"ports[{index}].port", text))
        if port["protocol"] not in ("TCP", "UDP", "SCTP"):
            text = f'Unsupported value: "{port["protocol"]}": supported values: "SCTP", "TCP", "UDP"'
            found.append(Cause(f"ports[{index}].protocol", text, "FieldValueNotSupported"))
        if port["name"] in seen:
            found.append(Cause(f"ports[{index}].name", f'Duplicate value: "{port["name"]}"', "FieldValueDuplicate"))
        seen.add(port["name"])
    return found


def _is_ip(text: object, family: str) -> bool:
    try:
        return f"IPv{ipaddress.ip_address(str(text)).version}" == family
    except ValueError:
        return False
