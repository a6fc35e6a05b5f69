"""Decides how this node reaches the pods of every other node: Nodes and the node's own links → wanted routes,
neighbours, forwarding entries, VXLAN devices; each with its reason. Pure: reads and writes nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Literal

import msgspec

from cni.node.nodes import Claim, Claims, Member, Problem, claim_of, number_of, settle
from pynet.netstate import Forwarding, Link, Neighbour, NetState, Route, Vxlan, family_of

Backend = Literal["auto", "host-gw", "vxlan"]
How = Literal["direct", "vxlan", "none"]

PROTOCOL = 112  # ours; in no table of rt_protos known (80 is Calico's, 17 kube-router's, 84 OVN's)
OVERHEAD = {4: 50, 6: 70}  # bytes that VXLAN adds over an underlay of IPv4, IPv6 (RFC 7348, section 5)
TCP_HEADERS = {4: 40, 6: 60}
METRIC = {4: 0, 6: 1024}  # the kernel's own default: IPv6 knows no 0
UNCLAIMED_METRIC = 4096  # any route of somebody else's for the whole of the cluster's pods goes first
DEVICES = {4: "pynet-vx4", 6: "pynet-vx6"}  # one per family of the underlay: the kernel mixes none in a device


class Settings(msgspec.Struct, frozen=True):
    """What the flags say. `vxlan`: whether this kernel has it."""

    name: str
    backend: Backend = "auto"
    vni: int = 112
    port: int = 4789
    cluster_cidrs: tuple[str, ...] = ()
    vxlan: bool = True
    mtu: int = 0


class Underlay(msgspec.Struct, frozen=True):
    """This node's place in the network that connects the nodes, in one family."""

    address: str
    dev: str
    mtu: int


class Device(msgspec.Struct, frozen=True):
    """A VXLAN device that should be, with its addresses (`a.b.c.d/32`)."""

    name: str
    vxlan: Vxlan
    mac: str
    mtu: int
    addresses: tuple[str, ...]


class Reach(msgspec.Struct, frozen=True, gc=False):
    """How the pods of one CIDR of a node are reached, and why so."""

    node: str
    address: str
    cidr: str
    how: How
    reason: str
    dev: str = ""
    via: str = ""
    mtu: int = 0
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    forwarding: tuple[Forwarding, ...] = ()


class Wanted(msgspec.Struct, frozen=True):
    """What should be true of this node's kernel, and what is said about it. `claims`: all nodes' that count."""

    reaches: tuple[Reach, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    forwarding: tuple[Forwarding, ...] = ()
    devices: tuple[Device, ...] = ()
    problems: tuple[Problem, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    pod_mtu: int = 0
    underlay: tuple[Underlay, ...] = ()


@lru_cache(maxsize=1 << 14)
def vtep_mac(address: str) -> str:
    """Return the MAC of the VXLAN device of the node with that underlay address: every node knows every other one's."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return (b"\x02\x70" + parsed.packed).hex(":")
    return (b"\x06\x70" + hashlib.sha256(parsed.packed).digest()[:4]).hex(":")


@lru_cache(maxsize=1 << 14)
def link_local(mac: str) -> str:
    """Return the IPv6 link-local address that a device with that MAC gives itself (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]))


