"""What leads from the kernel's state to the wanted one. Pure; touches only what carries our protocol number and what is
on our own devices.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cni.node.routes import PROTOCOL, Wanted
from pynet.netstate import Forwarding, Neighbour, NetState, Route

Entry = Neighbour | Forwarding


class Changes(msgspec.Struct, frozen=True):
    """What has to be done: additions first, so that a way in use is never taken down before its successor is there."""

    add: tuple[Entry, ...] = ()
    add_routes: tuple[Route, ...] = ()
    replace_routes: tuple[Route, ...] = ()
    delete_routes: tuple[Route, ...] = ()
    delete: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.add_routes or self.replace_routes or self.delete_routes or self.delete)


def difference(want: Wanted, state: NetState) -> Changes:
    """Return what leads from the kernel's state to the wanted one, touching only what carries our protocol number and
    what is on our own devices.
    """
    wanted_routes = {(route.dst, route.metric): route for route in want.routes}
    here: dict[tuple[str, int], list[Route]] = {}
    for route in state.routes:
        if route.protocol == PROTOCOL:
            here.setdefault((route.dst, route.metric), []).append(route)
    add, replace, delete = [], [], []
    for key, route in wanted_routes.items():
        present = here.pop(key, [])
        if route in present:
            delete += [other for other in present if other != route]
        elif present and present[0].via != "multipath":
            replace.append(route)
            delete += present[1:]
        else:
            delete += present
            add.append(route)
    delete += [route for routes in here.values() for route in routes]
    entries: set[Entry] = {*want.neighbours, *want.forwarding}
    there: set[Entry] = {*state.neighbours, *state.forwarding}
    return Changes(
        add=tuple(entries - there),
        add_routes=tuple(add),
        replace_routes=tuple(replace),
        delete_routes=tuple(delete),
        delete=tuple(_not_replaced(there - entries, entries)),
    )


def _not_replaced(stale: Iterable[Entry], entries: Iterable[Entry]) -> Iterable[Entry]:
    """Yield the stale entries that no wanted one overwrites: a neighbour's key is its address."""
    overwritten = {(entry.dev, entry.address) for entry in entries if isinstance(entry, Neighbour)}
    for entry in stale:
        if not (isinstance(entry, Neighbour) and (entry.dev, entry.address) in overwritten):
            yield entry
