"""What the tables of nftables mode are called, and how one family's words differ from the other's. Pure."""

from __future__ import annotations

import hashlib

import msgspec

from proxy.plan import Family, ServerKey

TABLE = "pynet-proxy"
PROTOCOLS = ("tcp", "udp", "sctp")
REASONS = ("no-endpoint", "local-policy", "source-range", "unallocated")  # why packets are refused or dropped
LOCAL_OFFSET = 1 << 24  # where the local endpoints of a Service port begin in the endpoint maps' index


class Words(msgspec.Struct, frozen=True):
    """How one address family is spelt in rules."""

    family: Family
    ip: str
    address_type: str
    loopback: str


WORDS = {
    Family.V4: Words(Family.V4, "ip", "ipv4_addr", "127.0.0.0/8"),
    Family.V6: Words(Family.V6, "ip6", "ipv6_addr", "::1"),
}


class Kind(msgspec.Struct, frozen=True):
    """The two kinds of frontends: with an address of their own, or a node port on any of the node's addresses.

    `prefix` begins the names of what belongs to the kind; `frontends` is its map of verdicts.
    """

    prefix: str
    frontends: str
    by_address: bool

    def key_expression(self, words: Words) -> str:
        """Return what the frontends' and picks' maps are asked."""
        return f"{words.ip} daddr . meta l4proto . th dport" if self.by_address else "meta l4proto . th dport"

    def key_type(self, words: Words) -> str:
        """Return the type of that key."""
        return f"{words.address_type} . inet_proto . inet_service" if self.by_address else "inet_proto . inet_service"

    def endpoint_expression(self, words: Words, protocol: str) -> str:
        """Return what the endpoints' map of `protocol` is asked, before the index."""
        return f"{words.ip} daddr . {protocol} dport" if self.by_address else f"{protocol} dport"


SERVICE = Kind("service", "frontends", True)
NODE_PORT = Kind("node-port", "node-ports", False)
KINDS = (SERVICE, NODE_PORT)


def own_name(purpose: str, key: ServerKey, which: str) -> str:
    """Return the name of a chain and map of one Service port; nothing of the Service's own spelling is in it."""
    digest = hashlib.sha256("\0".join((key.service, key.port_name, key.protocol)).encode()).hexdigest()[:16]
    return f"{purpose}-{digest}-{which}"
