"""Glances at the rules that others may change without a word: FORWARD, which Docker closes whenever it starts, and our
masquerade, which `nft flush ruleset` takes along. Cheap enough for every second (0.3 ms); makes no table.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from cni.node.masquerade import CHAIN, TABLE
from pynet.kernel.iptables import IptablesError, Version, legacy_forward_policy, legacy_size
from pynet.kernel.nfnetlink import Nfnetlink, NfnetlinkError

_PAUSE = 1.0  # seconds between glances
_CHAINS = (
    ("ip", "filter", "FORWARD"),
    ("ip6", "filter", "FORWARD"),
    ("inet", TABLE, "postrouting"),
    ("ip", "nat", CHAIN),
    ("ip6", "nat", CHAIN),
)
_LEGACY: tuple[Version, ...] = (4, 6)


class Glances:
    """What was seen when the agent was last done, and whether that is still so."""

    def __init__(self) -> None:
        self._kernel, self._lock = Nfnetlink(), threading.Lock()
        self._last = self._now()

    def note(self) -> None:
        """Take what there is now for what should be: the agent has looked at all of it, or written it."""
        self._last = self._now()

    def watch(self, changed: Callable[[], None], stop: threading.Event) -> None:
        """Call `changed` whenever the rules differ from what was noted, until `stop` is set."""
        while not stop.wait(_PAUSE):
            if self._now() != self._last:
                changed()

    def _now(self) -> tuple[tuple[str | int, ...], ...]:
        with self._lock:
            return glance(self._kernel)


def glance(kernel: Nfnetlink) -> tuple[tuple[str | int, ...], ...]:
    """Return what differs when somebody changed those rules: of each chain the policy and the number of its rules; of
    legacy iptables FORWARD's policy and the number of the table's rules, as it has none for a chain.
    """
    found: list[tuple[str | int, ...]] = []
    for family, table, chain in _CHAINS:
        with contextlib.suppress(NfnetlinkError):
            found.append((family, chain, *kernel.policy(family, table, chain)))
    for version in _LEGACY:
        # a table that changes under our eyes is read the next time
        with contextlib.suppress(IptablesError):
            found.append((version, legacy_size(version, "filter")[0], legacy_forward_policy(version)))
    return tuple(found)
