"""What one of our tables should hold now, and what a change of some servers does to it. Pure but for its own memory.

Only servers and counts of what they share are kept: parts are rendered again when needed, which is cheaper than holding
a hundred thousand elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from proxy.modes.nftables.base import Layout, base
from proxy.modes.nftables.layout import part
from proxy.modes.nftables.script import Change
from proxy.plan import Family, NodeSettings, Plan, ServerKey, VirtualServer

SHARED_SETS = ("cluster-ips", "hairpin")
Shared = tuple[str, str]  # set and element, or "chain" and name


class Unrenderable(Exception):
    """A server whose fields no rule can hold."""

    def __init__(self, key: ServerKey, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key


class Step(msgspec.Struct, gc=False):
    """A change with what `Table.commit` needs to remember once the kernel has it."""

    change: Change
    servers: dict[ServerKey, VirtualServer | None] = {}
    shared: Counter[Shared] = msgspec.field(default_factory=Counter)
    live: dict[str, frozenset[str]] = {}  # map of remembered clients that lost endpoints → those that it still has


class Table:
    """The wanted content of the table of one family."""

    def __init__(self, family: Family, settings: NodeSettings) -> None:
        self.family = family
        self.settings = settings
        self.base = base(family, settings)
        self.servers: dict[ServerKey, VirtualServer] = {}
        self._shared: Counter[Shared] = Counter()

    def start(self, plan: Plan) -> Step:
        """Return what fills the empty table."""
        step = self.step(plan.servers)
        change = step.change
        change.new_sets = {**self.base.sets, **change.new_sets}
        change.new_chains = {**self.base.chains, **change.new_chains}
        for name, elements in self.base.elements.items():
            change.new_elements[name] = [(None, key) for key in elements]
        return step

    def step(self, wanted: Mapping[ServerKey, VirtualServer | None]) -> Step:
        """Return what makes the servers named so; None: gone. Raise `Unrenderable`."""
        step = Step(Change(), dict(wanted))
        chains: dict[str, tuple[str, ...]] = {}
        for key, server in wanted.items():
            before = self.servers.get(key)
            if before == server:
                continue
            old = self.part(before) if before else Layout()
            new = self.part(server) if server else Layout()
            _sets(step, old, new)
            step.live.update(
                {name: new.live[name] for name in old.live if name in new.live and old.live[name] - new.live[name]}
            )
            _elements(step, key, old, new)
            for name, rules in new.chains.items():
                step.shared["chain", name] += 1
                chains[name] = rules
            for name in old.chains:
                step.shared["chain", name] -= 1
        self._settle(step, chains)
        return step

    def commit(self, step: Step) -> None:
        """Remember that the kernel has what `step` says."""
        for key, server in step.servers.items():
            if server is None:
                self.servers.pop(key, None)
            else:
                self.servers[key] = server
        for shared, count in step.shared.items():
            self._shared[shared] += count
            if not self._shared[shared]:
                del self._shared[shared]

    def layouts(self) -> Iterable[tuple[ServerKey | None, Layout]]:
        """Yield all parts, the constant one first."""
        yield None, self.base
        for key, server in self.servers.items():
            yield key, self.part(server)

    def part(self, server: VirtualServer) -> Layout:
        """Return the objects of one server. Raise `Unrenderable`."""
        try:
            return part(self.family, self.settings, server)
        except ValueError as error:
            raise Unrenderable(server.key, str(error)) from error

    def _settle(self, step: Step, chains: dict[str, tuple[str, ...]]) -> None:
        """Write and delete what is shared when its first user comes or its last one goes."""
        change = step.change
        for shared, count in step.shared.items():
            where, name = shared
            before = self._shared.get(shared, 0)
            if where == "chain":
                if before + count <= 0 < before:
                    change.old_chains.append(name)
                elif before <= 0 < before + count:
                    change.new_chains[name] = chains[name]
            elif before + count <= 0 < before:
                change.old_elements.setdefault(where, []).append((None, name))
            elif before <= 0 < before + count:
                change.new_elements.setdefault(where, []).append((None, name))


def _sets(step: Step, old: Layout, new: Layout) -> None:
    for name, declaration in new.sets.items():
        if name not in old.sets:
            step.change.new_sets[name] = declaration
    step.change.old_sets += [name for name in old.sets if name not in new.sets]


def _elements(step: Step, owner: ServerKey, old: Layout, new: Layout) -> None:
    for name in {**old.elements, **new.elements}:
        before, after = old.elements.get(name, {}), new.elements.get(name, {})
        if before == after:
            continue
        if name in SHARED_SETS:
            for element in after:
                step.shared[name, element] += 1
            for element in before:
                step.shared[name, element] -= 1
            continue
        if name not in old.sets or name in new.sets:  # the elements of a map that goes need no word
            gone = [(owner, element) for element, value in before.items() if after.get(element) != value]
            if gone:
                step.change.old_elements.setdefault(name, []).extend(gone)
        come = [
            (owner, f"{element} : {value}" if value else element)
            for element, value in after.items()
            if before.get(element) != value
        ]
        if come:
            step.change.new_elements.setdefault(name, []).extend(come)
