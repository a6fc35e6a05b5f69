"""Our nftables tables `inet pynet-cni` and `bridge pynet-cni`: constant objects, and elements a pod adds or takes away.

A pod adds elements, never rules: `masquerade4`/`masquerade6` send its addresses to its network's chain, `anyports4`,
`ports4` … hold its host ports. `cluster4`/`cluster6` are for pynetd: destinations that are never masqueraded.
"""

from __future__ import annotations

import errno
import ipaddress
import re
from _blake2 import blake2b  # hashlib would load all of OpenSSL
from collections import Counter
from typing import NamedTuple

from cni.netconf import PROTOCOLS
from pynet.kernel import netlink, nftables, nftelements

TABLE = "pynet-cni"
HERE = f"inet {TABLE}"
SPOOF = f"bridge {TABLE}"
HAIRPIN_MARK = "0x2000"
"""Bit 13, the reference portmap's default: set between a host port's DNAT and its postrouting, never longer.

Rules that portmap left behind, at srcnat, masquerade all that has it: ours come before them.
"""
UNMARK = "meta mark set meta mark and 0xffffdfff"

BASE = f"""\
add table {HERE}
add set {HERE} cluster4 {{ type ipv4_addr; flags interval; auto-merge; }}
add set {HERE} cluster6 {{ type ipv6_addr; flags interval; auto-merge; }}
add map {HERE} masquerade4 {{ type ipv4_addr : verdict; }}
add map {HERE} masquerade6 {{ type ipv6_addr : verdict; }}
add map {HERE} ports4 {{ type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; }}
add map {HERE} ports6 {{ type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service; }}
add map {HERE} anyports4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
add map {HERE} anyports6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
add map {HERE} hairpin4 {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
add map {HERE} hairpin6 {{ type ipv6_addr . inet_proto . inet_service : verdict; }}
add chain {HERE} hostports
add chain {HERE} prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}
add chain {HERE} output {{ type nat hook output priority -100; policy accept; }}
add chain {HERE} hairpins {{ type nat hook postrouting priority srcnat - 1; policy accept; }}
add chain {HERE} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
flush chain {HERE} hostports
flush chain {HERE} prerouting
flush chain {HERE} output
flush chain {HERE} hairpins
flush chain {HERE} postrouting
add rule {HERE} hostports meta mark set meta mark or {HAIRPIN_MARK}
add rule {HERE} hostports dnat ip to meta l4proto . ip daddr . th dport map @ports4
add rule {HERE} hostports dnat ip to meta l4proto . th dport map @anyports4
add rule {HERE} hostports dnat ip6 to meta l4proto . ip6 daddr . th dport map @ports6
add rule {HERE} hostports dnat ip6 to meta l4proto . th dport map @anyports6
add rule {HERE} hostports {UNMARK}
add rule {HERE} prerouting fib daddr type local meta l4proto {{ tcp, udp, sctp }} jump hostports
add rule {HERE} output ip6 daddr ::1 return comment "answers would come to ::1 from outside lo: the kernel drops them"
add rule {HERE} output fib daddr type local meta l4proto {{ tcp, udp, sctp }} jump hostports
add rule {HERE} hairpins meta mark and {HAIRPIN_MARK} != 0 ip daddr . meta l4proto . th dport vmap @hairpin4
add rule {HERE} hairpins meta mark and {HAIRPIN_MARK} != 0 ip6 daddr . meta l4proto . th dport vmap @hairpin6
add rule {HERE} postrouting ip saddr vmap @masquerade4
add rule {HERE} postrouting ip6 saddr vmap @masquerade6
"""

_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\Z")
_PLAIN = re.compile(r"(?=.{1,120}\Z)[A-Za-z0-9_.\-]+ [A-Za-z0-9_.@/\-]+\Z")
_ELEMENT = re.compile(r'(\w+) (\S+) (\S+) \{ (.+?)(?: comment "([^"]*)")?(?: : (.+))? \}\Z')


class Element(NamedTuple):
    """An element that is in the kernel, and whose it is by its comment."""

    table: str
    name: str
    key: str
    owner: str
    value: str = ""

    @property
    def text(self) -> str:
        """The element as `nft` names it for removal."""
        return f"{self.table} {self.name} {{ {self.key} }}"


def owner(network: str, container: str, ifname: str) -> str:
    """Return what an element's comment says of whose it is; a hash where nftables could not hold the names."""
    plain = f"{network} {container}/{ifname}"
    if _PLAIN.match(plain):
        return plain
    return f"{network[:40]} {blake2b(plain.encode(errors='surrogateescape'), digest_size=16).hexdigest()}"


def apply(base: str, elements: list[str], *, first: bool) -> None:
    """Add elements (`table map { … }`) in one transaction; where objects are missing, `base` before, in the same one.

    `first`: nobody else has elements, so they most likely are missing.
    """
    if not elements:
        return
    if not first:
        try:
            nftelements.apply([encoded(element) for element in elements], add=True)
            return
        except netlink.NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise
    nftables.apply(base + "".join(f"add element {element}\n" for element in elements))


