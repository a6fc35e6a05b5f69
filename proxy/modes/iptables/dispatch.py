"""How a packet finds its Service's chain: a tree over the bits of an address, or of a port, instead of a list. Pure.

A node of the tree is a chain: of rules where it holds few entries, else of jumps, one for each value of the next bits
in which its entries differ. The tree is a function of the set of entries, however it came about.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import msgspec

from proxy.plan import Family

LEAF = 16  # rules that are read one after the other before a chain is split
STRIDE = 4  # bits a level
ROOT = "PYNET-IPS"
NODE_PORTS = "PYNET-NODEPORTS"

Chains = dict[str, list[str]]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What leads to a Service's chain. `address`: empty for a node port; `protocol`: as iptables spells it."""

    address: str
    protocol: str
    port: int
    target: str
    comment: str


class _Space(msgspec.Struct, frozen=True):
    """A space of keys that a tree divides: how many bits, how a prefix is matched, what its chain is called."""

    bits: int
    match: Callable[[int, int], str]
    name: Callable[[int, int], str]


def digest(text: str) -> str:
    """Return 16 characters that stand for `text` in a chain's name (28 characters are the most a chain may have)."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]


def address_chains(family: Family, entries: Iterable[Entry], refused: frozenset[str]) -> Chains:
    """Return the tree over addresses, its root named `ROOT`. `refused`: addresses whose other ports are refused."""
    by_address: dict[str, list[Entry]] = {}
    for entry in entries:
        by_address.setdefault(entry.address, []).append(entry)
    length = 128 if family is Family.V6 else 32
    chains: Chains = {}
    leaves = []
    for address in by_address.keys() | refused:
        here = sorted(by_address.get(address, ()), key=_by_port)
        rules = _port_rules(f"-d {address}/{length} ", address, here, chains)
        if address in refused:
            rules.append(f"-d {address}/{length} -j PYNET-REJECT")
        leaves.append((_number(address), rules))
    leaves.sort()
    _grow(_space_of_addresses(family), ROOT, leaves, chains)
    return chains


def node_port_chains(head: Sequence[str], entries: Iterable[Entry]) -> Chains:
    """Return the trees over node ports, their root named `NODE_PORTS` and beginning with `head`."""
    chains: Chains = {}
    rules = _port_rules("", "", sorted(entries, key=_by_port), chains)
    chains[NODE_PORTS] = [*head, *rules]
    return chains


def _by_port(entry: Entry) -> tuple[str, int]:
    return entry.protocol, entry.port


def _number(address: str) -> int:
    return int(ipaddress.ip_address(address))


def _port_rules(prefix: str, address: str, entries: list[Entry], chains: Chains) -> list[str]:
    """Return the rules that tell `entries`, all of one address, by protocol and port."""
    rules: list[str] = []
    for protocol, group in groupby(entries, key=lambda entry: entry.protocol):
        leaves = [(entry.port, [_rule(prefix, entry)]) for entry in group]
        if len(leaves) <= LEAF:
            rules += (rule for _, found in leaves for rule in found)
            continue
        root = f"PYNET-PT-{digest(f'{address}|{protocol}')}"
        _grow(_space_of_ports(address, protocol), root, leaves, chains)
        rules.append(f"{prefix}-p {protocol} -j {root}")
    return rules


def _rule(prefix: str, entry: Entry) -> str:
    return (
        f"{prefix}-p {entry.protocol} -m {entry.protocol} --dport {entry.port} "
        f'-m comment --comment "{entry.comment}" -j {entry.target}'
    )


def _space_of_addresses(family: Family) -> _Space:
    if family is Family.V4:

        def text(prefix: int) -> str:
            return str(ipaddress.IPv4Address(prefix))

        return _Space(32, lambda p, n: f"-d {text(p)}/{n}", lambda p, n: f"PYNET-IP-{text(p)}-{n}")

    def text6(prefix: int) -> str:
        return str(ipaddress.IPv6Address(prefix))

    return _Space(128, lambda p, n: f"-d {text6(p)}/{n}", lambda p, n: f"PYNET-IP-{digest(f'{text6(p)}/{n}')}")


def _space_of_ports(address: str, protocol: str) -> _Space:
    def match(prefix: int, length: int) -> str:
        return f"-p {protocol} -m {protocol} --dport {prefix}:{prefix + (1 << (16 - length)) - 1}"

    def name(prefix: int, length: int) -> str:
        if not address:
            return f"PYNET-NP-{protocol}-{prefix}-{length}"
        return f"PYNET-PT-{digest(f'{address}|{protocol}|{prefix}/{length}')}"

    return _Space(16, match, name)


def _grow(space: _Space, chain: str, leaves: list[tuple[int, list[str]]], chains: Chains) -> None:
    """Fill `chain` for `leaves` (key → rules, sorted by key) and whatever chains it needs below."""
    size = sum(len(rules) for _, rules in leaves)
    if size <= LEAF or len(leaves) == 1:
        chains[chain] = [rule for _, rules in leaves for rule in rules]
        return
    common = space.bits - (leaves[0][0] ^ leaves[-1][0]).bit_length()
    length = min(common + STRIDE, space.bits)
    shift = space.bits - length
    rules: list[str] = []
    for value, group in groupby(leaves, key=lambda leaf: leaf[0] >> shift):
        below = list(group)
        if sum(len(found) for _, found in below) <= 1:
            rules += (rule for _, found in below for rule in found)
            continue
        prefix = value << shift
        name = space.name(prefix, length)
        _grow(space, name, below, chains)
        rules.append(f"{space.match(prefix, length)} -j {name}")
    chains[chain] = rules
