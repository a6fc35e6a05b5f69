"""The constant part of nftables mode's layout: base chains, maps, sets and the rules that do not depend on Services.

Pure. A packet's way: base chain → `services` → (frontends, node-ports) → a policy chain that knows which verdict its
origin gets → `…-cluster` or `…-local` → (picks) → a pick chain → DNAT through the one endpoint map of its protocol.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable

import msgspec

from proxy.modes.nftables.names import (
    KINDS,
    LOCAL_OFFSET,
    NODE_PORT,
    PROTOCOLS,
    REASONS,
    SERVICE,
    WORDS,
    Kind,
    Words,
)
from proxy.plan import Action, Family, LocalKind, NodeSettings, Verdict, inside

_INTERFACE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
MARKER = "layout-"  # begins the name of an empty set that says which declarations the table was made with


class Layout(msgspec.Struct, gc=False):
    """Objects of one table. `sets`: declarations; `elements`: set or map → key → value (empty in a set).

    `live`: map of remembered clients → the endpoints that may stand in it; its elements are the packets' own.
    """

    sets: dict[str, str] = {}
    chains: dict[str, tuple[str, ...]] = {}
    elements: dict[str, dict[str, str]] = {}
    live: dict[str, frozenset[str]] = {}


def base(family: Family, settings: NodeSettings) -> Layout:
    """Return what stands in the table of `family` whatever Services there are."""
    words = WORDS[family]
    sets = _declarations(words)
    marker = hashlib.sha256("\n".join(f"{name} {declared}" for name, declared in sets.items()).encode()).hexdigest()
    sets[f"{MARKER}{marker[:16]}"] = f"set {{ type {words.address_type} ; }}"
    elements = {
        "pod-networks": dict.fromkeys(_networks(settings.detector.cidrs), ""),
        "node-port-addresses": dict.fromkeys(_networks(settings.node_port_addresses), ""),
        "service-cidrs": dict.fromkeys(_networks(settings.service_cidrs), ""),
    }
    chains = {
        "prerouting": (
            "type nat hook prerouting priority dstnat ; policy accept ;",
            f"{words.ip} daddr {words.loopback} return",
            "jump services",
        ),
        "output": ("type nat hook output priority -100 ; policy accept ;", "jump services"),
        "postrouting": (
            "type nat hook postrouting priority srcnat - 1 ; policy accept ;",
            *_masquerade(words, settings.masquerade_mark),
        ),
        "services": _services(words, settings),
        "unknown-port": _reject(),
        "no-endpoint": (_count(words, "no-endpoint"), *_reject()),
        "local-policy": (_count(words, "local-policy"), "drop"),
        "source-range": (_count(words, "source-range"), "drop"),
        # what was led elsewhere, by whomever, is somebody's; the node's own addresses are its own
        "unallocated": (
            "ct status dnat return",
            "fib daddr type local return",
            "update @unallocated-counts { meta l4proto counter }",
            "drop",
        ),
    }
    if settings.service_cidrs:
        for chain, hook in (("forward", "forward"), ("filter-output", "output")):
            chains[chain] = (
                f"type filter hook {hook} priority filter ; policy accept ;",
                f"ct state new {words.ip} daddr @service-cidrs goto unallocated",
            )
    if uses_loopback(family, settings):
        chains["input"] = (
            "type filter hook input priority filter ; policy accept ;",
            # route_localnet lets packets to 127.0.0.0/8 in from outside (CVE-2020-8558): replies only.
            f'iifname != "lo" ip daddr {words.loopback} ct state established,related accept',
            f'iifname != "lo" ip daddr {words.loopback} drop',
        )
    for kind in KINDS:
        chains.update(_verdict_chains(words, kind, settings.masquerade_mark))
    return Layout(sets, chains, {name: wanted for name, wanted in elements.items() if wanted})


def uses_loopback(family: Family, settings: NodeSettings) -> bool:
    """Whether node ports answer on loopback addresses."""
    if family is Family.V6 or not settings.localhost_node_ports:
        return False
    return not settings.node_port_addresses or inside("127.0.0.1", settings.node_port_addresses)


def _declarations(words: Words) -> dict[str, str]:
    address = words.address_type
    found = {
        "cluster-ips": f"set {{ type {address} ; }}",
        "hairpin": f"set {{ type {address} . {address} ; }}",
        "pod-networks": f"set {{ type {address} ; flags interval ; }}",
        "node-port-addresses": f"set {{ type {address} ; flags interval ; }}",
        "service-cidrs": f"set {{ type {address} ; flags interval ; }}",
    }
    for kind in KINDS:
        key = kind.key_type(words)
        found[kind.frontends] = f"map {{ type {key} : verdict ; }}"
        found[f"{kind.prefix}-source-ranges"] = f"set {{ type {key} . {address} ; flags interval ; }}"
        for which in ("cluster", "local"):
            found[f"{kind.prefix}-{which}-picks"] = f"map {{ type {key} : verdict ; }}"
        for protocol in PROTOCOLS:
            # `typeof` and a map a protocol: nft 1.0.6 has no name for numgen's type, and finds `th dport` in the key of
            # a map that is in the kernel already in conflict with the protocol of the rule that uses it.
            found[f"{kind.prefix}-endpoints-{protocol}"] = (
                f"map {{ typeof {kind.endpoint_expression(words, protocol)} . numgen random mod 2"
                f" : {words.ip} daddr . {protocol} dport ; }}"
            )
    for reason in REASONS:
        # of addresses that are nobody's, whoever looks for hosts can name thousands: by protocol only
        key, size = ("inet_proto", 256) if reason == "unallocated" else (SERVICE.key_type(words), 65535)
        found[f"{reason}-counts"] = f"set {{ type {key} ; size {size} ; flags dynamic,timeout ; timeout 1d ; }}"
    return found


def _services(words: Words, settings: NodeSettings) -> tuple[str, ...]:
    among = f"{words.ip} daddr @node-port-addresses " if settings.node_port_addresses else ""
    return (
        f"{SERVICE.key_expression(words)} vmap @{SERVICE.frontends}",
        f"{words.ip} daddr @cluster-ips goto unknown-port",
        *(() if uses_loopback(words.family, settings) else (f"{words.ip} daddr {words.loopback} return",)),
        f"{among}fib daddr type local {NODE_PORT.key_expression(words)} vmap @{NODE_PORT.frontends}",
    )


def _masquerade(words: Words, mark: int) -> tuple[str, ...]:
    return (
        f"meta mark & {mark:#010x} == {mark:#010x} meta mark set meta mark & {~mark & 0xFFFFFFFF:#010x}"
        " masquerade fully-random",
        f"ct status dnat {words.ip} saddr . {words.ip} daddr @hairpin masquerade fully-random",
    )


def _reject() -> tuple[str, ...]:
    return ("meta l4proto tcp reject with tcp reset", "reject")


def _count(words: Words, reason: str) -> str:
    return f"update @{reason}-counts {{ {SERVICE.key_expression(words)} counter }}"


def _verdict_chains(words: Words, kind: Kind, mark: int) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for which in ("cluster", "local"):
        chain = f"{kind.prefix}-{which}"
        found[chain] = (
            f"{kind.key_expression(words)} vmap @{kind.prefix}-{which}-picks",
            "goto no-endpoint",
        )
        found[f"{chain}-masq"] = (f"meta mark set meta mark | {mark:#010x}", f"goto {chain}")
    return found


def verdict_word(verdict: Verdict) -> str:
    """Return a verdict's part in a policy chain's name."""
    if verdict.action in (Action.CLUSTER, Action.LOCAL):
        return f"{verdict.action.value}-masq" if verdict.masquerade else str(verdict.action.value)
    return str(verdict.action.value)


def verdict_chain(kind: Kind, word: str) -> str:
    """Return the chain that carries out a verdict."""
    return {"reject": "no-endpoint", "drop": "local-policy"}.get(word, f"{kind.prefix}-{word}")


def policy_chain(
    words: Words, settings: NodeSettings, kind: Kind, verdicts: tuple[str, str, str]
) -> tuple[str, tuple[str, ...]]:
    """Return name and rules of the chain for frontends whose pod, node and outside verdicts are these."""
    pod, node, outside = verdicts
    name = f"{kind.prefix}/{pod}/{node}/{outside}"
    rules = []
    from_pod = pod_match(words, settings)
    if from_pod and not pod == node == outside:
        rules.append(f"{from_pod} goto {verdict_chain(kind, pod)}")
    if node != outside:
        rules.append(f"fib saddr type local goto {verdict_chain(kind, node)}")
    rules.append(f"goto {verdict_chain(kind, outside)}")
    return name, tuple(rules)


def ranged_chain(words: Words, kind: Kind, policy: str) -> tuple[str, tuple[str, ...]]:
    """Return name and rules of the chain for frontends of `policy` that only some networks may use."""
    return f"ranged-{policy}", (
        f"{kind.key_expression(words)} . {words.ip} saddr @{kind.prefix}-source-ranges goto {policy}",
        "goto source-range",
    )


def pick_chain(words: Words, kind: Kind, which: str, protocol: str, slots: int) -> tuple[str, tuple[str, ...]]:
    """Return name and rules of the chain that picks one of `slots` slots of a cluster or local list at random."""
    offset = f" offset {LOCAL_OFFSET}" if which == "local" else ""
    return f"{kind.prefix}-{which}-{protocol}-{slots}", (
        f"dnat {words.ip} addr . port to {kind.endpoint_expression(words, protocol)}"
        f" . numgen random mod {slots}{offset} map @{kind.prefix}-endpoints-{protocol}",
    )


_PICK = re.compile(r"(service|node-port)-(cluster|local)-(tcp|udp|sctp)-(\d+)")


def pick_facts(chain: str) -> tuple[Kind, str, str, int] | None:
    """Return what `pick_chain` named a chain for: kind, list, protocol, slots; None for any other chain."""
    if not (found := _PICK.fullmatch(chain)):
        return None
    return SERVICE if found[1] == "service" else NODE_PORT, found[2], found[3], int(found[4])


def pod_match(words: Words, settings: NodeSettings) -> str:
    """Return the condition that says: from a pod. Empty: nobody counts as one."""
    detector = settings.detector
    if detector.kind is LocalKind.CIDR:
        return f"{words.ip} saddr @pod-networks" if detector.cidrs else ""
    if detector.kind is LocalKind.NONE:
        return ""
    if not _INTERFACE.fullmatch(detector.interface):
        raise ValueError(f"detect-local interface {detector.interface!r}: not a name that a rule can hold")
    return f'iifname "{detector.interface}{"*" if detector.kind is LocalKind.PREFIX else ""}"'


def _networks(texts: Iterable[str]) -> list[str]:
    return [str(network) for network in collapsed(texts)]


def collapsed(networks: Iterable[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return the same networks without overlaps: the kernel's sets of intervals take none."""
    parsed = [ipaddress.ip_network(network, strict=False) for network in networks]
    return list(ipaddress.collapse_addresses(parsed))  # type: ignore[type-var]
