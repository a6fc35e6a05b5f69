"""Which endpoint is next: round robin by weight, with affinity of client addresses. No sockets; time is an argument."""

from __future__ import annotations

from proxy.plan import Endpoint

MAX_CLIENTS = 65536


class Balancer:
    """The turn of one endpoint list, and who stays with whom. Survives a change of the list."""

    def __init__(self, endpoints: tuple[Endpoint, ...], affinity_seconds: int = 0) -> None:
        self.endpoints = endpoints
        self._affinity_seconds = affinity_seconds
        self._credit: dict[Endpoint, int] = {}
        self._stays: dict[str, tuple[Endpoint, float]] = {}

    def change(self, endpoints: tuple[Endpoint, ...], affinity_seconds: int) -> None:
        """Take a new list; clients stay with endpoints that are still in it."""
        if endpoints != self.endpoints:
            self.endpoints = endpoints
            self._credit = {each: credit for each, credit in self._credit.items() if each in endpoints}
            now = {(each.address, each.port): each for each in endpoints}  # whatever its weight is now
            self._stays = {
                client: (now[each.address, each.port], until)
                for client, (each, until) in self._stays.items()
                if (each.address, each.port) in now
            }
        if affinity_seconds != self._affinity_seconds:
            self._affinity_seconds = affinity_seconds
            self._stays.clear()

    def order(self, client: str, now: float) -> list[Endpoint]:
        """Return all endpoints in the order in which to try them for a new connection of `client`."""
        if not self.endpoints:
            return []
        stays = self._stays.get(client)
        first = stays[0] if stays and now < stays[1] else self._next()
        at = self.endpoints.index(first)
        return [*self.endpoints[at:], *self.endpoints[:at]]

    def connected(self, client: str, endpoint: Endpoint, now: float) -> None:
        """Note that `client` got `endpoint`: with affinity it stays there, for a while from now.

        The list may have changed since `order`: nobody stays with an endpoint that is no more in it.
        """
        if not self._affinity_seconds or endpoint not in self.endpoints:
            return
        if len(self._stays) >= MAX_CLIENTS:
            self._stays = {name: stay for name, stay in self._stays.items() if now < stay[1]}
            while len(self._stays) >= MAX_CLIENTS:
                self._stays.pop(next(iter(self._stays)))
        self._stays[client] = endpoint, now + self._affinity_seconds

    def failed(self, client: str, endpoint: Endpoint) -> None:
        """Note that `endpoint` did not answer: the client need not stay."""
        if client in self._stays and self._stays[client][0] == endpoint:
            del self._stays[client]

    def _next(self) -> Endpoint:
        """Smooth weighted round robin: each gains its weight, the richest pays the total."""
        total = 0
        best = self.endpoints[0]
        for each in self.endpoints:
            self._credit[each] = self._credit.get(each, 0) + each.weight
            total += each.weight
            if self._credit[each] > self._credit[best]:
                best = each
        self._credit[best] -= total
        return best
