"""One Service port → its objects in the nftables table, beside the constant ones of `base`.

Pure. A table is the sum of its servers' parts; what several servers need (pick chains, policy chains, hairpin pairs) is
in several parts with the same content.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Sequence
from math import gcd

from proxy.modes.nftables.base import Layout, collapsed, pick_chain, policy_chain, ranged_chain, verdict_word
from proxy.modes.nftables.names import LOCAL_OFFSET, NODE_PORT, SERVICE, WORDS, Kind, Words, own_name
from proxy.plan import Action, Endpoint, Family, Frontend, FrontendKind, NodeSettings, Scheduler, Verdict, VirtualServer

MAX_SLOTS = 4096
STICKY_CLIENTS = 262144  # how many clients one Service port remembers


def part(family: Family, settings: NodeSettings, server: VirtualServer) -> Layout:
    """Return the objects of one server. Raise ValueError with the field that no rule can hold."""
    words = WORDS[family]
    found = Layout({}, {}, {}, {})
    protocol = server.key.protocol.lower()
    lists = {"cluster": server.cluster, "local": server.local}
    used = {
        which: slots_of(lists[which])
        for which, action in (("cluster", Action.CLUSTER), ("local", Action.LOCAL))
        if lists[which] and any(action is verdict.action for frontend in server.frontends for verdict in _all(frontend))
    }
    own = {which: _own_chain(words, server, which, slots, found) for which, slots in used.items()}
    for frontend in server.frontends:
        kind = SERVICE if frontend.address else NODE_PORT
        actions = {verdict.action for verdict in _all(frontend)}
        key = f"{protocol} . {frontend.port}"
        if frontend.address:
            key = f"{_checked(frontend.address)} . {key}"
        _add(found, kind.frontends, key, f"goto {_entry(words, settings, kind, frontend, key, found)}")
        if frontend.kind is FrontendKind.CLUSTER_IP:
            _add(found, "cluster-ips", frontend.address)
        for which, slots in used.items():
            if Action(which) not in actions:
                continue
            chain = own[which] or _shared_pick(words, kind, frontend, protocol, which, slots, found)
            _add(found, f"{kind.prefix}-{which}-picks", key, f"goto {chain}")
    # all endpoints, not this node's only: a slice may leave the node's name out, and a far pod may come by a node port
    for endpoint in dict.fromkeys((*used.get("cluster", ()), *used.get("local", ()))):
        _add(found, "hairpin", f"{_checked(endpoint.address)} . {endpoint.address}")
    return found


def slots_of(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints, each as often as its weight says, well mixed (smooth weighted round robin)."""
    if all(endpoint.weight == 1 for endpoint in endpoints):
        return tuple(endpoints)
    weights = [max(endpoint.weight, 0) for endpoint in endpoints]
    if not any(weights):
        return tuple(endpoints)
    divisor = gcd(*weights)
    weights = [weight // divisor for weight in weights]
    if (total := sum(weights)) > MAX_SLOTS:
        weights = [max(1, round(weight * MAX_SLOTS / total)) if weight else 0 for weight in weights]
        total = sum(weights)
    credit = [0] * len(weights)
    slots = []
    for _ in range(total):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        best = max(range(len(credit)), key=credit.__getitem__)
        credit[best] -= total
        slots.append(endpoints[best])
    return tuple(slots)


def _all(frontend: Frontend) -> tuple[Verdict, Verdict, Verdict]:
    return frontend.pod, frontend.node, frontend.outside


def _add(found: Layout, container: str, key: str, value: str = "") -> None:
    found.elements.setdefault(container, {}).setdefault(key, value)


def _checked(address: str) -> str:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except OSError:
        raise ValueError(f"address {address!r}: not an IP address") from None
    return address


def _entry(words: Words, settings: NodeSettings, kind: Kind, frontend: Frontend, key: str, found: Layout) -> str:
    """Return the chain that a frontend's packets go to, with its rules and source ranges in `found`."""
    pod, node, outside = map(verdict_word, _all(frontend))
    policy, rules = policy_chain(words, settings, kind, (pod, node, outside))
    found.chains[policy] = rules
    ranges = None if frontend.source_ranges is None else collapsed(frontend.source_ranges)
    if ranges is None or any(network.prefixlen == 0 for network in ranges):
        return policy
    for network in ranges:
        _add(found, f"{kind.prefix}-source-ranges", f"{key} . {network}")
    ranged, rules = ranged_chain(words, kind, policy)
    found.chains[ranged] = rules
    return ranged


def _shared_pick(
    words: Words, kind: Kind, frontend: Frontend, protocol: str, which: str, slots: Sequence[Endpoint], found: Layout
) -> str:
    """Return the pick chain for so many slots; the endpoints are in the endpoint map under the frontend's address."""
    start = f"{frontend.address} . {frontend.port} . " if frontend.address else f"{frontend.port} . "
    first = LOCAL_OFFSET if which == "local" else 0
    found.elements.setdefault(f"{kind.prefix}-endpoints-{protocol}", {}).update(
        {
            f"{start}{index}": f"{_checked(endpoint.address)} . {endpoint.port}"
            for index, endpoint in enumerate(slots, first)
        }
    )
    name, rules = pick_chain(words, kind, which, protocol, len(slots))
    found.chains[name] = rules
    return name


def _own_chain(words: Words, server: VirtualServer, which: str, slots: Sequence[Endpoint], found: Layout) -> str:
    """Return the chain of a server that shares none: with affinity, or in turns; empty for a random pick."""
    protocol = server.key.protocol.lower()
    in_turn = server.scheduler == Scheduler.ROUND_ROBIN.value
    if server.affinity_seconds:
        name = own_name("sticky", server.key, f"{which}-{server.affinity_seconds}")
        for port in dict.fromkeys(endpoint.port for endpoint in slots):
            found.sets[f"{name}-{port}"] = (
                f"map {{ type {words.address_type} : {words.address_type} ; size {STICKY_CLIENTS} ;"
                f" flags dynamic,timeout ; timeout {server.affinity_seconds}s ; }}"
            )
            found.live[f"{name}-{port}"] = frozenset(each.address for each in slots if each.port == port)
        rules = _sticky(words, protocol, name, slots, "inc" if in_turn else "random")
        chain = f"{name}-{hashlib.sha256(repr(rules).encode()).hexdigest()[:8]}"
    elif in_turn:
        name = own_name("turn", server.key, which)
        found.sets[name] = f"map {{ typeof numgen inc mod 2 : {words.ip} daddr . {protocol} dport ; }}"
        # A generator of its own: the counter of a shared chain would be common to several Services.
        rules = (f"meta l4proto {protocol} dnat {words.ip} addr . port to numgen inc mod {len(slots)} map @{name}",)
        chain = f"{name}-{len(slots)}"
        for index, endpoint in enumerate(slots):
            _add(found, name, str(index), f"{_checked(endpoint.address)} . {endpoint.port}")
    else:
        return ""
    found.chains[chain] = rules  # a chain never changes under its name: a new one is made, then its map's users move
    return chain


def _sticky(words: Words, protocol: str, name: str, slots: Sequence[Endpoint], generator: str) -> tuple[str, ...]:
    """Return the rules that send a known client where it went before, and remember a new one's endpoint.

    A map a port, from client to endpoint address: nft 1.0.6 aborts on an update whose value is IPv6 address and port.
    The first rules' value is never stored but when the client expires between its match and its update.
    """
    shares = Counter(slots)
    rules = []
    for port in dict.fromkeys(endpoint.port for endpoint in shares):
        known, client = f"@{name}-{port}", f"{words.ip} saddr"
        first = next(_checked(endpoint.address) for endpoint in shares if endpoint.port == port)
        rules.append(
            f"{client} {known} update {known} {{ {client} : {first} }}"
            f" meta l4proto {protocol} dnat to {client} map {known} : {port}"
        )
    left = len(slots)
    for endpoint, share in shares.items():
        address = _checked(endpoint.address)
        some = f" numgen {generator} mod {left} < {share}" if share < left else ""
        to = f"{address}:{endpoint.port}" if words.family is Family.V4 else f"[{address}]:{endpoint.port}"
        remember = f"update @{name}-{endpoint.port} {{ {words.ip} saddr : {address} }}"
        rules.append(f"meta l4proto {protocol}{some} {remember} dnat to {to}")
        left -= share
    rules.append(f"meta l4proto {protocol} dnat to {to}")  # the map is full
    return tuple(rules)
