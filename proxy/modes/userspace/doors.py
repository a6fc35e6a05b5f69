"""A `Plan` as doors: one a frontend, each a local socket through which its connections come. Pure.

What refuses or drops for everybody has no door: that is for the kernel's rules, or for the closed port itself.
"""

from __future__ import annotations

import msgspec

from proxy.plan import Action, Endpoint, Frontend, FrontendKind, Origin, Plan, ServerKey, VirtualServer, inside


class DoorKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """What names a door: a Service port's frontend (empty address: node port)."""

    server: ServerKey
    address: str
    port: int


class Door(msgspec.Struct, frozen=True, gc=False):
    """One frontend of one Service port that leads somewhere."""

    key: DoorKey
    frontend: Frontend
    server: VirtualServer


def doors(plan: Plan, *, only_node_ports: bool = False) -> dict[DoorKey, Door]:
    """Return the doors of a plan."""
    found = {}
    for server in plan.servers.values():
        for door in doors_of(server, only_node_ports=only_node_ports):
            found[door.key] = door
    return found


def doors_of(server: VirtualServer, *, only_node_ports: bool = False) -> list[Door]:
    """Return a Service port's doors. SCTP has none: it cannot be copied from socket to socket without its streams."""
    if server.key.protocol == "SCTP":
        return []
    return [
        Door(DoorKey(server.key, frontend.address, frontend.port), frontend, server)
        for frontend in server.frontends
        if (frontend.kind is FrontendKind.NODE_PORT or not only_node_ports)
        and any(endpoints_for(server, frontend, origin) for origin in Origin)
    ]


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
