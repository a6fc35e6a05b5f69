"""Which addresses the running pods of a network have: by their links' aliases, and where others made them, by the
addresses that the kernel shows in the pods on the bridge.
"""

from __future__ import annotations

import ipaddress
import time

from cni import naming
from cni.ipam import hostlocal
from cni.ipam.store import Owner
from pynet.kernel import netlink, rtnl

Found = tuple[Owner, list[tuple[int, int]]]
"""An owner and its addresses as (family, number)."""


def survivors(network: str, bridge: str, folder: str) -> list[Found]:
    """Return the owners of addresses. `bridge` is empty where none tells them; `folder` is host-local's.

    Whose an address is that another plugin gave out, host-local's files say; else it is nobody's but its link's.
    """
    held = list(hostlocal.reservations(folder))
    if not bridge:
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return [(Owner(one.container, one.ifname or "eth0"), [one.key]) for one in held if one.at >= boot]
    owners = {one.key: (one.container, one.ifname or "eth0") for one in held}
    found: list[Found] = []
    with netlink.Socket() as host:
        at = rtnl.index_of(bridge)
        for link in rtnl.links(host, kind="veth"):
            mark = naming.mark(link.alias)
            if mark is not None and mark.network == network:
                addresses = [ipaddress.ip_address(text) for text in mark.addresses]
                owner = Owner(mark.container, mark.ifname, netns=link.name)
                found.append((owner, [(int(a.version), int(a)) for a in addresses]))
            elif mark is None and at and link.master == at:
                keys = _keys_in_pod(host, link)
                found += [(Owner(*owners.get(key, ("", "")), netns=link.name), [key]) for key in keys]
    return found


def _keys_in_pod(host: netlink.Socket, link: rtnl.Link) -> list[tuple[int, int]]:
    try:
        addresses = rtnl.peer_addresses(host, link)
    except netlink.NetlinkError:
        if rtnl.link_at(host, link.ifindex) is None:
            return []  # the pod has gone meanwhile
        raise
    everywhere = [address.packed for address in addresses if address.scope == rtnl.SCOPE_UNIVERSE]
    return [(4 if len(packed) == 4 else 6, int.from_bytes(packed, "big")) for packed in everywhere]
