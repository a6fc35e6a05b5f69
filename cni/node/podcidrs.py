"""Which node gets which pod CIDRs, where nobody else decides: deterministic, stable, without conflict. Pure.

A node's place is found from its name alone, so that two agents that see the same Nodes decide the same, also when the
record is lost. The record makes it stable: what a node has, it keeps, also while its Node is away, as long as there is
room, and under another mask size.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping

import msgspec

from cni.node.nodes import Claim, Claims, claim_of
from pynet.netstate import family_of

MASK_SIZES = {4: 24, 6: 64}  # as the cluster's node IPAM controller has them


class BadPool(ValueError):
    """Cluster CIDRs and mask sizes that give no pod CIDRs; says which flag, and why."""


class Pool(msgspec.Struct, frozen=True):
    """The pod CIDRs of one length within one cluster CIDR."""

    cidr: str
    length: int

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 << (self.length - int(self.cidr.rpartition("/")[2]))

    def place(self, number: int) -> str:
        """Return the pod CIDR of that number."""
        network = ipaddress.ip_network(self.cidr)
        width = network.max_prefixlen - self.length
        return f"{network.network_address + (number << width)}/{self.length}"

    def holds(self, cidr: str) -> bool:
        """Say whether `cidr` is a part of the cluster CIDR: of another length, it was assigned under other flags."""
        own, asked = claim_of(self.cidr), _claim(cidr)
        return asked is not None and own.first <= asked.first and asked.last <= own.last


def pools(cluster_cidrs: Iterable[str], mask_sizes: Mapping[int, int]) -> tuple[Pool, ...]:
    """Return one pool for each cluster CIDR, at most one a family. Raise `BadPool`."""
    found: dict[int, Pool] = {}
    for cidr in cluster_cidrs:
        family = family_of(cidr)
        length = mask_sizes.get(family, MASK_SIZES[family])
        outer = int(cidr.rpartition("/")[2])
        if family in found:
            raise BadPool(f"--cluster-cidr {cidr}: a second one of IPv{family}; nodes get one pod CIDR a family")
        if not outer <= length <= (30 if family == 4 else 126):
            raise BadPool(f"--node-cidr-mask-size {length}: no subnet of --cluster-cidr {cidr} that has room for pods")
        if length - outer > 64:
            raise BadPool(f"--node-cidr-mask-size {length}: more than 2**64 subnets of --cluster-cidr {cidr}")
        found[family] = Pool(cidr, length)
    if not found:
        raise BadPool("--allocate-node-cidrs needs --cluster-cidr")
    return tuple(found.values())


def assign(
    names: Collection[str],
    taken: Iterable[str],
    record: Mapping[str, tuple[str, ...]],
    pools: Collection[Pool],
    own: str = "",
) -> dict[str, tuple[str, ...]]:
    """Return the new record: the pod CIDRs of every one of `names` (one a pool; fewer when a pool is full), and of
    nodes that are away as long as nobody needs theirs. `taken`: what other nodes have without us.

    Only `own`, the node that decides, loses what is outside of the cluster CIDR of its family: others may have been
    started with other flags by now, and would take it back.
    """
    found: dict[str, tuple[str, ...]] = {}
    for pool in pools:
        fixed = Claims()
        for cidr in taken:
            _take(fixed, cidr, "")
        for name, cidr in _assign_one(sorted(names), fixed, record, pool, own).items():
            found[name] = (*found.get(name, ()), cidr)
    families = {family_of(pool.cidr) for pool in pools}
    for name in found:
        found[name] += tuple(cidr for cidr in record.get(name, ()) if family_of(cidr) not in families)
    return found


def _assign_one(
    names: list[str], claims: Claims, record: Mapping[str, tuple[str, ...]], pool: Pool, own: str
) -> dict[str, str]:
    found: dict[str, str] = {}
    away = sorted(record.keys() - set(names))
    for name in [*names, *away]:
        of_family = [cidr for cidr in record.get(name, ()) if family_of(cidr) == family_of(pool.cidr)]
        kept = [cidr for cidr in of_family if pool.holds(cidr) or name != own]
        if kept and _take(claims, kept[0], name):
            found[name] = kept[0]
    for name in names:
        if name in found:
            continue
        free = _free(claims, pool, name)
        if free is None:
            # full: the place of one that is away is given to one that is here
            victim = next((other for other in away if other in found and pool.holds(found[other])), None)
            if victim is None:
                continue
            claims.drop(claim_of(found.pop(victim)))
            free = _free(claims, pool, name)
            if free is None:
                continue
        _take(claims, free, name)
        found[name] = free
    return found


def _free(claims: Claims, pool: Pool, name: str) -> str | None:
    """Return the free place nearest above the one that the name asks for."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big") % pool.size
    last = claim_of(pool.cidr).last
    step = 0
    while step < pool.size:
        number = (start + step) % pool.size
        claim = claim_of(pool.place(number))
        holder = claims.holder(claim.first, claim.last)
        if holder is None:
            return claim.cidr
        # past all of what holds it, which may be larger than a place
        width = claim.last - claim.first + 1
        step += (min(holder[0].last, last) - claim.first) // width + 1
    return None


def _claim(cidr: str) -> Claim | None:
    """Return what a record says as a claim; None where it is no pod CIDR."""
    try:
        return claim_of(cidr)
    except ValueError:
        return None


def _take(claims: Claims, cidr: str, name: str) -> bool:
    """Note a pod CIDR; return False where it is taken, in whole or part."""
    claim = _claim(cidr)
    if claim is None or claims.holder(claim.first, claim.last) is not None:
        return False
    claims.take(claim, name)
    return True
