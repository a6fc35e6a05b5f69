"""The node around the virtual servers: our dummy link and its addresses, the node's own addresses, the sysctls."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Collection, Iterable

from proxy.modes.ipvs.layout import LINK
from proxy.plan import Family
from pynet.daemon import logs
from pynet.kernel import netlink, rtnl, sysctl
from pynet.kernel.netlink import NetlinkError

log = logs.get(__name__)
ALIAS = "pynet: addresses of Services, for IPVS"
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NODAD = 0x02
_CHUNK = 64
_LO = 1

# name → value; set at each full sync
SYSCTLS = {
    "net/ipv4/vs/conntrack": "1",  # netfilter sees the translated connections: masquerade works on them
    "net/ipv4/vs/expire_nodest_conn": "1",  # a connection of a removed endpoint ends, it is not dropped in silence
    "net/ipv4/vs/expire_quiescent_template": "1",  # affinity to a draining endpoint ends
}
FORWARDING = {Family.V4: "net/ipv4/ip_forward", Family.V6: "net/ipv6/conf/all/forwarding"}
STRICT_ARP = {"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/all/arp_announce": "2"}


class Node:
    """The network namespace in which this was made."""

    def __init__(self) -> None:
        self._socket = netlink.Socket()

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def prepare(self, families: Iterable[Family], *, strict_arp: bool) -> None:
        """Set the sysctls. Raise `SysctlError`."""
        wanted = SYSCTLS | {FORWARDING[family]: "1" for family in families}
        if kernel_version() < (5, 9):
            wanted["net/ipv4/vs/conn_reuse_mode"] = "0"  # 1 s of delay for a reused port (kubernetes#81775)
        for name, value in (wanted | (STRICT_ARP if strict_arp else {})).items():
            if sysctl.write(name, value):
                log.info("sysctl set", extra=logs.fields(name=name.replace("/", "."), value=value))

    def has_link(self) -> bool:
        """Whether our link is there."""
        return rtnl.link_named(self._socket, LINK) is not None

    def own_addresses(self, family: Family) -> tuple[str, ...]:
        """Return the node's addresses, without loopback's, link-local ones and those of our link; sorted."""
        link = rtnl.link_named(self._socket, LINK)
        skipped = {_LO, link.ifindex if link else 0}
        found = {
            socket.inet_ntop(_AF[family], address.packed)
            for address in rtnl.all_addresses(self._socket, _AF[family])
            if address.ifindex not in skipped
        }
        return tuple(sorted(text for text in found if not _is_special(text)))

    def link_addresses(self, family: Family) -> frozenset[str]:
        """Return the addresses that our link has."""
        link = rtnl.link_named(self._socket, LINK)
        if link is None:
            return frozenset()
        found = (
            socket.inet_ntop(_AF[family], address.packed)
            for address in rtnl.addresses(self._socket, link.ifindex, _AF[family])
        )
        return frozenset(text for text in found if not _is_special(text))

    def add(self, addresses: Collection[str]) -> None:
        """Give our link these addresses, and make it where it is missing. Raise `NetlinkError`."""
        link = rtnl.link_named(self._socket, LINK)
        if link is None:
            rtnl.add_link(self._socket, LINK, "dummy", alias=ALIAS)
            link = rtnl.link_named(self._socket, LINK)
            assert link is not None
        self._change(link.ifindex, addresses, add=True)

    def remove(self, addresses: Collection[str]) -> None:
        """Take addresses from our link."""
        link = rtnl.link_named(self._socket, LINK)
        if link is not None:
            self._change(link.ifindex, addresses, add=False)

    def remove_link(self) -> None:
        """Remove our link with all its addresses."""
        link = rtnl.link_named(self._socket, LINK)
        if link is not None:
            rtnl.delete_link(self._socket, link.ifindex)

    def _change(self, index: int, addresses: Collection[str], *, add: bool) -> None:
        messages = []
        for text in sorted(addresses):
            packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
            flags = _NODAD if ":" in text else 0
            messages.append(rtnl.address_request(index, packed, len(packed) * 8, flags=flags, add=add))
        settled = (errno.EEXIST,) if add else (errno.EADDRNOTAVAIL, errno.ENODEV)
        for start in range(0, len(messages), _CHUNK):
            for error in self._socket.batch(messages[start : start + _CHUNK]):
                if error is not None and error.errno not in settled:
                    raise NetlinkError(error.errno, f"address of {LINK}: {error.strerror}")


def kernel_version() -> tuple[int, int]:
    """Return the running kernel's version, as (6, 1)."""
    major, minor, *_ = os.uname().release.replace("-", ".").split(".")
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def _is_special(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.is_loopback or address.is_link_local
