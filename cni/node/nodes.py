"""Nodes as the agent sees them: who has which pod CIDRs and can be reached at which address. Pure.

What a Node says wrongly is told as a `Problem` that names the object and the field, and is left out.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from functools import lru_cache

import msgspec

from pynet.netstate import family_of
from pynet.objects import Node

_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
ADDRESS_TYPES = ("InternalIP", "ExternalIP")  # in order of preference


class Problem(msgspec.Struct, frozen=True, order=True):
    """Something an operator should know: `object` names whose it is."""

    object: str
    reason: str


class Claim(msgspec.Struct, frozen=True, gc=False):
    """A pod CIDR and its first and last address as numbers; IPv6 ones are offset so that families never meet."""

    cidr: str
    first: int
    last: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return family_of(self.cidr)

    @property
    def base(self) -> str:
        """The CIDR's own address, which no pod has."""
        return self.cidr.partition("/")[0]


class Member(msgspec.Struct, frozen=True, gc=False):
    """A node of the cluster. `v4`, `v6`: where it is reached; `addresses`: all of its addresses."""

    name: str
    v4: str = ""
    v6: str = ""
    prefers: int = 4
    claims: tuple[Claim, ...] = ()
    addresses: tuple[str, ...] = ()
    created: str = ""
    problems: tuple[Problem, ...] = ()

    def address(self, family: int) -> str:
        """Return the address of a family, or ""."""
        return self.v6 if family == 6 else self.v4


@lru_cache(maxsize=1 << 16)
def number_of(address: str) -> int:
    """Return an address as a number; IPv6 ones lie above all of IPv4's (`::` is 2**129)."""
    parsed = ipaddress.ip_address(address)
    return int(parsed) + (1 << 129 if parsed.version == 6 else 0)


def claim_of(cidr: str) -> Claim:
    """Return a CIDR as a claim. Raise ValueError that says what is wrong with it."""
    network = ipaddress.ip_network(cidr)
    first = number_of(str(network.network_address))
    return Claim(str(network), first, first + network.num_addresses - 1)


def pod_claim(cidr: str) -> Claim:
    """Return a Node's pod CIDR as a claim. Raise ValueError that says what is wrong with it."""
    claim = claim_of(cidr)
    for other in _NOT_FOR_PODS:
        if claim.first <= other.last and other.first <= claim.last:
            raise ValueError(f"{cidr} holds addresses of {other.cidr}, which no pod can have")
    return claim


# "this network", loopback, multicast; of IPv6 also IPv4-mapped and link-local addresses
_NOT_FOR_PODS = [
    claim_of(cidr) for cidr in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "::/8", "fe80::/10", "ff00::/8")
]


def node_address(text: str) -> str:
    """Return an address by which a node can be reached, in its usual spelling; an IPv4-mapped one as IPv4, as the
    Kubernetes API reads it. Raise ValueError.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("is no IP address") from None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_unspecified or address.is_loopback or address.is_multicast or address == _BROADCAST:
        raise ValueError("is no address of a node")
    if isinstance(address, ipaddress.IPv6Address) and address.is_link_local:
        raise ValueError("is link-local: other nodes cannot tell by which link")
    return str(address)


def pod_cidrs_of(node: Node) -> tuple[str, ...]:
    """Return a Node's pod CIDRs as written: `podCIDRs`, and `podCIDR` where that is all there is."""
    return node.spec.pod_cidrs or ((node.spec.pod_cidr,) if node.spec.pod_cidr else ())


def member_of(node: Node, assigned: tuple[str, ...] = ()) -> Member:
    """Return what a Node says of itself; `assigned`: its pod CIDRs where the Node has none."""
    name = node.metadata.name
    where = f"Node {name}"
    problems: list[Problem] = []
    claims: list[Claim] = []
    for cidr in pod_cidrs_of(node) or assigned:
        try:
            claims.append(pod_claim(cidr))
        except ValueError as error:
            problems.append(Problem(where, f"spec.podCIDRs: {error}"))
    by_type: dict[str, list[str]] = {kind: [] for kind in ADDRESS_TYPES}
    for entry in (node.status.addresses if node.status else None) or ():
        if entry.type not in by_type:
            continue
        try:
            by_type[entry.type].append(node_address(entry.address))
        except ValueError as error:
            problems.append(Problem(where, f"status.addresses: {entry.type} {entry.address!r} {error}"))
    addresses = tuple(address for kind in ADDRESS_TYPES for address in by_type[kind])
    reached = {family: next((a for a in addresses if family_of(a) == family), "") for family in (4, 6)}
    return Member(
        name=name,
        v4=reached[4],
        v6=reached[6],
        prefers=family_of(addresses[0]) if addresses else 4,
        claims=tuple(dict.fromkeys(claims)),
        addresses=tuple(dict.fromkeys(addresses)),
        created=node.metadata.creation_timestamp or "",
        problems=tuple(problems),
    )


class Claims:
    """Who holds which pod CIDR, no two of them overlapping. Found by address in a time that does not grow.

    `nodes`: all nodes' addresses.
    """

    def __init__(self, nodes: Iterable[str] = ()) -> None:
        self._nodes = {number_of(address): address for address in nodes}
        self._numbers = sorted(self._nodes)
        self._firsts: list[int] = []
        self._by_first: dict[int, tuple[Claim, str]] = {}

    def holder(self, first: int, last: int) -> tuple[Claim, str] | None:
        """Return a claim that shares an address with first … last, and its node's name."""
        at = bisect_right(self._firsts, last)
        if at:
            claim, name = self._by_first[self._firsts[at - 1]]
            if claim.last >= first:
                return claim, name
        return None

    def nodes_in(self, claim: Claim) -> list[str]:
        """Return the nodes' addresses that lie in a CIDR."""
        found = self._numbers[bisect_left(self._numbers, claim.first) : bisect_right(self._numbers, claim.last)]
        return [self._nodes[number] for number in found]

    def all(self) -> tuple[Claim, ...]:
        """Return every claim."""
        return tuple(claim for claim, _ in self._by_first.values())

    def drop(self, claim: Claim) -> None:
        """Forget a claim."""
        del self._firsts[bisect_left(self._firsts, claim.first)]
        del self._by_first[claim.first]

    def take(self, claim: Claim, name: str) -> None:
        """Note a claim, which overlaps with no other one."""
        insort(self._firsts, claim.first)
        self._by_first[claim.first] = (claim, name)


def settle(members: Iterable[Member], own: str) -> tuple[Claims, tuple[Problem, ...]]:
    """Return which node holds which pod CIDR.

    Of two that overlap, this node's own counts, else the Node made last (it took over the name or the CIDR), else the
    first by name. A CIDR that holds an address of a node counts for nobody: its route would cut that node off.
    """
    by_rank = sorted(members, key=lambda member: member.name)
    by_rank.sort(key=lambda member: member.created, reverse=True)
    by_rank.sort(key=lambda member: member.name != own)
    claims, problems = Claims(address for member in by_rank for address in member.addresses), []
    for member in by_rank:
        for claim in member.claims:
            if claims.nodes_in(claim):
                reason = f"spec.podCIDRs: {claim.cidr} holds a node's address: its route would cut that node off"
                problems.append(Problem(f"Node {member.name}", reason))
                continue
            other = claims.holder(claim.first, claim.last)
            if other is None:
                claims.take(claim, member.name)
            else:
                reason = f"spec.podCIDRs: {claim.cidr} overlaps with {other[0].cidr} of Node {other[1]}, which counts"
                problems.append(Problem(f"Node {member.name}", reason))
    return claims, tuple(problems)
