"""Which address comes next: round robin over a range set, past gateways and taken ones, longest rested first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cni.ipam.ranges import RangeSet

REST_SECONDS = 60.0
"""A released address is not handed out again before this, while the set has any other."""

Taken = Callable[[int, int], Iterable[int]]
"""The taken addresses between two addresses, both included, in ascending order."""


def segments(ranges: RangeSet, last: int | None) -> Iterator[tuple[int, int]]:
    """Yield the set's addresses as (first, last) pairs, from the one after `last` round to `last` itself."""
    at = next(
        (number for number, entry in enumerate(ranges) if last is not None and entry.first <= last <= entry.last), -1
    )
    if last is None or at < 0:
        yield from ((entry.first, entry.last) for entry in ranges)
        return
    here = ranges[at]
    if last < here.last:
        yield last + 1, here.last
    yield from ((entry.first, entry.last) for entry in (*ranges[at + 1 :], *ranges[:at]))
    yield here.first, last


def free(ranges: RangeSet, last: int | None, taken: Taken) -> Iterator[int]:
    """Yield the free addresses of a set in the order in which they are to be tried."""
    gateways = {entry.gateway for entry in ranges}
    for first, end in segments(ranges, last):
        at = first
        for used in taken(first, end):
            yield from (number for number in range(at, used) if number not in gateways)
            at = used + 1
        yield from (number for number in range(at, end + 1) if number not in gateways)


def pick(ranges: RangeSet, last: int | None, taken: Taken, resting: Callable[[int], float | None]) -> int | None:
    """Return the address to hand out; None when all are taken.

    `resting` gives the time an address was released at, None for one that has rested enough. When only resting ones
    are left, the one released first is taken: a pod that starts is worth more than a rest.
    """
    oldest: tuple[float, int] | None = None
    for number in free(ranges, last, taken):
        since = resting(number)
        if since is None:
            return number
        if oldest is None or since < oldest[0]:
            oldest = since, number
    return oldest[1] if oldest else None


def capacity(ranges: RangeSet) -> int:
    """Return how many addresses a set can hand out."""
    gateways = {entry.gateway for entry in ranges}
    inside = sum(entry.first <= gateway <= entry.last for gateway in gateways for entry in ranges)
    return sum(entry.last - entry.first + 1 for entry in ranges) - inside
