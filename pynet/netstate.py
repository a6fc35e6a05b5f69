"""What rtnetlink holds, as values: links, addresses, routes, neighbours, forwarding entries.

Pure, and without policy: `pynet.kernel.routes` reads and writes them, whoever decides compares them. Addresses and
prefixes are text in canonical form; an absent one is "".
"""

from __future__ import annotations

import ipaddress

import msgspec

MAIN_TABLE = 254

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def family_of(text: str) -> int:
    """Return 4 or 6 for an address or a prefix."""
    return 6 if ":" in text else 4


class Vxlan(msgspec.Struct, frozen=True, gc=False):
    """What cannot be changed of a VXLAN device. `local`: the underlay address it sends from; `plain`: it learns
    nothing, has no default remote and no link of its own, and no route brings its tunnels along.
    """

    vni: int
    port: int
    local: str
    plain: bool = True


class Link(msgspec.Struct, frozen=True, gc=False):
    """A network device. `master`: the index of the bridge (or bond) that it is a port of, 0 for none."""

    index: int
    name: str
    mtu: int
    up: bool
    kind: str = ""
    mac: str = ""
    master: int = 0
    alias: str = ""
    vxlan: Vxlan | None = None


class LinkAddress(msgspec.Struct, frozen=True, gc=False):
    """An address of a link, with the length of its subnet's prefix."""

    dev: str
    address: str
    length: int


class Route(msgspec.Struct, frozen=True, gc=False):
    """A route of the main table.

    `via`: the next hop, "" on link; "multipath" stands for several. `metric`: the kernel's priority, in IPv6 never 0.
    `onlink`: the next hop is taken to be on `dev` without a route that says so.
    """

    dst: str
    type: str = "unicast"
    via: str = ""
    dev: str = ""
    src: str = ""
    metric: int = 0
    mtu: int = 0
    advmss: int = 0
    onlink: bool = False
    protocol: int = 0


class Neighbour(msgspec.Struct, frozen=True, gc=False):
    """A permanent neighbour: `address` has `mac`, on `dev`."""

    dev: str
    address: str
    mac: str


class Forwarding(msgspec.Struct, frozen=True, gc=False):
    """A permanent entry of a VXLAN device's forwarding table: frames to `mac` go to the underlay address `remote`."""

    dev: str
    mac: str
    remote: str


class NetState(msgspec.Struct, frozen=True, gc=False):
    """What was read at one time; neighbours and forwarding entries of the asked-for links only."""

    links: tuple[Link, ...] = ()
    addresses: tuple[LinkAddress, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    forwarding: tuple[Forwarding, ...] = ()

    def link(self, name: str) -> Link | None:
        """Return the link of that name."""
        return next((link for link in self.links if link.name == name), None)
