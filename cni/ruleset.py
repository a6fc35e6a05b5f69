"""Our nftables table `inet pynet-cni`: its constant objects as text, and one transaction for all elements of a pod.

A pod adds elements, never rules: `masquerade4`/`masquerade6` send its addresses to its network's chain, `ports4` and
`ports6` hold its host ports. `cluster4`/`cluster6` are for pynetd: destinations that are never masqueraded.
"""

from __future__ import annotations

import hashlib
import re

from pynet.kernel import nftables

FAMILY = "inet"
TABLE = "pynet-cni"
HERE = f"{FAMILY} {TABLE}"

BASE = f"""\
add table {HERE}
add set {HERE} cluster4 {{ type ipv4_addr; flags interval; auto-merge; }}
add set {HERE} cluster6 {{ type ipv6_addr; flags interval; auto-merge; }}
add map {HERE} masquerade4 {{ type ipv4_addr : verdict; }}
add map {HERE} masquerade6 {{ type ipv6_addr : verdict; }}
add chain {HERE} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
flush chain {HERE} postrouting
add rule {HERE} postrouting ip saddr vmap @masquerade4
add rule {HERE} postrouting ip6 saddr vmap @masquerade6
"""

_PLAIN = re.compile(r"[A-Za-z0-9_.@/\-]{1,120}\Z")


def owner(container: str, ifname: str) -> str:
    """Return what an element's comment says of whose it is; a hash where nftables could not hold the name."""
    plain = f"{container}/{ifname}"
    return plain if _PLAIN.match(plain) else hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def apply(chains: str, elements: list[str]) -> None:
    """Add elements in one transaction; where the constant objects or `chains` are missing, these in the same one."""
    if not elements:
        return
    script = "".join(f"add element {HERE} {element}\n" for element in elements)
    try:
        nftables.apply(script)
    except nftables.NftError as error:
        if "No such file or directory" not in str(error):
            raise
        nftables.apply(BASE + chains + script)


def remove(elements: list[str], tag: str) -> None:
    """Remove elements (`map { key }`); where some are missing, all that carry the owner's `tag`."""
    if not elements:
        return
    try:
        nftables.apply("".join(f"delete element {HERE} {element}\n" for element in elements))
    except nftables.NftError as error:
        if "No such file or directory" not in str(error):
            raise
        remove_owned(tag)


def remove_owned(tag: str) -> None:
    """Remove all elements that carry the owner's `tag`, found by listing the table."""
    elements = [f"{name} {{ {key} }}" for name, key, found in owned() if found == tag]
    if elements:
        nftables.apply("".join(f"delete element {HERE} {element}\n" for element in elements))


def owned() -> list[tuple[str, str, str]]:
    """Return map, key and owner of every element in the table that has an owner."""
    found = []
    for entry in nftables.list_table(FAMILY, TABLE):
        named = entry.get("map") or entry.get("set")
        if named is None:
            continue
        for element in named.get("elem", ()):
            key = element[0] if isinstance(element, list) else element
            inner = key.get("elem") if isinstance(key, dict) else None
            if inner and inner.get("comment"):
                found.append((named["name"], _key(inner["val"]), inner["comment"]))
    return found


def _key(value: object) -> str:
    if isinstance(value, dict) and "concat" in value:
        return " . ".join(_key(part) for part in value["concat"])
    return str(value)
