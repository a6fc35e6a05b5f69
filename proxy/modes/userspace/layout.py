"""A `Plan` as nftables rules that lead connections to the doors' ports: constant chains, elements a frontend. Pure.

One map a class of source (pod, node, outside) says which local port a frontend has, another what it refuses or drops:
that is decided before a socket of ours would answer. A port of a door takes only what was led to it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.modes.userspace.doors import DoorKey, action_for, endpoints_for
from proxy.plan import Action, Family, Frontend, FrontendKind, LocalDetector, LocalKind, Origin, Plan

TABLE = "pynet-userspace"
NFT_FAMILY = {Family.V4: "ip", Family.V6: "ip6"}
_ORIGINS = {Origin.POD: "pod", Origin.NODE: "node", Origin.OUTSIDE: "outside"}
Elements = dict[str, frozenset[str]]
"""The elements of each set and map, by its name, as nft spells them."""


def base(plan: Plan) -> str:
    """Return the commands that make the table anew, without elements."""
    family = NFT_FAMILY[plan.family]
    key = f"{family} daddr . meta l4proto . th dport"
    lines = [f"table {family} {TABLE} {{}}", f"delete table {family} {TABLE}", f"table {family} {TABLE} {{"]
    for word in _ORIGINS.values():
        lines += [
            f"  map at-{word} {{ type {_address_type(plan)} . inet_proto . inet_service : inet_service; }}",
            f"  map port-{word} {{ type inet_proto . inet_service : inet_service; }}",
            f"  map end-at-{word} {{ type {_address_type(plan)} . inet_proto . inet_service : verdict; }}",
            f"  map end-port-{word} {{ type inet_proto . inet_service : verdict; }}",
        ]
    lines += [
        f"  set ranged {{ type {_address_type(plan)} . inet_proto . inet_service; }}",
        f"  set ranges {{ type {_address_type(plan)} . inet_proto . inet_service . {_address_type(plan)};"
        " flags interval; }",
        f"  set frontends {{ type {_address_type(plan)} . inet_proto . inet_service; }}",
        f"  set ips {{ type {_address_type(plan)}; }}",
        "  set doors { type inet_proto . inet_service; }",
        "  chain refuse {",
        "    meta l4proto tcp reject with tcp reset",
        "    reject",
        "  }",
        *_decision_chains(plan, key),
        "  chain guard {",
        "    type filter hook input priority filter; policy accept;",
        "    ct status dnat accept",
        "    meta l4proto . th dport @doors drop",
        "  }",
    ]
    for hook, name in (("prerouting", "in"), ("output", "out")):
        lines += [
            f"  chain end-{name} {{",
            f"    type filter hook {hook} priority -105; policy accept;",
            "    ct state new jump decide",
            "  }",
            f"  chain nat-{name} {{",
            f"    type nat hook {hook} priority -100; policy accept;",
            "    jump lead",
            "  }",
        ]
    return "\n".join([*lines, *_unallocated(plan), "}", ""])


def _unallocated(plan: Plan) -> list[str]:
    """Return the chains that drop what is for an address of a ServiceCIDR and was led to nobody."""
    family, networks = NFT_FAMILY[plan.family], plan.settings.service_cidrs
    if not networks:
        return []
    lines = ["  chain unallocated {", "    ct status dnat return", "    fib daddr type local return", "    drop", "  }"]
    for hook in ("forward", "output"):
        lines += [
            f"  chain unallocated-{hook} {{",
            f"    type filter hook {hook} priority filter; policy accept;",
            f"    ct state new {family} daddr {{ {', '.join(networks)} }} goto unallocated",
            "  }",
        ]
    return lines


def elements(plan: Plan, ports: Mapping[DoorKey, int]) -> Elements:
    """Return the elements of all Service ports; `ports`: the local port of each door."""
    found: dict[str, set[str]] = {name: set() for name in element_names()}
    for key, server in plan.servers.items():
        protocol = key.protocol.lower()
        for frontend in server.frontends:
            where = f"{frontend.address} . {protocol} . {frontend.port}"
            kind = "at" if frontend.address else "port"
            spelled = where if frontend.address else f"{protocol} . {frontend.port}"
            if frontend.address:
                found["frontends"].add(where)
            for origin, word in _ORIGINS.items():
                action = frontend.verdict_for(origin).action.value
                port = ports.get(DoorKey(key, frontend.address, frontend.port, action))
                if endpoints_for(server, frontend, origin) and port is not None:
                    found[f"{kind}-{word}"].add(f"{spelled} : {port}")
                    found["doors"].add(f"{protocol} . {port}")
                else:
                    ends = action_for(server, frontend, origin)
                    found[f"end-{kind}-{word}"].add(f"{spelled} : {'drop' if ends is Action.DROP else 'goto refuse'}")
            if frontend.source_ranges is not None and frontend.address:
                found["ranged"].add(where)
                found["ranges"].update(f"{where} . {network}" for network in _disjoint(frontend))
            if frontend.kind is FrontendKind.CLUSTER_IP:
                found["ips"].add(frontend.address)
    return {name: frozenset(entries) for name, entries in found.items()}


def element_names() -> list[str]:
    """Return the names of all sets and maps."""
    kinds = ("at", "port", "end-at", "end-port")
    return [f"{kind}-{word}" for word in _ORIGINS.values() for kind in kinds] + [
        "frontends",
        "ranged",
        "ranges",
        "ips",
        "doors",
    ]


def difference(family: Family, old: Elements, new: Elements) -> str:
    """Return the commands from one state of the elements to another."""
    where = f"{NFT_FAMILY[family]} {TABLE}"
    lines = []
    for name in element_names():
        had, wanted = old.get(name, frozenset()), new.get(name, frozenset())
        if gone := sorted(had - wanted):
            lines.append(f"delete element {where} {name} {{ {', '.join(_key(name, each) for each in gone)} }}")
        if more := sorted(wanted - had):
            lines.append(f"add element {where} {name} {{ {', '.join(more)} }}")
    return "".join(f"{line}\n" for line in lines)


def differing(plan: Plan, wanted: Elements, held: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each way in which the kernel's table (libnftables-json) is not what it should be."""
    held = list(held)
    there = elements_held(held)
    rules = sum("rule" in entry for entry in held)
    found = []
    expected = sum(line.startswith("    ") and not line.startswith("    type ") for line in base(plan).splitlines())
    if rules != expected:
        found.append(f"table {TABLE} has {rules} rules instead of {expected}")
    for name in element_names():
        have, want = there.get(name, frozenset()), wanted.get(name, frozenset())
        if have != want:
            found.append(f"{name}: {len(want - have)} elements are missing, {len(have - want)} are too many")
    return found


