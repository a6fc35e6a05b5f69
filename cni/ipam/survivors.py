"""Which addresses the running pods of a network have, by what the aliases of their links say."""

from __future__ import annotations

import ipaddress

from cni import naming
from cni.ipam.store import Owner
from pynet.kernel import netlink, rtnl


def survivors(network: str) -> list[tuple[Owner, list[tuple[int, int]]]]:
    """Return the owners of addresses, each with its addresses as (family, number)."""
    found: list[tuple[Owner, list[tuple[int, int]]]] = []
    with netlink.Socket() as host:
        for link in rtnl.links(host, kind="veth"):
            mark = naming.mark(link.alias)
            if mark is not None and mark.network == network:
                addresses = [ipaddress.ip_address(text) for text in mark.addresses]
                found.append((Owner(mark.container, mark.ifname), [(int(a.version), int(a)) for a in addresses]))
    return found
