"""Writing plans although the kernel refuses part of them: whose part that is, is found out, and all others are written.

The tool's own word (the line that it names) is taken first; else the Services at fault are found by halving. A failure
that goes on without any of the suspects is nobody's: it is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from proxy.modes import ApplyError, Mode, Written
from proxy.plan import Family, Plan, PlanChange, ServerKey

Suspect = tuple[Family, ServerKey]
Plans = dict[Family, Plan]
_MOST_ATTEMPTS = 400


class Result(msgspec.Struct, frozen=True):
    """What was written: the plans that the kernel now has, and the servers that it refused, each with the reason."""

    plans: Plans
    written: Written
    refused: dict[Suspect, str]


def with_servers_of(base: Plan, new: Plan, keys: Iterable[ServerKey]) -> Plan:
    """Return `base` with the servers named as `new` has them, or without them where it has none."""
    servers = dict(base.servers)
    for key in keys:
        if key in new.servers:
            servers[key] = new.servers[key]
        else:
            servers.pop(key, None)
    return Plan(base.family, base.settings, servers)


def without(plan: Plan, keys: Collection[ServerKey]) -> Plan:
    """Return `plan` without the servers named."""
    if not keys:
        return plan
    return Plan(plan.family, plan.settings, {key: server for key, server in plan.servers.items() if key not in keys})


class Writer:
    """Plans written through a mode. One attempt's worth: thrown away after it."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._attempts = 0
        self._written = Written()
        self._refused: dict[Suspect, str] = {}

    def sync(self, plans: Plans) -> Result:
        """Make the kernel equal to `plans`, but for what it refuses. Raise `ApplyError`."""
        failed = self._sync(plans)
        if failed is None:
            return self._result(plans)
        while self._blame(failed, _suspects(plans)):
            reduced = _reduced(plans, self._refused)
            again = self._sync(reduced)
            if again is None:
                return self._result(reduced)
            failed = again
        suspects = [suspect for suspect in _suspects(plans) if suspect not in self._refused]
        middle = len(suspects) // 2
        for group in (suspects[:middle], suspects[middle:], suspects):
            base = _reduced(plans, [*self._refused, *group])
            if group and self._sync(base) is None:
                return self._result(self._add(base, plans, group, failed))
        raise failed

    def update(self, changes: Mapping[Family, PlanChange]) -> Result:
        """Write what `changes` name, but for what the kernel refuses. Raise `ApplyError`."""
        new = {family: change.new for family, change in changes.items()}
        failed = self._update(changes)
        if failed is None:
            return self._result(new)
        old = {family: change.old for family, change in changes.items()}
        if self._sync(old) is not None:
            raise failed
        suspects = [(family, key) for family, change in changes.items() for key in sorted(change.keys)]
        reached = self._add(old, new, suspects, failed)
        if len(suspects) > 1 and len(self._refused) == len(suspects):
            raise failed
        return self._result(reached)

    def _blame(self, error: ApplyError, suspects: Collection[Suspect]) -> list[Suspect]:
        """Note those of `suspects` that the error names; return them."""
        blamed = [s for s in suspects if s[1] in error.servers and s not in self._refused] if error.servers else []
        self._refused.update((suspect, str(error)) for suspect in blamed)
        return blamed

    def _add(self, base: Plans, new: Plans, suspects: Sequence[Suspect], failed: ApplyError) -> Plans:
        """Bring the kernel from `base` as near to `new` as it lets us; return the plans reached."""
        if not suspects:
            return base
        changes = {family: _step(base[family], new[family], suspects) for family in base}
        error = self._update(changes)
        if error is None:
            return {family: change.new for family, change in changes.items()}
        if self._attempts > _MOST_ATTEMPTS:
            raise failed
        if len(suspects) == 1:
            self._refused[suspects[0]] = str(error)
            return base
        blamed = self._blame(error, suspects)
        if blamed:
            return self._add(base, new, [suspect for suspect in suspects if suspect not in blamed], failed)
        middle = len(suspects) // 2
        reached = self._add(base, new, suspects[:middle], failed)
        return self._add(reached, new, suspects[middle:], failed)

    def _sync(self, plans: Plans) -> ApplyError | None:
        return self._attempt(lambda: self._mode.sync(list(plans.values())))

    def _update(self, changes: Mapping[Family, PlanChange]) -> ApplyError | None:
        return self._attempt(lambda: self._mode.update([c for c in changes.values() if c.keys or c.old is not c.new]))

    def _attempt(self, write: Callable[[], Written]) -> ApplyError | None:
        """Return why `write` failed, None where it did not. Raise what is no Service's fault."""
        self._attempts += 1
        try:
            more = write()
        except ApplyError as error:
            if error.transient:
                raise
            return error
        self._written = Written(
            self._written.objects + more.objects,
            self._written.render_seconds + more.render_seconds,
            self._written.apply_seconds + more.apply_seconds,
        )
        return None

    def _result(self, plans: Plans) -> Result:
        return Result(plans, self._written, dict(self._refused))


def _suspects(plans: Plans) -> list[Suspect]:
    return [(family, key) for family, plan in plans.items() for key in sorted(plan.servers)]


def _reduced(plans: Plans, suspects: Iterable[Suspect]) -> Plans:
    gone = set(suspects)
    return {family: without(plan, {key for of, key in gone if of is family}) for family, plan in plans.items()}


def _step(base: Plan, new: Plan, suspects: Iterable[Suspect]) -> PlanChange:
    keys = tuple(key for family, key in suspects if family is base.family)
    return PlanChange(base, with_servers_of(base, new, keys) if keys else base, keys)
