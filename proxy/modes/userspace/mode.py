"""The userspace mode: doors in an event loop of its own thread, and rules that lead Services' traffic to them.

The thread is in the network namespace of whoever made the mode. With `listen_only` there are no rules and no privilege:
node ports are bound themselves.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
import time
from collections.abc import Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from proxy.modes import ApplyError, Drift, Written
from proxy.modes.userspace import layout
from proxy.modes.userspace.balancer import Balancer
from proxy.modes.userspace.doors import Door, DoorKey, doors_of, is_allowed
from proxy.modes.userspace.endings import AnyDoor, Endings, Port
from proxy.modes.userspace.tcp import Room, TcpDoor
from proxy.modes.userspace.udp import UdpDoor
from proxy.plan import (
    Action,
    Endpoint,
    Family,
    NodeSettings,
    Packet,
    Plan,
    PlanChange,
    ServerKey,
    VirtualServer,
    inside,
    origin_of,
)
from pynet.daemon import logs
from pynet.kernel import conntrack, netlink, nftables, rtnl
from pynet.kernel.nftables import NftError

log = logs.get(__name__)
R = TypeVar("R")
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_ANY = {Family.V4: "0.0.0.0", Family.V6: "::"}
_VERSIONS = {Family.V4: 4, Family.V6: 6}
_OTHER_DESCRIPTORS = 4096  # doors, and what the rest of the program opens
Balancers = dict[tuple[Family, ServerKey, Action], Balancer]


class Options(msgspec.Struct, frozen=True):
    """What can be set. `addresses`: where node ports are bound with `listen_only`; empty: as the plan says."""

    listen_only: bool = False
    udp_idle_seconds: float = 60.0
    max_connections: int = 20_000
    addresses: tuple[str, ...] = ()


class Chooser:
    """Decides for one door: the frontend's verdict for the client's origin, then the turn of that endpoint list."""

    def __init__(self, door: Door, settings: NodeSettings, family: Family, balancers: Balancers) -> None:
        self.door = door
        self.settings = settings
        self._family = family
        self._balancers = balancers
        self.node_addresses: frozenset[str] = frozenset()

    def order(self, client: str) -> list[Endpoint]:
        """Return the endpoints in the order in which to try them; none for whom the policy keeps out."""
        client = client.partition("%")[0]
        if not is_allowed(self.door.frontend, client):
            return []
        balancer = self._balancer(client)
        return balancer.order(client, time.monotonic()) if balancer else []

    def connected(self, client: str, endpoint: Endpoint) -> None:
        """Note which one answered."""
        balancer = self._balancer(client)
        if balancer:
            balancer.connected(client, endpoint, time.monotonic())

    def failed(self, client: str, endpoint: Endpoint) -> None:
        """Note which one did not."""
        log.debug("endpoint does not answer", extra=logs.fields(port=self.door.key.server, endpoint=endpoint.address))
        balancer = self._balancer(client)
        if balancer:
            balancer.failed(client, endpoint)

    def _balancer(self, client: str) -> Balancer | None:
        if self.door.key.action:
            action = Action(self.door.key.action)
        else:
            origin = origin_of(self.settings, Packet(client, self.door.key.address), self.node_addresses)
            action = self.door.frontend.verdict_for(origin).action
        return self._balancers.get((self._family, self.door.key.server, action))


class Opened(msgspec.Struct):
    """A door that is open: its chooser, and a socket for each address that it is bound to."""

    chooser: Chooser
    sockets: dict[str, AnyDoor]
    port: int


class UserspaceMode:
    """See the module's head."""

    name = "userspace"

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()
        self._plans: dict[Family, Plan] = {}
        self._open: dict[tuple[Family, DoorKey], Opened] = {}
        self._elements: dict[Family, layout.Elements] = {}
        self._balancers: Balancers = {}
        self._addresses: dict[Family, frozenset[str]] = {}
        self._endings = Endings(self._open_doors)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._room: Room | None = None

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Open the doors of `plans`, close all others, write the rules anew. Raise `ApplyError`."""
        return Written.sum(self._take(plan, None) for plan in plans)

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Open, change and close the doors that differ. Raise `ApplyError`."""
        return Written.sum(
            self._take(change.new, change.keys if self._is_small(change) else None)
            for change in changes
            if change.keys or change.old.settings != change.new.settings
        )

    def audit(self) -> Drift:
        """Compare the rules' elements with what they should be, and write them anew where they differ.

        Without rules: listen where the node's addresses are now.
        """
        found: list[tuple[ServerKey | None, str]] = []
        if self._options.listen_only:
            for family in [family for family, held in self._addresses.items() if self._local(family) != held]:
                self._take(self._plans[family], None)
                found.append((None, f"{family.value}: the node has other addresses now"))
            return Drift(tuple(found))
        for family, plan in self._plans.items():
            try:
                held = nftables.list_table(layout.NFT_FAMILY[family], layout.TABLE)
            except NftError as error:
                raise ApplyError(str(error)) from error
            wrong = layout.differing(plan, self._elements[family], held)
            if wrong:
                found += ((None, f"{family.value}: {what}") for what in wrong)
                self._take(plan, None)
        return Drift(tuple(found))

    def tampered(self) -> bool:
        """Whether the rules' table is gone, or the addresses to listen on are others."""
        if self._options.listen_only:
            return any(self._local(family) != held for family, held in self._addresses.items())
        try:
            there = {(chain["family"], chain["table"]) for chain in nftables.list_chains()}
        except NftError as error:
            raise ApplyError(str(error)) from error
        return any((layout.NFT_FAMILY[family], layout.TABLE) not in there for family in self._plans)

    def cleanup(self) -> None:
        """Close all doors, end all connections, remove the rules."""
        if self._loop is not None:
            self._run(self._close_all())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None
        self._open.clear()
        self._plans.clear()
        self._elements.clear()
        if self._options.listen_only:
            return
        for family in Family:
            name = f"{layout.NFT_FAMILY[family]} {layout.TABLE}"
            try:
                nftables.apply(f"table {name} {{}}\ndelete table {name}\n")
            except NftError as error:
                log.warning("clean-up failed", extra=logs.fields(table=name, error=error))

    @property
    def connections(self) -> int:
        """How many connections and UDP sessions there are."""
        return self._room.open if self._room else 0

    def _is_small(self, change: PlanChange) -> bool:
        return change.new.family in self._plans and change.old.settings == change.new.settings

    def _take(self, plan: Plan, keys: tuple[ServerKey, ...] | None) -> Written:
        began = time.monotonic()
        family = plan.family
        self._addresses[family] = self._local(family)
        old = self._plans.get(family)
        named = keys if keys is not None else tuple({*plan.servers, *(old.servers if old else ())})
        gone, failed = self._run(self._change_doors(plan, old, named))
        opened = time.monotonic()
        written = len(named)
        try:
            if not self._options.listen_only:
                written = self._write(plan, keys)
        finally:
            self._plans[family] = plan
            if gone:
                self._run(self._close(gone))
        if failed:
            raise ApplyError("; ".join(failed.values()), list(failed))
        return Written(written, opened - began, time.monotonic() - opened)

    def _write(self, plan: Plan, keys: tuple[ServerKey, ...] | None) -> int:
        ports = {key: opened.port for (family, key), opened in self._open.items() if family is plan.family}
        wanted = layout.elements(plan, ports)
        try:
            had = self._elements.get(plan.family)
            if had is None:  # what a process before us has left
                held = nftables.list_table(layout.NFT_FAMILY[plan.family], layout.TABLE)
                had = layout.elements_held(held)
            if keys is None:
                script = layout.base(plan) + layout.difference(plan.family, {}, wanted)
            else:
                script = layout.difference(plan.family, had, wanted)
            if script:
                nftables.apply(script)
        except NftError as error:
            raise ApplyError(str(error)) from error
        self._elements[plan.family] = wanted
        _forget_flows(plan.family, layout.udp_ports(had.get("doors", frozenset()) - wanted["doors"]))
        return script.count("\n")

    async def _change_doors(
        self, plan: Plan, old: Plan | None, keys: Iterable[ServerKey]
    ) -> tuple[list[AnyDoor], dict[ServerKey, str]]:
        """Open and change doors; return those that are to be closed, and why some could not be opened."""
        gone: list[AnyDoor] = []
        failed: dict[ServerKey, str] = {}
        family = plan.family
        for key in keys:
            new = plan.servers.get(key)
            wanted = {door.key: door for door in self._doors(new)} if new else {}
            before = old.servers.get(key) if old else None
            old_names = [(family, door.key) for door in self._doors(before)] if before else []
            closing: list[AnyDoor] = []
            for name in old_names:
                if name[1] not in wanted and name in self._open:
                    closing += self._open.pop(name).sockets.values()
            self._balance(family, key, new)
            for door in wanted.values():
                try:
                    closing += self._show(plan, door)
                except OSError as error:
                    where = f"{door.key.address or 'node port'}:{door.key.port}"
                    failed[key] = f"{key}: {where}: {error.strerror or error}"
            if closing:
                self._endings.closed((family, key), closing)
                gone += closing
            self._endings.follow((family, key), before, new)
        return gone, failed

    def _open_doors(self, port: Port) -> Iterable[AnyDoor]:
        family, server = port
        for (at, key), opened in self._open.items():
            if at is family and key.server == server:
                yield from opened.sockets.values()

    def _doors(self, server: VirtualServer) -> list[Door]:
        return doors_of(server, listen_only=self._options.listen_only)

    def _balance(self, family: Family, key: ServerKey, server: VirtualServer | None) -> None:
        for action in (Action.CLUSTER, Action.LOCAL):
            name = family, key, action
            endpoints = (server.cluster if action is Action.CLUSTER else server.local) if server else ()
            if not server or not endpoints:
                self._balancers.pop(name, None)
            elif name in self._balancers:
                self._balancers[name].change(endpoints, server.affinity_seconds)
            else:
                self._balancers[name] = Balancer(endpoints, server.affinity_seconds)

    def _show(self, plan: Plan, door: Door) -> list[AnyDoor]:
        """Open a door, or tell an open one what is new; return its sockets on addresses that are gone.

        Raise `OSError` where its port cannot be bound.
        """
        name = plan.family, door.key
        opened = self._open.get(name)
        if opened is None:
            opened = Opened(Chooser(door, plan.settings, plan.family, self._balancers), {}, 0)
        addresses = self._bind_addresses(plan)
        self._bind(plan, door, opened, [address for address in addresses if address not in opened.sockets])
        self._open[name] = opened
        opened.chooser.door = door
        opened.chooser.settings = plan.settings
        opened.chooser.node_addresses = self._addresses[plan.family]
        return [opened.sockets.pop(address) for address in opened.sockets.keys() - set(addresses)]

    def _bind(self, plan: Plan, door: Door, opened: Opened, addresses: Sequence[str]) -> None:
        assert self._room is not None
        port = door.key.port if self._options.listen_only else 0
        bound: dict[str, AnyDoor] = {}
        try:
            for address in addresses:
                is_udp = door.key.server.protocol == "UDP"
                made = socket.socket(_AF[plan.family], socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM)
                try:
                    if not is_udp:
                        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if plan.family is Family.V6:
                        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    made.bind((address, port))
                    opened.port = made.getsockname()[1]
                    bound[address] = (
                        UdpDoor(made, opened.chooser, self._room, self._options.udp_idle_seconds)
                        if is_udp
                        else TcpDoor(made, opened.chooser, self._room)
                    )
                except OSError:
                    made.close()
                    raise
        except OSError:
            for each in bound.values():
                each.abort()
            raise
        opened.sockets.update(bound)

    def _bind_addresses(self, plan: Plan) -> list[str]:
        if not self._options.listen_only:
            return [_ANY[plan.family]]
        if self._options.addresses:
            return [address for address in self._options.addresses if (":" in address) == (plan.family is Family.V6)]
        networks = plan.settings.node_port_addresses
        if not networks:
            return [_ANY[plan.family]]
        loopback = "::1" if plan.family is Family.V6 else "127.0.0.1"
        local = [*sorted(self._addresses[plan.family]), *([loopback] if plan.settings.localhost_node_ports else [])]
        return [address for address in local if inside(address, networks)]

    async def _close(self, gone: Iterable[AnyDoor]) -> None:
        for each in gone:
            each.close()

    async def _close_all(self) -> None:
        for opened in self._open.values():
            for each in opened.sockets.values():
                each.abort()
        self._endings.abort()

    def _local(self, family: Family) -> frozenset[str]:
        """Return the node's own addresses, loopback's excepted."""
        with netlink.Socket() as link:
            found = (socket.inet_ntop(_AF[family], each.packed) for each in rtnl.all_addresses(link, _AF[family]))
            return frozenset(text for text in found if text != "::1" and not text.startswith(("127.", "fe80:")))

    def _run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine in the loop's thread, which the first call starts, and return what it returns."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._room = Room(min(self._options.max_connections, _most_connections()))
            threading.Thread(target=_forever, args=(self._loop,), name="userspace", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _forget_flows(family: Family, ports: Collection[int]) -> None:
    """Remove the tracked UDP flows that were led to doors at these ports, which are closed.

    A client that goes on sending would keep its flow alive, and its datagrams would find nobody for ever.
    """
    if not ports:
        return
    try:
        conntrack.delete(
            flow
            for flow in conntrack.flows({"UDP"}, _VERSIONS[family])
            if flow.answers_port in ports and (flow.answers, flow.answers_port) != (flow.destination, flow.port)
        )
    except OSError as error:
        log.warning("flows to closed doors could not be removed", extra=logs.fields(family=family.value, error=error))


def _most_connections() -> int:
    """Return how many connections this process has descriptors for, two each; its limit is raised to what it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(64, (hard - _OTHER_DESCRIPTORS) // 2)


def _forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
