"""The ways to program the kernel: each translates a `Plan`, and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from proxy.plan import Plan, PlanChange, ServerKey


class ApplyError(Exception):
    """The kernel (or its tool) refused. `servers`: those at fault where that is known, else empty: all of them.

    The message holds what was tried, what the tool said, and the offending line. `transient`: it is no Service's fault
    (a lock that is held, a program that is missing): trying again later is all that can be done.
    """

    def __init__(self, message: str, servers: Sequence[ServerKey] = (), *, transient: bool = False) -> None:
        super().__init__(message)
        self.servers = tuple(servers)
        self.transient = transient


class Written(msgspec.Struct, frozen=True):
    """What one pass wrote. `objects`: rules, elements or virtual servers added, changed or removed."""

    objects: int = 0
    render_seconds: float = 0.0
    apply_seconds: float = 0.0

    @staticmethod
    def sum(parts: Iterable[Written]) -> Written:
        """Return what several passes wrote together."""
        parts = list(parts)
        return Written(
            sum(part.objects for part in parts),
            sum(part.render_seconds for part in parts),
            sum(part.apply_seconds for part in parts),
        )


class Drift(msgspec.Struct, frozen=True):
    """What an audit found to differ from the plan and has repaired: a line each, with the server where it is known."""

    found: tuple[tuple[ServerKey | None, str], ...] = ()


class Mode(Protocol):
    """One way to program the kernel, in the network namespace that it was made in. Not thread-safe: one caller."""

    name: str

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Make the kernel equal to `plans` (one a family), whatever it holds of ours now. Raise `ApplyError`."""

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Write only what `changes` name. Allowed after one `sync`; must leave what `sync` of the new plans would."""

    def audit(self) -> Drift:
        """Read the kernel back, compare with the last plans, repair what differs. Raise `ApplyError`."""

    def tampered(self) -> bool:
        """Cheap check (a canary): did somebody else remove our objects? Then the engine calls `audit` or `sync`."""

    def cleanup(self) -> None:
        """Remove all that is ours and nothing else; also when nothing was ever written."""
