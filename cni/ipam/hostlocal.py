"""host-local's folder of reservations, for pods that the reference plugins made: one file an address, with its owner.

Read when a network's database is made, so that no running pod's address is given again; a file goes with its pod.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

FOLDER = "/var/lib/cni/networks"
_OWNER_BYTES = 4096


class Reservation(NamedTuple):
    """One file: whose address it is; files of old versions name no interface. `at` is when it was written."""

    address: str
    container: str
    ifname: str
    at: float

    @property
    def key(self) -> tuple[int, int]:
        """Family and number of the address."""
        address = ipaddress.ip_address(self.address)
        return address.version, int(address)

    def is_of(self, container: str, ifname: str) -> bool:
        """Say whether it is this attachment's."""
        return self.container == container and self.ifname in ("", ifname)


def folder(config: Mapping[str, Any]) -> str:
    """Return where host-local keeps the reservations of a network with this configuration."""
    ipam = config.get("ipam")
    data_dir = ipam.get("dataDir") if isinstance(ipam, Mapping) else ""
    if not isinstance(data_dir, str) or not data_dir.startswith("/"):
        data_dir = FOLDER
    return f"{data_dir}/{config.get('name', '')}"


def reservations(path: str) -> Iterator[Reservation]:
    """Yield what a folder holds; nothing when it is not there."""
    try:
        names = os.listdir(path)
    except OSError:
        return
    for name in names:
        with suppress(OSError, ValueError):
            ipaddress.ip_address(name)
            with open(f"{path}/{name}", "rb") as file:
                owner = file.read(_OWNER_BYTES).decode(errors="replace").split()
                at = os.fstat(file.fileno()).st_mtime
            yield Reservation(name, owner[0] if owner else "", owner[1] if len(owner) > 1 else "", at)


def forget(path: str, over: Callable[[Reservation], bool]) -> list[str]:
    """Remove the files of what is over; return its addresses. Raise `OSError`."""
    found = [one.address for one in reservations(path) if over(one)]
    for address in found:
        with suppress(FileNotFoundError):
            os.unlink(f"{path}/{address}")
    return found
