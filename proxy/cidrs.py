"""What a networking.k8s.io/v1 ServiceCIDR says: the networks that cluster IPs are taken from, checked. Pure.

Knows no Service; that an address of such a network is nobody's is for `plan.py`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from proxy.plan import Family
from proxy.services import canonical_network
from pynet.objects import BadObject, ServiceCIDR

MAX_NETWORKS = 1_000


def networks_of(obj: ServiceCIDR) -> tuple[str, ...]:
    """Return the networks that `obj` names. Raise `BadObject` with the field: they are closed: no slips."""
    where = f"ServiceCIDR {obj.metadata.name}"
    cidrs = obj.spec.cidrs or ()
    if len(cidrs) > MAX_NETWORKS:
        raise BadObject(where, "spec.cidrs", f"{len(cidrs)} entries; at most {MAX_NETWORKS} are taken")
    found = []
    for index, text in enumerate(cidrs):
        field = f"spec.cidrs[{index}]"
        network = canonical_network(text)
        if network is None:
            raise BadObject(where, field, f"{text[:60]!r} is no network: expected ADDRESS/LENGTH")
        parsed = ipaddress.ip_network(network[1])
        if not parsed.prefixlen or parsed.is_loopback or parsed.is_multicast:
            raise BadObject(where, field, f"{text[:60]!r} holds what can be no cluster IP: all, loopback or multicast")
        found.append(network[1])
    return tuple(found)


def of_family(networks: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return those of one family, sorted and without overlaps."""
    mine = [ipaddress.ip_network(text) for text in networks if (":" in text) == (family is Family.V6)]
    return tuple(map(str, ipaddress.collapse_addresses(mine)))  # type: ignore[type-var]
