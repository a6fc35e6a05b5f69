"""Node ports on loopback addresses beside any other mode: sockets on 127.0.0.1 and ::1, no rules.

What a kernel mode cannot give safely (IPv6), or at all (IPVS), without route_localnet.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.modes import Drift, Mode, Written
from proxy.modes.userspace.mode import Options, UserspaceMode
from proxy.plan import Plan, PlanChange

LOOPBACK = ("127.0.0.1", "::1")


class WithLocalhost:
    """A mode, and node ports on loopback addresses beside it; its name is the mode's own."""

    def __init__(self, mode: Mode, udp_idle_seconds: float = 60.0) -> None:
        self.name = mode.name
        self._mode = mode
        self._localhost = UserspaceMode(Options(True, udp_idle_seconds, addresses=LOOPBACK))

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Write both. Raise `ApplyError`."""
        written = self._mode.sync(plans)
        self._localhost.sync(plans)
        return written

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Write what changed in both. Raise `ApplyError`."""
        written = self._mode.update(changes)
        self._localhost.update(changes)
        return written

    def audit(self) -> Drift:
        """Audit the mode; sockets cannot drift."""
        return self._mode.audit()

    def tampered(self) -> bool:
        """Ask the mode."""
        return self._mode.tampered()

    def cleanup(self) -> None:
        """Remove both."""
        self._localhost.cleanup()
        self._mode.cleanup()
