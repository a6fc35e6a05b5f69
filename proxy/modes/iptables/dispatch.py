"""How a packet finds its Service's chain: a tree over the bits of an address, or of a port, instead of a list. Pure.

A node of the tree is a chain: of rules where it holds few entries, else of jumps, one for each value of the next bits
in which its entries differ. The tree is a function of the set of entries, however it came about.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from socket import AF_INET, AF_INET6, inet_pton

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


class Directory:
    """Every entry by its address, and the trees over them; what is rendered for an address is kept until it changes."""

    def __init__(self, family: Family, node_port_head: Sequence[str]) -> None:
        self._length = 128 if family is Family.V6 else 32
        self._space = _space_of_addresses(family)
        self._head = list(node_port_head)
        self._entries: dict[str, dict[tuple[str, int], Entry]] = {}
        self._refused: dict[str, int] = {}
        self._leaves: dict[str, tuple[int, list[str]]] = {}
        self._branches: dict[str, Chains] = {}
        self._stale: set[str] = set()

    def add(self, entries: Iterable[Entry], refused: Iterable[str]) -> None:
        """Take in the entries of a Service port; `refused`: its addresses whose other ports are refused."""
        for entry in entries:
            self._entries.setdefault(entry.address, {})[entry.protocol, entry.port] = entry
            self._stale.add(entry.address)
        for address in refused:
            self._refused[address] = self._refused.get(address, 0) + 1
            self._stale.add(address)

    def remove(self, entries: Iterable[Entry], refused: Iterable[str]) -> None:
        """Forget what was added for a Service port."""
        for entry in entries:
            here = self._entries[entry.address]
            if here.get((entry.protocol, entry.port)) == entry:
                del here[entry.protocol, entry.port]
            if not here:
                del self._entries[entry.address]
            self._stale.add(entry.address)
        for address in refused:
            self._refused[address] -= 1
            if not self._refused[address]:
                del self._refused[address]
            self._stale.add(address)

    def chains(self) -> Chains:
        """Return the trees of addresses (`ROOT`) and of node ports (`NODE_PORTS`); a chain follows those it uses."""
        for address in self._stale:
            self._render(address)
        self._stale.clear()
        chains: Chains = {}
        for branches in self._branches.values():
            chains.update(branches)
        leaves = sorted(leaf for address, leaf in self._leaves.items() if address)
        _grow(self._space, ROOT, leaves, chains)
        chains[NODE_PORTS] = self._head + (self._leaves[""][1] if "" in self._leaves else [])
        return chains

    def _render(self, address: str) -> None:
        self._leaves.pop(address, None)
        self._branches.pop(address, None)
        entries = [entry for _, entry in sorted(self._entries.get(address, {}).items())]
        branches: Chains = {}
        prefix = f"-d {address}/{self._length} " if address else ""
        rules = _port_rules(prefix, address, entries, branches)
        if address in self._refused:
            rules.append(f"{prefix}-j PYNET-REJECT")
        if rules:
            self._leaves[address] = (_number(address) if address else 0, rules)
        if branches:
            self._branches[address] = branches


def port_tree(root: str, protocol: str, rules: Mapping[int, str]) -> Chains:
    """Return the tree over ports that leads to `rules` (port → rule); `root` is its first chain, the last one here."""
    chains: Chains = {}
    _grow(_space_of_ports("", protocol), root, [(port, [rules[port]]) for port in sorted(rules)], chains)
    return chains


def _number(address: str) -> int:
    return int.from_bytes(inet_pton(AF_INET6 if ":" in address else AF_INET, address))


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
