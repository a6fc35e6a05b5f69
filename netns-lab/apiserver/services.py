"""What a v1 Service gets and must have: defaults, cluster IPs, node ports, and the errors of kube-apiserver.

Knows the state only through the Services it is shown; allocations are found by looking at them.
"""

from __future__ import annotations

import ipaddress
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

from apiserver import errors
from apiserver.errors import Cause

Json = dict[str, Any]
NODE_PORTS = range(30000, 32768)
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


def _bad(field: str, value: object, text: str) -> Cause:
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
        found.append(_bad("metadata.name", name, _DNS_1035))
    if spec["type"] not in _TYPES:
        return [*found, _unsupported("spec.type", spec["type"], _TYPES)]
    headless = spec.get("clusterIP") == "None"
    if not spec.get("ports") and not headless and spec["type"] != "ExternalName":
        found.append(_required("spec.ports"))
    if spec["type"] == "ExternalName" and not spec.get("externalName"):
        found.append(_required("spec.externalName"))
    if spec["type"] == "LoadBalancer" and headless:
        found.append(_bad("spec.clusterIPs[0]", "None", "may not be set to 'None' for LoadBalancer services"))
    if spec["type"] == "NodePort" and headless:
        found.append(_bad("spec.clusterIPs[0]", "None", "may not be set to 'None' for NodePort services"))
    found += _port_problems(spec, headless)
    found += _policy_problems(spec)
    for index, address in enumerate(spec.get("externalIPs") or ()):
        if not _is_ip(address):
            text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            found.append(_bad(f"spec.externalIPs[{index}]", address, text))
    for index, cidr in enumerate(spec.get("loadBalancerSourceRanges") or ()):
        if spec["type"] != "LoadBalancer":
            text = "may only be used when `type` is 'LoadBalancer'"
            found.append(Cause("spec.loadBalancerSourceRanges", f"Forbidden: {text}", "FieldValueForbidden"))
            break
        if not _is_cidr(str(cidr).strip()):
            text = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            found.append(_bad(f"spec.loadBalancerSourceRanges[{index}]", cidr, text))
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
            yield _bad(f"{field}.name", name, _DNS_1123)
        elif name and name in names:
            yield Cause(f"{field}.name", f'Duplicate value: "{name}"', "FieldValueDuplicate")
        names.add(name)
        number = port.get("port")
        if not isinstance(number, int) or not 1 <= number <= 65535:
            yield _bad(f"{field}.port", 0 if number is None else number, _RANGE)
        if port["protocol"] not in _PROTOCOLS:
            yield _unsupported(f"{field}.protocol", port["protocol"], _PROTOCOLS)
        target = port.get("targetPort")
        if isinstance(target, int) and not 1 <= target <= 65535 and spec["type"] != "ExternalName":
            yield _bad(f"{field}.targetPort", target, _RANGE)
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
        yield _bad(field, seconds, "must be greater than 0 and less than 86400")
    external = spec.get("externalTrafficPolicy")
    if external is not None and not _reachable_from_outside(spec):
        yield _bad("spec.externalTrafficPolicy", external, "may only be set for externally-accessible services")
    elif external is not None and external not in ("Cluster", "Local"):
        yield _unsupported("spec.externalTrafficPolicy", external, ("Cluster", "Local"))
    internal = spec.get("internalTrafficPolicy")
    if internal is not None and internal not in ("Cluster", "Local"):
        yield _unsupported("spec.internalTrafficPolicy", internal, ("Cluster", "Local"))
    health = spec.get("healthCheckNodePort")
    if health and not _wants_health_port(spec):
        text = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        yield _bad("spec.healthCheckNodePort", health, text)
    spread = spec.get("trafficDistribution")
    known = ("PreferClose", "PreferSameNode", "PreferSameZone")
    if spread is not None and spread not in known:
        yield _unsupported("spec.trafficDistribution", spread, known)


def _address_problems(spec: Json, old: Json | None) -> Iterator[Cause]:
    addresses = _addresses(spec)
    for index, address in enumerate(addresses):
        if address not in ("", "None") and not _is_ip(address):
            text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            yield _bad(f"spec.clusterIPs[{index}]", address, text)
    if spec["type"] == "ExternalName" or old is None or old.get("type") == "ExternalName":
        return
    before = _addresses(old)
    if before and addresses and before[0] != addresses[0]:
        shown = ",".join(f'"{address}"' for address in addresses)
        yield Cause("spec.clusterIPs[0]", f"Invalid value: [{shown}]: may not change once set", "FieldValueInvalid")


def _addresses(spec: Json) -> list[str]:
    return list(spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else []))


def _wants_health_port(spec: Json) -> bool:
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


