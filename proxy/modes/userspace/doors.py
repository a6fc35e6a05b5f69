"""A Service port as doors: a local socket through which connections to a frontend come. Pure.

What refuses or drops for everybody has no door: that is for the kernel's rules, or for the closed port itself.
"""

from __future__ import annotations

import msgspec

from proxy.plan import Action, Endpoint, Frontend, FrontendKind, Origin, ServerKey, VirtualServer, inside


class DoorKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """What names a door: a Service port's frontend (empty address: node port) and what becomes of its connections.

    `action`: an `Action`'s value; empty: the door itself tells origins apart, by the client's address alone.
    """

    server: ServerKey
    address: str
    port: int
    action: str = ""


class Door(msgspec.Struct, frozen=True, gc=False):
    """One frontend of one Service port that leads somewhere."""

    key: DoorKey
    frontend: Frontend
    server: VirtualServer


def doors_of(server: VirtualServer, *, listen_only: bool = False) -> list[Door]:
    """Return a Service port's doors: with rules before them one for each action, else one for each node port.

    SCTP has none: it cannot be copied from socket to socket without its streams.
    """
    if server.key.protocol == "SCTP":
        return []
    found: list[Door] = []
    for frontend in server.frontends:
        actions = {frontend.verdict_for(o).action.value for o in Origin if endpoints_for(server, frontend, o)}
        if listen_only:
            actions = {""} if actions and frontend.kind is FrontendKind.NODE_PORT else set()
        names = (DoorKey(server.key, frontend.address, frontend.port, action) for action in sorted(actions))
        found += (Door(name, frontend, server) for name in names)
    return found


def action_for(server: VirtualServer, frontend: Frontend, origin: Origin) -> Action:
    """Return what becomes of a new connection; forwarding to nobody is refusing."""
    action = frontend.verdict_for(origin).action
    if action in (Action.CLUSTER, Action.LOCAL) and not _list(server, action):
        return Action.REJECT
    return action


def endpoints_for(server: VirtualServer, frontend: Frontend, origin: Origin) -> tuple[Endpoint, ...]:
    """Return where a connection of this origin may go; nowhere for what is refused or dropped."""
    return _list(server, frontend.verdict_for(origin).action)


def is_allowed(frontend: Frontend, source: str) -> bool:
    """Whether the source ranges let this address in."""
    return frontend.source_ranges is None or inside(source, frontend.source_ranges)


def _list(server: VirtualServer, action: Action) -> tuple[Endpoint, ...]:
    return {Action.CLUSTER: server.cluster, Action.LOCAL: server.local}.get(action, ())