class Fib:
    """The routes of others, looked up as the kernel does: the longest prefix, then the lowest metric."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._by_length: dict[int, dict[int, Route]] = {}
        for route in routes:
            base, _, length = route.dst.partition("/")
            shift = (128 if family_of(base) == 6 else 32) - int(length)
            level = self._by_length.setdefault(int(length) + (1000 if family_of(base) == 6 else 0), {})
            known = level.get(key := number_of(base) >> shift)
            if known is None or route.metric < known.metric:
                level[key] = route
        self._lengths = sorted(self._by_length, reverse=True)

    def lookup(self, address: str) -> Route | None:
        """Return the route that a packet to `address` takes."""
        number, six = number_of(address), family_of(address) == 6
        for length in self._lengths:
            if (length >= 1000) == six:
                shift = 128 - (length - 1000) if six else 32 - length
                route = self._by_length[length].get(number >> shift)
                if route is not None and route.type != "throw":
                    return route
        return None

    def length(self, address: str) -> int:
        """Return the length of the prefix of the route that a packet to `address` takes; -1 for none."""
        route = self.lookup(address)
        return -1 if route is None else int(route.dst.rpartition("/")[2])


def wanted(members: Mapping[str, Member], settings: Settings, state: NetState) -> Wanted:
    """Return what this node's kernel should hold, given all Nodes and what is there now."""
    own = members.get(settings.name, Member(settings.name))
    foreign = [route for route in state.routes if route.protocol != PROTOCOL]
    local = {entry.address for entry in state.addresses}
    here = _Here(own, settings, state, Fib(foreign), local)
    claims, conflicts = settle(members.values(), settings.name)
    reaches: list[Reach] = []
    for name in sorted(members):
        if name != settings.name:
            reaches += _reaches(members[name], here, claims)
    refusing, cut_off = _refusing(claims, here)
    blocked, problems = _in_the_way(reaches, refusing, foreign, claims, settings)
    reaches = [_blocked(reach, blocked) for reach in reaches]
    if settings.name not in members:
        problems += (Problem(f"Node {settings.name}", "there is none; --node-name says which Node is this machine"),)
    held = [claim.cidr for claim in own.claims if claims.holder(claim.first, claim.last) == (claim, own.name)]
    routes = [route for reach in reaches for route in reach.routes]
    routes += [route for route in refusing if route.dst not in blocked]
    return Wanted(
        reaches=tuple(reaches),
        routes=tuple(routes),
        neighbours=tuple(dict.fromkeys(entry for reach in reaches for entry in reach.neighbours)),
        forwarding=tuple(dict.fromkeys(entry for reach in reaches for entry in reach.forwarding)),
        devices=_devices(here, members.values()),
        problems=tuple(problem for m in members.values() for problem in m.problems) + conflicts + cut_off + problems,
        pod_cidrs=tuple(held),
        claims=claims.all(),
        pod_mtu=_pod_mtu(here, reaches),
        underlay=tuple(here.underlay.values()),
    )


def unclaimed(cluster_cidrs: Iterable[str]) -> list[Route]:
    """Return the routes by which packets to pod addresses that no node holds are refused here and do not wander."""
    return [Route(cidr, "unreachable", metric=UNCLAIMED_METRIC, protocol=PROTOCOL) for cidr in cluster_cidrs]


def _refusing(claims: Claims, here: _Here) -> tuple[list[Route], tuple[Problem, ...]]:
    """Return `unclaimed` routes, but for those that would refuse packets to a node as well, which are told."""
    routes, problems = [], []
    for route in unclaimed(here.settings.cluster_cidrs):
        length = int(route.dst.rpartition("/")[2])
        inside = claims.nodes_in(claim_of(route.dst))
        cut_off = next((address for address in inside if here.fib.length(address) < length), None)
        if cut_off is None:
            routes.append(route)
            continue
        reason = f"an unreachable route for it would cut off the node {cut_off}: none is made"
        problems.append(Problem(f"--cluster-cidr {route.dst}", reason))
    return routes, tuple(problems)


class _Here:
    """This node, as far as a way to others depends on it."""

    def __init__(self, own: Member, settings: Settings, state: NetState, fib: Fib, local: Collection[str]) -> None:
        self.own, self.settings, self.fib, self.local = own, settings, fib, local
        self.links: dict[str, Link] = {link.name: link for link in state.links}
        found = {family: _underlay(own, family, state, fib, self.links) for family in (own.prefers, 10 - own.prefers)}
        self.underlay: dict[int, Underlay] = {family: place for family, place in found.items() if place}
        self._meets: dict[tuple[int, bool, bool], int] = {}

    def meets(self, peer: Member) -> int:
        """Return the family of the underlay by which this node and a peer send VXLAN to each other, or 0. Both decide
        the same from the two Nodes: what one preferred alone would arrive where no device listens.
        """
        key = (peer.prefers, peer.v4 != "", peer.v6 != "")
        if key not in self._meets:
            own = self.own
            both = [f for f in self.underlay if peer.address(f) and (own.address(f) or not own.addresses)]
            same = own.prefers == peer.prefers and own.prefers in both
            self._meets[key] = own.prefers if same else min(both, default=0)
        return self._meets[key]

    def mtu_to(self, route: Route) -> int:
        """Return the largest packet that fits the way that `route` starts."""
        link = self.links.get(route.dev)
        sizes = [size for size in (link.mtu if link else 0, route.mtu) if size]
        return min(sizes, default=1500)