class Allocator:
    """Cluster IPs of one or two ranges, and node ports."""

    def __init__(self, ranges: Iterable[str] = ("10.96.0.0/16",), seed: int | None = None) -> None:
        self.ranges = [ipaddress.ip_network(cidr) for cidr in ranges]
        self._random = random.Random(seed)

    def allocate(self, service: Json, old: Json | None, others: Iterable[Json]) -> Json:
        """Return the Service with addresses and ports of its own. Raise 422 where what it asks for is taken."""
        others = [other["spec"] for other in others]
        spec = dict(service["spec"])
        before = old["spec"] if old else {}
        name = service["metadata"]["name"]
        found: list[Cause] = []
        if spec["type"] == "ExternalName":
            for field in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"):
                spec.pop(field, None)
        else:
            self._addresses(spec, before, others, found)
        self._ports(spec, before, others, found)
        if found:
            raise errors.invalid("", "Service", name, found)
        return {**service, "spec": spec}

    def _addresses(self, spec: Json, before: Json, others: list[Json], found: list[Cause]) -> None:
        policy = spec.get("ipFamilyPolicy") or before.get("ipFamilyPolicy") or "SingleStack"
        asked = _addresses(spec) or (_addresses(before) if before.get("type") != "ExternalName" else [])
        native = [f"IPv{cidr.version}" for cidr in self.ranges]
        if asked and asked[0] == "None":
            spec["clusterIP"], spec["clusterIPs"] = "None", ["None"]
            spec["ipFamilies"] = list(spec.get("ipFamilies") or native[: 1 if policy == "SingleStack" else 2])
            spec["ipFamilyPolicy"] = policy
            return
        families = list(spec.get("ipFamilies") or [f"IPv{ipaddress.ip_address(address).version}" for address in asked])
        if not families:
            families = native[:1]
        for index, family in enumerate(families):
            if family not in native:
                text = "not configured on this cluster"
                found.append(_bad(f"spec.ipFamilies[{index}]", family, text))
        if policy == "RequireDualStack" and len(native) < 2:
            found.append(_bad("spec.ipFamilyPolicy", policy, "this cluster is not configured for dual-stack services"))
        if policy != "SingleStack":
            families += [family for family in native if family not in families]
        else:
            families = families[:1]
        if found:
            return
        taken = {address for other in others for address in _addresses(other)}
        addresses = []
        for index, family in enumerate(families):
            if index < len(asked):
                if asked[index] in taken:
                    shown = ",".join(f'"{address}"' for address in asked)
                    text = f"failed to allocate IP {asked[index]}: provided IP is already allocated"
                    found.append(Cause("spec.clusterIPs", f"Invalid value: [{shown}]: {text}"))
                addresses.append(asked[index])
            else:
                addresses.append(self._address(self.ranges[native.index(family)], taken))
        spec |= {"clusterIP": addresses[0], "clusterIPs": addresses, "ipFamilies": families, "ipFamilyPolicy": policy}

    def _address(self, cidr: ipaddress.IPv4Network | ipaddress.IPv6Network, taken: set[str]) -> str:
        size = min(cidr.num_addresses, 1 << 16)
        static = min(max(size // 16, 16), 256)  # the lower band is for addresses chosen by hand (KEP-3070)
        for _ in range(10_000):
            address = str(cidr.network_address + self._random.randrange(min(static, size - 2), size - 1))
            if address not in taken:
                return address
        raise errors.ApiError(500, "InternalError", "failed to allocate a serviceIP: range is full")

    def _ports(self, spec: Json, before: Json, others: list[Json], found: list[Cause]) -> None:
        taken = {
            (port["protocol"], port["nodePort"])
            for other in others
            for port in other.get("ports") or ()
            if port.get("nodePort")
        }
        health = {other["healthCheckNodePort"] for other in others if other.get("healthCheckNodePort")}
        wants = spec["type"] == "NodePort" or (
            spec["type"] == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts", True)
        )
        kept = {
            (port["protocol"], port["port"]): port["nodePort"]
            for port in before.get("ports") or ()
            if port.get("nodePort")
        }
        ports, used = [], dict(kept)
        for index, port in enumerate(spec.get("ports") or ()):
            port = dict(port)
            number = port.get("nodePort") or (kept.get((port["protocol"], port["port"])) if wants else None)
            if number:
                field = f"spec.ports[{index}].nodePort"
                if number not in NODE_PORTS:
                    text = "provided port is not in the valid range. The range of valid ports is 30000-32767"
                    found.append(_bad(field, number, text))
                elif (port["protocol"], number) in taken or number in health:
                    found.append(_bad(field, number, "provided port is already allocated"))
            elif wants:
                # One number for TCP and UDP of the same port, as the real allocator gives.
                same = [
                    value
                    for (protocol, service_port), value in used.items()
                    if service_port == port["port"] and (port["protocol"], value) not in taken
                ]
                number = same[0] if same else self._port(taken, health | set(used.values()))
            if number:
                port["nodePort"] = number
                used[port["protocol"], port["port"]] = number
            ports.append(port)
        if "ports" in spec:
            spec["ports"] = ports
        if _wants_health_port(spec):
            number = spec.get("healthCheckNodePort") or before.get("healthCheckNodePort")
            spec["healthCheckNodePort"] = number or self._port(taken, health | set(used.values()))
        else:
            spec.pop("healthCheckNodePort", None)

    def _port(self, taken: set[tuple[str, int]], also: set[int]) -> int:
        numbers = {number for _, number in taken} | also
        static = 86  # the lower band is for ports chosen by hand (KEP-3668)
        for _ in range(10_000):
            number = self._random.randrange(NODE_PORTS.start + static, NODE_PORTS.stop)
            if number not in numbers:
                return number
        raise errors.ApiError(500, "InternalError", "failed to allocate a nodePort: range is full")


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
    if health and health == before.get("healthCheckNodePort") and not _wants_health_port(spec):
        spec.pop("healthCheckNodePort")
    if kind != "LoadBalancer" and before.get("type") == "LoadBalancer":
        service = {**service, "status": {"loadBalancer": {}}}
    return {**service, "spec": spec}
