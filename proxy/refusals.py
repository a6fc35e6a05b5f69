"""Follows what the kernel counts of refused and dropped packets, in a mode that counts them, for the metrics."""

from __future__ import annotations

from collections import Counter
from typing import Protocol, runtime_checkable

from proxy.metrics import Metrics
from proxy.modes import ApplyError
from proxy.plan import Family
from pynet.daemon import logs

log = logs.get(__name__)
_PAUSE_SECONDS = 10.0


@runtime_checkable
class CountsDrops(Protocol):
    """A mode that counts what it refuses and drops: the nftables mode. In the engine's thread only."""

    def drops(self) -> dict[str, dict[tuple[Family, str], int]]:
        """Return packets by reason, family and destination."""


class Refusals:
    """Reads the counts now and then."""

    def __init__(self, mode: CountsDrops, metrics: Metrics) -> None:
        self._mode = mode
        self._metrics = metrics
        self._due = 0.0

    def follow(self, cluster: object, changes: object, services: object) -> None:
        """Nothing follows from a change."""

    def tick(self, now: float) -> None:
        """Read them, if it is time to."""
        if now < self._due:
            return
        self._due = now + _PAUSE_SECONDS
        try:
            found = self._mode.drops()
        except (OSError, ApplyError) as error:
            log.debug("refused packets cannot be counted", extra=logs.fields(error=error))
            return
        for reason, counts in found.items():
            by_family: Counter[Family] = Counter()
            for (family, _), count in counts.items():
                by_family[family] += count
            for family in Family:
                self._metrics.refused.labels(reason, family.value).set(by_family[family])
