"""Removed destinations whose connections are still to end, each with the time at which it goes in any case."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pynet.ipvs import Destination, DestinationId, ServiceId


class Drains:
    """What drains: by virtual server, the destinations and their deadlines (seconds of the caller's clock)."""

    def __init__(self) -> None:
        self._deadlines: dict[ServiceId, dict[DestinationId, float]] = {}

    def of(self, service: ServiceId) -> tuple[DestinationId, ...]:
        """Return what drains of one virtual server."""
        return tuple(self._deadlines.get(service, ()))

    def begin(self, service: ServiceId, destination: DestinationId, deadline: float) -> None:
        """Note a destination; one that drains already keeps its deadline."""
        self._deadlines.setdefault(service, {}).setdefault(destination, deadline)

    def end(self, service: ServiceId, destination: DestinationId | None = None) -> None:
        """Forget a destination, or all of a virtual server: gone, or taken back."""
        if destination is None:
            self._deadlines.pop(service, None)
            return
        left = self._deadlines.get(service, {})
        left.pop(destination, None)
        if not left:
            self._deadlines.pop(service, None)

    def due(
        self, read: Callable[[ServiceId], Mapping[DestinationId, Destination]], now: float
    ) -> list[tuple[ServiceId, DestinationId]]:
        """Return what is to be removed at `now`: without connections, or too late. What is gone is forgotten."""
        found = []
        for service, deadlines in list(self._deadlines.items()):
            held = read(service)
            for destination, deadline in list(deadlines.items()):
                state = held.get(destination)
                if state is None:
                    self.end(service, destination)
                elif now >= deadline or not state.active + state.inactive:
                    found.append((service, destination))
        return found