def _underlay(own: Member, family: int, state: NetState, fib: Fib, links: Mapping[str, Link]) -> Underlay | None:
    """Return where this node's address of a family is; without one, where its default route leaves."""
    place = next((entry for entry in state.addresses if entry.address == own.address(family) != ""), None)
    if place is None:
        default = fib.lookup("0.0.0.0" if family == 4 else "::")
        if default is None or not default.dev:
            return None
        place = next((e for e in state.addresses if e.dev == default.dev and family_of(e.address) == family), None)
    return None if place is None else Underlay(place.address, place.dev, links[place.dev].mtu)


def _reaches(peer: Member, here: _Here, claims: Claims) -> Iterable[Reach]:
    """Yield how each pod CIDR of a peer is reached."""
    for claim in peer.claims:
        if claims.holder(claim.first, claim.last) != (claim, peer.name):
            yield Reach(
                peer.name, peer.address(claim.family), claim.cidr, "none", "its pod CIDR counts for another node"
            )
        elif not peer.addresses:
            yield Reach(peer.name, "", claim.cidr, "none", "the Node has no address (status.addresses)")
        elif mine := next((address for address in (peer.v4, peer.v6) if address in here.local), ""):
            yield Reach(peer.name, mine, claim.cidr, "none", f"its address {mine} is this machine's own")
        else:
            yield _reach(peer, claim, here)


def _reach(peer: Member, claim: Claim, here: _Here) -> Reach:
    address = peer.address(claim.family)
    if not address:
        why = f"the Node has no IPv{claim.family} address"
    elif here.settings.backend == "vxlan":
        why = "the backend is vxlan"
    else:
        hop = here.fib.lookup(address)
        if hop is None or hop.type != "unicast":
            return Reach(peer.name, address, claim.cidr, "none", f"this node has no route to {address}")
        if hop.via:
            why = f"{address} is behind {hop.via if hop.via != 'multipath' else 'several next hops'}"
        elif hop.dev in ("", "lo", *DEVICES.values()) or hop.dst.endswith("/0"):
            why = f"{address} is somewhere behind {hop.dev}"  # no subnet: a tunnel, a modem
        else:
            return _direct(peer, claim, address, hop, here)
    if here.settings.backend == "host-gw":
        return Reach(peer.name, address, claim.cidr, "none", f"{why}, and the backend is host-gw")
    return _overlay(peer, claim, why, here)


def _direct(peer: Member, claim: Claim, address: str, hop: Route, here: _Here) -> Reach:
    mtu = here.mtu_to(hop)
    # IPv6 chooses a source by RFC 6724, and refuses one that is still tentative
    src = here.own.v4 if claim.family == 4 and here.own.v4 in here.local else ""
    route = _route(claim, via=address, dev=hop.dev, src=src, mtu=mtu)
    reason = f"{address} is on link: {hop.dev} has {hop.dst}"
    return Reach(peer.name, address, claim.cidr, "direct", reason, hop.dev, address, mtu, (route,))


def _overlay(peer: Member, claim: Claim, why: str, here: _Here) -> Reach:
    family = here.meets(peer)
    if not here.settings.vxlan:
        return Reach(
            peer.name, peer.address(claim.family), claim.cidr, "none", f"{why}, and no VXLAN device could be made"
        )
    if family and (link := here.links.get(DEVICES[family])) and link.kind != "vxlan":
        reason = f"{why}, and a foreign link has the name of our VXLAN device, {link.name}: rename it"
        return Reach(peer.name, peer.address(claim.family), claim.cidr, "none", reason)
    if not family:
        reason = f"{why}, and this node has no address of a family of the peer's to send VXLAN from"
        return Reach(peer.name, peer.address(claim.family), claim.cidr, "none", reason)
    remote, dev = peer.address(family), DEVICES[family]
    mac = vtep_mac(remote)
    hop = here.fib.lookup(remote)
    mtu = (min(here.mtu_to(hop), here.underlay[family].mtu) if hop else here.underlay[family].mtu) - OVERHEAD[family]
    # IPv6 refuses an on-link next hop that another route covers, so it is the peer's link-local address there
    via = claim.base if claim.family == 4 else link_local(mac)
    return Reach(
        node=peer.name, address=remote, cidr=claim.cidr, how="vxlan", reason=why, dev=dev, via=via, mtu=mtu,
        routes=(_route(claim, via=via, dev=dev, mtu=mtu, onlink=claim.family == 4),),
        neighbours=(Neighbour(dev, via, mac),),
        forwarding=(Forwarding(dev, mac, remote),),
    )  # fmt: skip