def encoded(element: str) -> nftelements.Element:
    """Return an element (`table map { key comment "tag" : value }`, or with its key only) as netlink has it."""
    found = _ELEMENT.match(element)
    if found is None:
        raise ValueError(f"{element!r} is no nftables element")
    family, table, name, key, comment, value = found.groups()
    shape = nftelements.Element(family, table, name, _packed(key), comment or "")
    if value is None:
        return shape
    if value.startswith("goto "):
        return shape._replace(goto=value.removeprefix("goto "))
    return shape._replace(value=_packed(value))


def _packed(text: str) -> bytes:
    """Return a key or value's parts, each padded to four bytes as the kernel's registers are."""
    return b"".join(part + bytes(-len(part) % 4) for part in map(_part, text.split(" . ")))


def _part(text: str) -> bytes:
    if text.startswith('"'):
        return text.strip('"').encode().ljust(16, b"\0")  # an interface's name, IFNAMSIZ bytes
    if text in PROTOCOLS:
        return bytes((PROTOCOLS[text],))
    if text.isdecimal():
        return int(text).to_bytes(2, "big")
    if _MAC.match(text):
        return bytes.fromhex(text.replace(":", ""))
    return ipaddress.ip_address(text).packed


def remove(elements: list[str], tag: str) -> None:
    """Remove elements (`table map { key }`); where some are missing, all that carry the owner's `tag`."""
    if not elements:
        return
    try:
        nftelements.apply([encoded(element) for element in elements], add=False)
    except netlink.NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        remove_owned({tag})


def remove_owned(tags: set[str]) -> bool:
    """Remove all elements that carry one of the owners' tags, found by listing; say whether none of others is left."""
    elements, chains = snapshot()
    gone = [element.text for element in elements if element.owner in tags]
    if gone:
        nftables.apply("".join(f"delete element {text}\n" for text in gone))
    return bool(chains) and len(gone) == len(elements)


def owned() -> list[Element]:
    """Return every element in our tables that has an owner."""
    return snapshot()[0]


def others(elements: tuple[str, ...], tag: str) -> list[Element]:
    """Return those of the elements (as named for removal) that are another owner's."""
    wanted = {plain(element) for element in elements}
    return [one for one in owned() if one.owner != tag and plain(one.text) in wanted]


def snapshot() -> tuple[list[Element], Counter[tuple[str, str]]]:
    """Return the elements in our tables that have an owner, and how many rules each (table, chain) has."""
    found: list[Element] = []
    chains: Counter[tuple[str, str]] = Counter()
    for table in (HERE, SPOOF):
        for entry in nftables.list_table(*table.split()):
            if "rule" in entry:
                chains[table, entry["rule"]["chain"]] += 1
            named = entry.get("map") or entry.get("set") or {}
            for element in named.get("elem", ()):
                key, value = element if isinstance(element, list) else (element, "")
                inner = key.get("elem") if isinstance(key, dict) else None
                if inner and inner.get("comment"):
                    said = (table, named["name"], _key(inner["val"]), inner["comment"], _key(value))
                    found.append(Element(*said))
    return found, chains


def wanted(element: str) -> Element:
    """Return an element (`table map { key comment "tag" : value }`) as the kernel is to show it."""
    found = _ELEMENT.match(element)
    if found is None:
        raise ValueError(f"{element!r} is no nftables element")
    family, table, name, key, comment, value = found.groups()
    return Element(f"{family} {table}", name, plain(key), comment or "", value or "")


def rules(script: str) -> Counter[tuple[str, str]]:
    """Return how many rules a script gives each (table, chain)."""
    lines = (line.split(" ", 5) for line in script.splitlines())
    return Counter((f"{line[2]} {line[3]}", line[4]) for line in lines if line[:2] == ["add", "rule"])


def plain(text: str) -> str:
    """Return an element as named for removal, without the quotes that `nft` needs and does not list."""
    return text.replace('"', "")


def remove_tables() -> None:
    """Remove what no pod needs any more; sets that pynetd filled stay, and the table with them.

    To be called while nobody can begin an ADD. Elements of pods whose record is lost keep the tables.
    """
    if owned():
        return
    cluster = any(
        (entry.get("set") or {}).get("elem") for entry in nftables.list_table(*HERE.split()) if "set" in entry
    )
    script = f"add table {SPOOF}\ndelete table {SPOOF}\n"
    if cluster:
        chains = ("hairpins", "postrouting", "prerouting", "output")
        script += "".join(f"flush chain {HERE} {chain}\ndelete chain {HERE} {chain}\n" for chain in chains)
    else:
        script += f"add table {HERE}\ndelete table {HERE}\n"
    nftables.apply(script)


def _key(value: object) -> str:
    if isinstance(value, dict) and "concat" in value:
        return " . ".join(_key(part) for part in value["concat"])
    if isinstance(value, dict) and "goto" in value:
        return f"goto {value['goto']['target']}"
    return str(value)
