"""What a v1 Service gets and must have: defaults, and the errors of kube-apiserver."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import Any

from apiserver.errors import Cause

Json = dict[str, Any]
AFFINITY_SECONDS = 10800
_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
_NAME = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_PROTOCOLS = ("SCTP", "TCP", "UDP")
_TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
_DNS_1035 = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_DNS_1123 = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_RANGE = "must be between 1 and 65535, inclusive"


def invalid_value(field: str, value: object, text: str) -> Cause:
    """Return what is wrong with a value."""
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else value
    return Cause(field, f"Invalid value: {shown}: {text}")


def _required(field: str, text: str = "") -> Cause:
    return Cause(field, f"Required value{': ' + text if text else ''}", "FieldValueRequired")


def _unsupported(field: str, value: object, allowed: Iterable[str]) -> Cause:
    listed = ", ".join(f'"{choice}"' for choice in allowed)
    return Cause(field, f'Unsupported value: "{value}": supported values: {listed}', "FieldValueNotSupported")


def with_defaults(service: Json) -> Json:
    """Return the Service with what the API fills in; nothing that needs an allocator."""
    spec = dict(service.get("spec") or {})
    kind = spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    if spec["sessionAffinity"] == "None":
        spec.pop("sessionAffinityConfig", None)
    elif spec["sessionAffinity"] == "ClientIP":
        config = dict(spec.get("sessionAffinityConfig") or {})
        config["clientIP"] = {"timeoutSeconds": AFFINITY_SECONDS, **(config.get("clientIP") or {})}
        spec["sessionAffinityConfig"] = config
    if spec.get("ports"):
        ports = []
        for port in spec["ports"]:
            port = {"protocol": "TCP", **port}
            if port.get("targetPort") in (None, 0, "") and kind != "ExternalName":
                port["targetPort"] = port.get("port")
            if kind in ("ClusterIP", "ExternalName") and not port.get("nodePort"):
                port.pop("nodePort", None)
            ports.append(port)
        spec["ports"] = ports
    if _reachable_from_outside(spec):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if kind != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if kind == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
    return {**service, "spec": spec, "status": service.get("status") or {"loadBalancer": {}}}


def _reachable_from_outside(spec: Json) -> bool:
    return spec.get("type") in ("NodePort", "LoadBalancer") or bool(
        spec.get("type") == "ClusterIP" and spec.get("externalIPs")
    )


def problems(service: Json, old: Json | None) -> list[Cause]:
    """Return what kube-apiserver would refuse."""
    spec = service["spec"]
    found: list[Cause] = []
    name = service["metadata"]["name"]
    if not _NAME.match(name) or len(name) > 63:
        found.append(invalid_value("metadata.name", name, _DNS_1035))
    if spec["type"] not in _TYPES:
        return [*found, _unsupported("spec.type", spec["type"], _TYPES)]
    headless = spec.get("clusterIP") == "None"
    if not spec.get("ports") and not headless and spec["type"] != "ExternalName":
        found.append(_required("spec.ports"))
    if spec["type"] == "ExternalName" and not spec.get("externalName"):
        found.append(_required("spec.externalName"))
    if spec["type"] == "LoadBalancer" and headless:
        found.append(invalid_value("spec.clusterIPs[0]", "None", "may not be set to 'None' for LoadBalancer services"))
    if spec["type"] == "NodePort" and headless:
        found.append(invalid_value("spec.clusterIPs[0]", "None", "may not be set to 'None' for NodePort services"))
    found += _port_problems(spec, headless)
    found += _policy_problems(spec)
    for index, address in enumerate(spec.get("externalIPs") or ()):
        if not _is_ip(address):
            text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            found.append(invalid_value(f"spec.externalIPs[{index}]", address, text))
    for index, cidr in enumerate(spec.get("loadBalancerSourceRanges") or ()):
        if spec["type"] != "LoadBalancer":
            text = "may only be used when `type` is 'LoadBalancer'"
            found.append(Cause("spec.loadBalancerSourceRanges", f"Forbidden: {text}", "FieldValueForbidden"))
            break
        if not _is_cidr(str(cidr).strip()):
            text = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            found.append(invalid_value(f"spec.loadBalancerSourceRanges[{index}]", cidr, text))
    found += _address_problems(spec, old["spec"] if old else None)
    return found


def _port_problems(spec: Json, headless: bool) -> Iterator[Cause]:
    ports = spec.get("ports") or ()
    names: set[str] = set()
    seen: set[tuple[Any, Any]] = set()
    node_ports: set[tuple[Any, Any]] = set()
    for index, port in enumerate(ports):
        field = f"spec.ports[{index}]"
        name = port.get("name") or ""
        if not name and len(ports) > 1:
            yield _required(f"{field}.name")
        elif name and (not _LABEL.match(name) or len(name) > 63):
            yield invalid_value(f"{field}.name", name, _DNS_1123)
        elif name and name in names:
            yield Cause(f"{field}.name", f'Duplicate value: "{name}"', "FieldValueDuplicate")
        names.add(name)
        number = port.get("port")
        if not isinstance(number, int) or not 1 <= number <= 65535:
            yield invalid_value(f"{field}.port", 0 if number is None else number, _RANGE)
        if port["protocol"] not in _PROTOCOLS:
            yield _unsupported(f"{field}.protocol", port["protocol"], _PROTOCOLS)
        target = port.get("targetPort")
        if isinstance(target, int) and not 1 <= target <= 65535 and spec["type"] != "ExternalName":
            yield invalid_value(f"{field}.targetPort", target, _RANGE)
        key = (port["protocol"], number)
        if key in seen:
            shown = f'{{"protocol":"{key[0]}","port":{key[1]}}}'
            yield Cause(field, f"Duplicate value: {shown}", "FieldValueDuplicate")
        seen.add(key)
        node_port = port.get("nodePort")
        if node_port and (spec["type"] == "ClusterIP" or headless):
            text = "may not be used when `type` is 'ClusterIP'"
            yield Cause(f"{field}.nodePort", f"Forbidden: {text}", "FieldValueForbidden")
        elif node_port and (port["protocol"], node_port) in node_ports:
            yield Cause(f"{field}.nodePort", f"Duplicate value: {node_port}", "FieldValueDuplicate")
        node_ports.add((port["protocol"], node_port))


def _policy_problems(spec: Json) -> Iterator[Cause]:
    if spec["sessionAffinity"] not in ("ClientIP", "None"):
        yield _unsupported("spec.sessionAffinity", spec["sessionAffinity"], ("ClientIP", "None"))
    seconds = ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds")
    if seconds is not None and not 0 < seconds <= 86400:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        yield invalid_value(field, seconds, "must be greater than 0 and less than 86400")
    external = spec.get("externalTrafficPolicy")
    if external is not None and not _reachable_from_outside(spec):
        yield invalid_value(
            "spec.externalTrafficPolicy", external, "may only be set for externally-accessible services"
        )
    elif external is not None and external not in ("Cluster", "Local"):
        yield _unsupported("spec.externalTrafficPolicy", external, ("Cluster", "Local"))
    internal = spec.get("internalTrafficPolicy")
    if internal is not None and internal not in ("Cluster", "Local"):
        yield _unsupported("spec.internalTrafficPolicy", internal, ("Cluster", "Local"))
    health = spec.get("healthCheckNodePort")
    if health and not wants_health_port(spec):
        text = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        yield invalid_value("spec.healthCheckNodePort", health, text)
    spread = spec.get("trafficDistribution")
    known = ("PreferClose", "PreferSameNode", "PreferSameZone")
    if spread is not None and spread not in known:
        yield _unsupported("spec.trafficDistribution", spread, known)


def _address_problems(spec: Json, old: Json | None) -> Iterator[Cause]:
    addresses = addresses_of(spec)
    for index, address in enumerate(addresses):
        if address not in ("", "None") and not _is_ip(address):
            text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            yield invalid_value(f"spec.clusterIPs[{index}]", address, text)
    if spec["type"] == "ExternalName" or old is None or old.get("type") == "ExternalName":
        return
    before = addresses_of(old)
    if before and addresses and before[0] != addresses[0]:
        shown = ",".join(f'"{address}"' for address in addresses)
        yield Cause("spec.clusterIPs[0]", f"Invalid value: [{shown}]: may not change once set", "FieldValueInvalid")


def addresses_of(spec: Json) -> list[str]:
    """Return the cluster IPs that a Service has or asks for."""
    return list(spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else []))


def wants_health_port(spec: Json) -> bool:
    """Say whether a Service gets a health check node port."""
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def _is_ip(text: object) -> bool:
    try:
        ipaddress.ip_address(str(text))
    except ValueError:
        return False
    return True


def _is_cidr(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return "/" in text


def carried_over(service: Json, old: Json) -> Json:
    """Return an update with what a client may leave out: the addresses, and the ports' numbers, of before.

    What the new type cannot have (`type` changed) is dropped where the client only repeats it.
    """
    spec, before = dict(service.get("spec") or {}), old["spec"]
    kind = spec.get("type", "ClusterIP")
    if kind != "ExternalName" and before.get("type") != "ExternalName":
        for field in ("clusterIP", "clusterIPs"):
            if not spec.get(field) and before.get(field) is not None:
                spec[field] = before[field]
        if spec.get("clusterIP") != (spec.get("clusterIPs") or [None])[0]:
            if spec.get("clusterIP") == before.get("clusterIP"):
                spec["clusterIP"] = (spec.get("clusterIPs") or [None])[0]
            else:
                spec["clusterIPs"] = [spec["clusterIP"]]
    if kind in ("ClusterIP", "ExternalName") and before.get("type") in ("NodePort", "LoadBalancer"):
        known = {(port["protocol"], port["port"]): port.get("nodePort") for port in before.get("ports") or ()}
        ports = []
        for port in spec.get("ports") or ():
            if port.get("nodePort") and port["nodePort"] == known.get((port.get("protocol", "TCP"), port.get("port"))):
                port = {key: value for key, value in port.items() if key != "nodePort"}
            ports.append(port)
        if spec.get("ports"):
            spec["ports"] = ports
        if not spec.get("externalIPs") and spec.get("externalTrafficPolicy") == before.get("externalTrafficPolicy"):
            spec.pop("externalTrafficPolicy", None)
        if before.get("type") == "LoadBalancer":
            spec.pop("allocateLoadBalancerNodePorts", None)
    health = spec.get("healthCheckNodePort")
    if health and health == before.get("healthCheckNodePort") and not wants_health_port(spec):
        spec.pop("healthCheckNodePort")
    if kind != "LoadBalancer" and before.get("type") == "LoadBalancer":
        service = {**service, "status": {"loadBalancer": {}}}
    return {**service, "spec": spec}