def _route(claim: Claim, *, via: str, dev: str, mtu: int, src: str = "", onlink: bool = False) -> Route:
    return Route(
        dst=claim.cidr, via=via, dev=dev, src=src, metric=METRIC[claim.family], mtu=mtu,
        advmss=mtu - TCP_HEADERS[claim.family], onlink=onlink, protocol=PROTOCOL,
    )  # fmt: skip


def _devices(here: _Here, members: Iterable[Member]) -> tuple[Device, ...]:
    """Return the VXLAN devices: the one of the preferred family always, the other one where a peer may send by it (it
    may see us off link while we see it on link).
    """
    settings = here.settings
    if settings.backend == "host-gw" or not settings.vxlan:
        return ()
    used = {here.meets(member) for member in members if member.name != settings.name}
    found = []
    for position, (family, place) in enumerate(here.underlay.items()):
        link = here.links.get(DEVICES[family])
        if (position and family not in used) or (link and link.kind != "vxlan"):
            continue
        found.append(
            Device(
                name=DEVICES[family],
                vxlan=Vxlan(settings.vni, settings.port, place.address),
                mac=vtep_mac(here.own.address(family) or place.address),
                mtu=place.mtu - OVERHEAD[family],
                addresses=tuple(f"{c.base}/{32 if c.family == 4 else 128}" for c in here.own.claims),
            )
        )
    return tuple(found)


def _pod_mtu(here: _Here, reaches: Iterable[Reach]) -> int:
    """Return the MTU for pods: what fits every way in use, so that no packet between pods is too big for one."""
    if here.settings.mtu:
        return here.settings.mtu
    sizes = [place.mtu for place in here.underlay.values()]
    if here.settings.backend == "vxlan":
        sizes = [place.mtu - OVERHEAD[family] for family, place in list(here.underlay.items())[:1]]
    return min([*sizes, *(reach.mtu for reach in reaches if reach.mtu)], default=1500)


def _in_the_way(
    reaches: Iterable[Reach],
    refusing: Iterable[Route],
    foreign: Iterable[Route],
    claims: Claims,
    settings: Settings,
) -> tuple[dict[str, Route], tuple[Problem, ...]]:
    """Return the routes of others that take the place of one of ours, by destination, and what is to be said of them
    and of those that take a part of a peer's pod CIDR.
    """
    mine = {route.dst: route for reach in reaches for route in reach.routes}
    mine |= {route.dst: route for route in refusing}
    blocked: dict[str, Route] = {}
    problems: list[Problem] = []
    for route in foreign:
        own = mine.get(route.dst)
        if own is not None and route.metric <= own.metric:
            blocked[route.dst] = route
            problems.append(Problem(f"route {route.dst}", f"a foreign route is in the way: {describe(route)}"))
        elif own is None:
            first = number_of(route.dst.partition("/")[0])
            holder = claims.holder(first, first)
            if holder and holder[1] != settings.name and route.dst != holder[0].cidr and holder[0].cidr in mine:
                if int(route.dst.rpartition("/")[2]) <= int(holder[0].cidr.rpartition("/")[2]):
                    continue
                reason = f"a foreign route takes a part of {holder[0].cidr} of Node {holder[1]}: {describe(route)}"
                problems.append(Problem(f"route {route.dst}", reason))
    return blocked, tuple(problems)


def _blocked(reach: Reach, blocked: Mapping[str, Route]) -> Reach:
    """Return `reach` without its route where a foreign one is in its place."""
    foreign = blocked.get(reach.cidr)
    if foreign is None or not reach.routes:
        return reach
    if (foreign.via, foreign.dev) == (reach.via, reach.dev):
        reason = f"a foreign route already leads there: {describe(foreign)}"
        return msgspec.structs.replace(reach, reason=reason, routes=())
    reason = f"a foreign route is in the way: {describe(foreign)}"
    return Reach(reach.node, reach.address, reach.cidr, "none", reason)


def describe(route: Route) -> str:
    """Return a route as `ip route` would print it."""
    words = [] if route.type == "unicast" else [route.type]
    words.append(route.dst)
    words += [word for key in ("via", "dev", "src") if (value := getattr(route, key)) for word in (key, value)]
    words += [f"metric {route.metric}"] if route.metric else []
    return " ".join([*words, f"proto {route.protocol}"])
