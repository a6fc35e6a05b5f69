"""How links are named and marked, so that whose they are can be told from the kernel alone. Pure."""

from __future__ import annotations

from _blake2 import blake2b  # hashlib would load all of OpenSSL
from typing import NamedTuple

_MARK = "pynet-cni"


class Mark(NamedTuple):
    """What the alias of a pod's host link says."""

    container: str
    ifname: str
    network: str
    addresses: tuple[str, ...]


def host_link(container: str, ifname: str) -> str:
    """Return the name of the host's end of a pod's veth."""
    return "veth" + _hash(container, ifname)


def ifb_link(container: str, ifname: str) -> str:
    """Return the name of the intermediate device that shapes what a pod sends."""
    return "ifbp" + _hash(container, ifname)


def mac(link: str) -> str:
    """Return the hardware address of a link on the host, locally administered.

    One that is set stays: systemd's MACAddressPolicy changes those that the kernel has drawn (plugins#805). It begins
    high, as a bridge takes the lowest of its ports'.
    """
    digest = blake2b(link.encode(), digest_size=5).hexdigest()
    return ":".join(["fe", *(digest[at : at + 2] for at in range(0, 10, 2))])


def number(container: str, ifname: str) -> int:
    """Return a number of 64 bits that is the attachment's own."""
    return int.from_bytes(_digest(container, ifname), "big")


def _hash(container: str, ifname: str) -> str:
    return _digest(container, ifname).hex()[:11]


def _digest(container: str, ifname: str) -> bytes:
    return blake2b(f"{container}\0{ifname}".encode(errors="surrogateescape"), digest_size=8).digest()


def alias(mark: Mark) -> str:
    """Return the alias; the kernel keeps 255 bytes, so what must not be lost comes first."""
    return f"{_MARK} {mark.ifname} {','.join(mark.addresses) or '-'} {mark.network} {mark.container}"


def mark(text: str) -> Mark | None:
    """Return what an alias of ours says; None for another's."""
    parts = text.split(" ")
    if len(parts) != 5 or parts[0] != _MARK:
        return None
    addresses = () if parts[2] == "-" else tuple(parts[2].split(","))
    return Mark(parts[4], parts[1], parts[3], addresses)
