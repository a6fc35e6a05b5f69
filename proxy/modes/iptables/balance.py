"""The rules that choose one of a Service port's endpoints: by chance, in turn, or by what is known of the client. Pure.

Knows no frontend and no policy: who gets here is to be led to one of these endpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from proxy.modes.iptables.dispatch import digest
from proxy.plan import Endpoint, Scheduler, VirtualServer

_MAX_SLOTS = 256


def digest_of(server: VirtualServer, part: str = "") -> str:
    """Return what stands for a Service port, or a part of it, in the name of a chain or a list."""
    key = server.key
    return digest("\n".join((key.service, key.port_name, key.protocol, part)))


def balance(server: VirtualServer, endpoints: tuple[Endpoint, ...]) -> list[str]:
    """Return the rules that choose one of `endpoints`; without any, the connection is refused."""
    if not endpoints:
        return ["-j PYNET-REJECT"]
    protocol = f"-p {server.key.protocol.lower()} "
    targets = [_target(endpoint) for endpoint in endpoints]
    if not server.affinity_seconds:
        return [
            f"{protocol}{chance}-j DNAT --to-destination {targets[index]}"
            for chance, index in _chances(server.scheduler, tuple(endpoint.weight for endpoint in endpoints))
        ]
    mask = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" if ":" in endpoints[0].address else "255.255.255.255"
    lists = _client_lists(server, endpoints)
    known = [
        f"{protocol}-m recent --update --seconds {server.affinity_seconds} --reap "
        f"--name {name} --mask {mask} --rsource -j DNAT --to-destination {target}"
        for name, target in zip(lists, targets, strict=True)
    ]
    return known + [
        f"{protocol}{chance}-m recent --set --name {lists[index]} --mask {mask} --rsource "
        f"-j DNAT --to-destination {targets[index]}"
        for chance, index in _chances(server.scheduler, tuple(endpoint.weight for endpoint in endpoints))
    ]


def client_lists(server: VirtualServer) -> list[str]:
    """Return the names of the lists in which the kernel remembers a Service port's clients: one an endpoint."""
    return _client_lists(server, (*server.cluster, *server.local)) if server.affinity_seconds else []


def _client_lists(server: VirtualServer, endpoints: Iterable[Endpoint]) -> list[str]:
    return [f"PYNET-{digest_of(server, _target(endpoint))}" for endpoint in endpoints]


def _target(endpoint: Endpoint) -> str:
    return f"[{endpoint.address}]:{endpoint.port}" if ":" in endpoint.address else f"{endpoint.address}:{endpoint.port}"


@lru_cache(maxsize=4096)
def _chances(scheduler: str, weights: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Return (match, index) in order: each match is tried on what the ones before it left; the last one takes all.

    Round robin counts connections (`nth`), a slot a weight unit; random, and weights too great for slots, by chance.
    """
    if scheduler == Scheduler.ROUND_ROBIN.value and (slots := _slots(weights)):
        count = len(slots)
        return tuple(
            (f"-m statistic --mode nth --every {count - place} --packet 0 " if place < count - 1 else "", index)
            for place, index in enumerate(slots)
        )
    left = sum(weights)
    found = []
    for index, weight in enumerate(weights):
        chance = f"-m statistic --mode random --probability {_probability(weight / left)} " if weight < left else ""
        found.append((chance, index))
        left -= weight
    return tuple(found)


def _slots(weights: tuple[int, ...]) -> list[int]:
    """Return the indexes in turn, each as often as its weight; empty where that would be too many rules."""
    if sum(weights) > max(_MAX_SLOTS, len(weights)):
        return [] if len(set(weights)) > 1 else list(range(len(weights)))
    turns = max(weights)
    return [index for turn in range(turns) for index, weight in enumerate(weights) if weight > turn]


def _probability(chance: float) -> str:
    """Return a chance as iptables-save prints what the kernel keeps of it: 31 bits."""
    return f"{round(chance * 0x80000000) / 0x80000000:.11f}"
