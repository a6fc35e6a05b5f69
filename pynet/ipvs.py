"""IPVS in values: what a virtual server and its destinations are, the schedulers' names. Pure.

Numbers are those of linux/ip_vs.h.
"""

from __future__ import annotations

import msgspec

SCHEDULERS = ("rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh", "lblc", "lblcr", "fo", "ovf", "twos")

PERSISTENT = 0x1
SCHED_FALLBACK = 0x8  # sh, mh: another destination where the hashed one has weight 0


class ServiceId(msgspec.Struct, frozen=True, gc=False, order=True):
    """What names a virtual server: address, port and protocol, or a firewall mark (then those are empty)."""

    version: int
    address: str = ""
    port: int = 0
    protocol: str = ""
    mark: int = 0

    def __str__(self) -> str:
        if self.mark:
            return f"mark {self.mark:#x} (IPv{self.version})"
        address = f"[{self.address}]" if self.version == 6 else self.address
        return f"{self.protocol} {address}:{self.port}"


class Service(msgspec.Struct, frozen=True, gc=False):
    """How a virtual server chooses. `persistence`: seconds that a client address stays with one destination."""

    scheduler: str
    persistence: int = 0
    flags: int = 0


class DestinationId(msgspec.Struct, frozen=True, gc=False, order=True):
    """What names a destination of a virtual server."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Destination(msgspec.Struct, frozen=True, gc=False):
    """A destination's state; the connections are the kernel's counts."""

    weight: int
    active: int = 0
    inactive: int = 0


class Timeouts(msgspec.Struct, frozen=True):
    """Idle times in seconds; 0 leaves the kernel's."""

    tcp: int = 0
    tcp_fin: int = 0
    udp: int = 0
