"""Cluster IPs and node ports for Services, and all that a Service goes through before it is stored.

Knows the state only through the Services it is shown; allocations are found by looking at them.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable
from typing import Any

from apiserver import errors, services
from apiserver.errors import Cause
from apiserver.services import addresses_of, invalid_value, wants_health_port

Json = dict[str, Any]
NODE_PORTS = range(30000, 32768)


def admitted(service: Json, known: Json | None, others: Iterable[Json], allocator: Allocator) -> Json:
    """Return a Service as it is to be stored. Raise 422. `known`: the same one as it is; `others`: all but it."""
    if known:
        service = services.carried_over(service, known)
    service = services.with_defaults(service)
    found = services.problems(service, known)
    if found:
        raise errors.invalid("", "Service", service["metadata"]["name"], found)
    return allocator.allocate(service, known, others)


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
        asked = addresses_of(spec) or (addresses_of(before) if before.get("type") != "ExternalName" else [])
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
                found.append(invalid_value(f"spec.ipFamilies[{index}]", family, text))
        if policy == "RequireDualStack" and len(native) < 2:
            found.append(
                invalid_value("spec.ipFamilyPolicy", policy, "this cluster is not configured for dual-stack services")
            )
        if policy != "SingleStack":
            families += [family for family in native if family not in families]
        else:
            families = families[:1]
        if found:
            return
        taken = {address for other in others for address in addresses_of(other)}
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
                    found.append(invalid_value(field, number, text))
                elif (port["protocol"], number) in taken or number in health:
                    found.append(invalid_value(field, number, "provided port is already allocated"))
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
        if wants_health_port(spec):
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
