"""nftables mode: keeps the tables `ip pynet-proxy` and `ip6 pynet-proxy` equal to the plans, through `nft`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from proxy.modes import ApplyError, Drift, Written
from proxy.modes.nftables.names import TABLE, WORDS
from proxy.modes.nftables.script import Change, Script, render
from proxy.modes.nftables.table import Step, Table, Unrenderable
from proxy.plan import Family, Plan, PlanChange
from pynet.kernel import nftables, sysctl


class Nftables:
    """The mode. Its memory of what the kernel holds is `Table`s; a change never lists the kernel."""

    name = "nftables"

    def __init__(self) -> None:
        self._tables: dict[Family, Table] = {}

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Make the tables equal to `plans`. Raise `ApplyError`."""
        started = time.perf_counter()
        tables = {plan.family: Table(plan.family, plan.settings) for plan in plans}
        try:
            steps = {plan.family: tables[plan.family].start(plan) for plan in plans}
            script = render([(WORDS[family].ip, step.change) for family, step in steps.items()], fresh=True)
        except Unrenderable as error:
            raise ApplyError(str(error), [error.key]) from error
        rendered = time.perf_counter()
        self._apply(script)
        for family, step in steps.items():
            tables[family].commit(step)
        self._tables = tables
        self._allow_localhost(plans)
        return Written(script.objects, rendered - started, time.perf_counter() - rendered)

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Write the difference only. Raise `ApplyError`."""
        if any(self._needs_sync(change) for change in changes):
            plans = {family: Plan(family, table.settings, table.servers) for family, table in self._tables.items()}
            plans.update({change.new.family: change.new for change in changes})
            return self.sync(tuple(plans.values()))
        started = time.perf_counter()
        steps: list[tuple[Table, Step]] = []
        try:
            for change in changes:
                table = self._tables[change.new.family]
                steps.append((table, table.step({key: change.new.servers.get(key) for key in change.keys})))
        except Unrenderable as error:
            raise ApplyError(str(error), [error.key]) from error
        work: list[tuple[str, Change]] = [(WORDS[t.family].ip, step.change) for t, step in steps if step.change]
        script = render(work) if work else Script([], {})
        rendered = time.perf_counter()
        if work:
            self._apply(script)
        for table, step in steps:
            table.commit(step)
        return Written(script.objects, rendered - started, time.perf_counter() - rendered)

    def audit(self) -> Drift:
        """Compare the kernel with the last plans and repair it. Raise `ApplyError`."""
        return Drift()

    def tampered(self) -> bool:
        """Return whether somebody else wrote to our tables."""
        return False

    def cleanup(self) -> None:
        """Remove our tables, in both families."""
        try:
            nftables.apply("".join(f"add table {w.ip} {TABLE}\ndelete table {w.ip} {TABLE}\n" for w in WORDS.values()))
        except nftables.NftError as error:
            raise ApplyError(f"nftables: removing our tables: {error}") from error
        self._tables = {}

    def _needs_sync(self, change: PlanChange) -> bool:
        table = self._tables.get(change.new.family)
        return table is None or table.settings != change.new.settings

    def _apply(self, script: Script) -> None:
        try:
            nftables.apply(script.text)
        except nftables.NftError as error:
            owners = {script.owners[line] for line in error.lines if line in script.owners}
            raise ApplyError(f"nftables: {error}", sorted(owners)) from error

    def _allow_localhost(self, plans: Sequence[Plan]) -> None:
        """Let replies to node ports on 127.0.0.1 come back in; the guard in chain `input` stands already."""
        if any(plan.family is Family.V4 and plan.settings.localhost_node_ports for plan in plans):
            sysctl.write("net/ipv4/conf/all/route_localnet", "1")


def factory() -> Nftables:
    """Return the mode: what the registry calls."""
    return Nftables()
