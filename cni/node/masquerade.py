"""What of this node's pods leaves under the node's address, in the terms of ip-masq-agent: decided, and rendered.

From a pod of this node to anything that is not a pod of the cluster, a node, of `--non-masquerade-cidrs`, link-local
(unless asked for), multicast, or an address of this machine. Sets, not a rule for each CIDR. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

import msgspec

TABLE = "pynet-node"
CHAIN = "PYNET-NODE-MASQ"
JUMP = ("-m", "comment", "--comment", "pynetd: pods leaving the cluster", "-j", CHAIN)
LINK_LOCAL = ("169.254.0.0/16", "fe80::/10")  # ip-masq-agent: masqLinkLocal, masqLinkLocalIPv6
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
SETS = {("pods", 4): "ipv4_addr", ("direct", 4): "ipv4_addr", ("pods", 6): "ipv6_addr", ("direct", 6): "ipv6_addr"}


class Masquerade(msgspec.Struct, frozen=True):
    """The sets' contents, merged and sorted: `pods` are masqueraded unless the destination is in `direct`."""

    pods4: tuple[str, ...] = ()
    pods6: tuple[str, ...] = ()
    direct4: tuple[str, ...] = ()
    direct6: tuple[str, ...] = ()

    def members(self, role: str, family: int) -> tuple[str, ...]:
        """Return the contents of one set."""
        found: tuple[str, ...] = getattr(self, f"{role}{family}")
        return found


def masquerade(pods: Iterable[str], direct: Iterable[str]) -> Masquerade:
    """Return the sets for pod CIDRs of this node and destinations (addresses or CIDRs) that are not masqueraded."""
    pods4, pods6 = _merged(pods)
    direct4, direct6 = _merged(direct)
    return Masquerade(pods4, pods6, direct4, direct6)


def _merged(entries: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return prefixes without overlap, as an interval set takes them, by family."""
    four: list[ipaddress.IPv4Network] = []
    six: list[ipaddress.IPv6Network] = []
    for entry in set(entries):
        network = _network(entry)
        if isinstance(network, ipaddress.IPv4Network):
            four.append(network)
        else:
            six.append(network)
    return (
        tuple(str(network) for network in ipaddress.collapse_addresses(four)),
        tuple(str(network) for network in ipaddress.collapse_addresses(six)),
    )


@lru_cache(maxsize=1 << 16)
def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(entry, strict=False)


def nft_table(wanted: Masquerade) -> str:
    """Return the script that puts our table, whatever it was, into the wanted state at once."""
    lines = [f"add table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for (role, family), kind in SETS.items():
        elements = ", ".join(wanted.members(role, family))
        lines.append(f"\tset {role}{family} {{")
        lines.append(f"\t\ttype {kind}; flags interval;")
        if elements:
            lines.append(f"\t\telements = {{ {elements} }}")
        lines.append("\t}")
    # after srcnat itself: a service proxy's own masquerade decides first
    lines.append("\tchain postrouting {")
    lines.append("\t\ttype nat hook postrouting priority srcnat + 10; policy accept;")
    lines.append("\t\tip saddr @pods4 ip daddr != @direct4 goto outside4")
    lines.append("\t\tip6 saddr @pods6 ip6 daddr != @direct6 goto outside6")
    lines.append("\t}")
    for family, header in ((4, "ip"), (6, "ip6")):
        lines.append(f"\tchain outside{family} {{")
        lines.append(f"\t\t{header} daddr {MULTICAST[family]} return")
        lines.append("\t\tfib daddr type local return")
        lines.append("\t\tmasquerade fully-random")
        lines.append("\t}")
    return "\n".join([*lines, "}", ""])


def nft_changes(before: Masquerade, after: Masquerade) -> str:
    """Return the script that leads from one state of the sets to another: a few elements, not the table."""
    lines = []
    for role, family in SETS:
        old, new = set(before.members(role, family)), set(after.members(role, family))
        for verb, elements in (("delete", old - new), ("add", new - old)):
            if elements:
                lines.append(f"{verb} element inet {TABLE} {role}{family} {{ {', '.join(sorted(elements))} }}")
    return "\n".join([*lines, ""]) if lines else ""


def set_name(role: str, family: int) -> str:
    """Return the name of an ipset; of no role, what all names begin with."""
    return f"PYNET-NODE-{role.upper()}-{family}" if role else "PYNET-NODE-"


def chain_rules(family: int) -> list[str]:
    """Return our iptables chain's rules, as `iptables -S` prints them."""
    return [
        f"-A {CHAIN} -m set ! --match-set {set_name('pods', family)} src -j RETURN",
        f"-A {CHAIN} -m set --match-set {set_name('direct', family)} dst -j RETURN",
        f"-A {CHAIN} -m addrtype --dst-type LOCAL -j RETURN",
        f"-A {CHAIN} -d {MULTICAST[family]} -j RETURN",
        f"-A {CHAIN} -j MASQUERADE --random-fully",
    ]