def elements_held(held: Iterable[Mapping[str, Any]]) -> Elements:
    """Return the elements of a table as libnftables-json gives it."""
    return {
        entry[kind]["name"]: frozenset(_spelled(each) for each in entry[kind].get("elem", ()))
        for entry in held
        for kind in ("set", "map")
        if kind in entry
    }


def udp_ports(doors: Iterable[str]) -> frozenset[int]:
    """Return the ports of UDP doors, from elements of the set `doors`."""
    return frozenset(int(port) for protocol, _, port in (each.partition(" . ") for each in doors) if protocol == "udp")


def _spelled(value: Any) -> str:
    """Return an element as `elements` spells it."""
    if isinstance(value, list):
        return f"{_spelled(value[0])} : {_spelled(value[1])}"
    if isinstance(value, dict):
        ((kind, body),) = value.items()
        if kind == "concat":
            return " . ".join(_spelled(each) for each in body)
        if kind == "prefix":
            return f"{body['addr']}/{body['len']}"
        if kind == "elem":
            return _spelled(body["val"])
        return f"goto {body['target']}" if kind == "goto" else kind
    return str(value)


def _key(name: str, element: str) -> str:
    """Return what names an element: a map's value is no part of it."""
    return element.rpartition(" : ")[0] if name.startswith(("at-", "port-", "end-")) else element


def _disjoint(frontend: Frontend) -> list[str]:
    """Return the source ranges without those inside of others: intervals of a set must not overlap."""
    networks = [ipaddress.ip_network(text, strict=False) for text in frontend.source_ranges or ()]
    merged = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
    # as nft lists them: without the length of a single address
    return [str(n.network_address if n.prefixlen == n.max_prefixlen else n) for n in merged]


def _decision_chains(plan: Plan, key: str) -> list[str]:
    """Return the chains that know origins: `decide` ends what gets no endpoint, `lead` sends the rest to its door."""
    family, settings = NFT_FAMILY[plan.family], plan.settings
    pods = _pod_matches(family, settings.detector)
    here = _node_port_match(plan)
    lines = []
    for word in _ORIGINS.values():
        lines += [
            f"  chain decide-{word} {{",
            f"    {key} @ranged {key} . {family} saddr != @ranges drop",
            f"    {key} vmap @end-at-{word}",
            f"    {key} @frontends return",
            f"    {family} daddr @ips meta l4proto {{ tcp, udp, sctp }} goto refuse",
            f"    {here} meta l4proto . th dport vmap @end-port-{word}",
            "  }",
            f"  chain lead-{word} {{",
            f"    meta l4proto {{ tcp, udp }} redirect to : {key} map @at-{word}",
            f"    {here} meta l4proto {{ tcp, udp }} redirect to : meta l4proto . th dport map @port-{word}",
            "  }",
        ]
    for name in ("decide", "lead"):
        lines += [f"  chain {name} {{", *(f"    {match} goto {name}-pod" for match in pods)]
        lines += [f"    fib saddr type local goto {name}-node", f"    goto {name}-outside", "  }"]
    return lines


def _address_type(plan: Plan) -> str:
    return "ipv6_addr" if plan.family is Family.V6 else "ipv4_addr"


def _node_port_match(plan: Plan) -> str:
    family, settings = NFT_FAMILY[plan.family], plan.settings
    words = ["fib daddr type local"]
    if settings.node_port_addresses:
        words.insert(0, f"{family} daddr {{ {', '.join(settings.node_port_addresses)} }}")
    if not settings.localhost_node_ports and plan.family is Family.V4:
        words.insert(0, "ip daddr != 127.0.0.0/8")
    return " ".join(words)


def _pod_matches(family: str, detector: LocalDetector) -> list[str]:
    if detector.kind is LocalKind.CIDR:
        return [f"{family} saddr {network}" for network in detector.cidrs]
    if detector.kind is LocalKind.BRIDGE:
        return [f'iifname "{detector.interface}"']
    if detector.kind is LocalKind.PREFIX:
        return [f'iifname "{detector.interface}*"']
    return []
