"""From virtual servers as they are to virtual servers as they should be: the steps, in their order. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from proxy.modes.ipvs.layout import Wanted
from pynet.ipvs import DestinationId, Service, ServiceId


class Live(msgspec.Struct, frozen=True, gc=False):
    """A virtual server as the kernel has it, with its destinations' weights."""

    service: Service
    destinations: dict[DestinationId, int]


class Do(enum.Enum):
    """What a step does."""

    ADD_SERVICE = "add"
    SET_SERVICE = "set"
    DELETE_SERVICE = "delete"
    ADD = "add destination"
    SET = "set destination"
    DELETE = "delete destination"


class Step(msgspec.Struct, frozen=True, gc=False):
    """One change. `drain_seconds`: of a destination whose weight becomes 0, the time that its connections have."""

    do: Do
    service: ServiceId
    settings: Service | None = None
    destination: DestinationId | None = None
    weight: int = 0
    drain_seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.do.value} {self.destination or ''}{' of ' if self.destination else ''}{self.service}"


def steps(have: Mapping[ServiceId, Live], want: Mapping[ServiceId, Wanted]) -> list[Step]:
    """Return what makes `want` of `have`: additions of a server first, so that no traffic finds it without an end."""
    found: list[Step] = []
    for name, wanted in want.items():
        live = have.get(name)
        if live is not None:
            found += _changes(name, live, wanted)
        elif wanted.destinations:
            found.append(Step(Do.ADD_SERVICE, name, wanted.service))
            found += (Step(Do.ADD, name, None, one, weight) for one, weight in wanted.destinations.items())
    found += (Step(Do.DELETE_SERVICE, name) for name in have if name not in want)
    return found


def _changes(name: ServiceId, live: Live, wanted: Wanted) -> list[Step]:
    found = []
    gone = [one for one in live.destinations if one not in wanted.destinations]
    draining = [one for one in gone if wanted.seconds_of(one)]
    if not wanted.destinations and not draining:
        return [Step(Do.DELETE_SERVICE, name)]
    if wanted.destinations and live.service != wanted.service:
        found.append(Step(Do.SET_SERVICE, name, wanted.service))
    for one, weight in wanted.destinations.items():
        if one not in live.destinations:
            found.append(Step(Do.ADD, name, None, one, weight))
        elif live.destinations[one] != weight:
            found.append(Step(Do.SET, name, None, one, weight))
    for one in gone:
        if one not in draining:
            found.append(Step(Do.DELETE, name, None, one))
        elif live.destinations[one]:
            found.append(Step(Do.SET, name, None, one, 0, wanted.seconds_of(one)))
    return found


def draining(live: Mapping[ServiceId, Live], want: Mapping[ServiceId, Wanted]) -> dict[ServiceId, list[DestinationId]]:
    """Return the destinations that are there, and wanted no more."""
    found: dict[ServiceId, list[DestinationId]] = {}
    for name, one in live.items():
        wanted = want[name].destinations if name in want else {}
        if gone := [destination for destination in one.destinations if destination not in wanted]:
            found[name] = gone
    return found
