"""Whether somebody else changed our chains: told from numbers that the kernel gives away cheaply.

nft back end: nothing was committed since our own last write, or every chain of ours still has as many rules, and jumps
to it, as were written. Legacy: the table has no fewer entries than it had, ours and other people's. What is expected is
reckoned from what was written, never read after it: whoever writes at the same moment is noticed as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from proxy.modes.iptables import layout
from proxy.modes.iptables.dispatch import Chains
from pynet.kernel.iptables import Tool, legacy_size
from pynet.kernel.nfnetlink import Nfnetlink

_NFT_FAMILIES = {4: "ip", 6: "ip6"}


class Watcher:
    """The numbers of one family."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._kernel = Nfnetlink() if tool.backend == "nft" else None
        self._uses: dict[str, Counter[str]] = {}
        self._generation = -1  # the last one after which `_uses` were seen in the kernel
        self._entries: dict[str, int] = {}
        self.rules: dict[str, int] = {}  # of ours, by table

    def close(self) -> None:
        """Give the socket back."""
        if self._kernel:
            self._kernel.close()

    def wrote_all(self, chains: Mapping[str, Chains], foreign: Mapping[str, int]) -> None:
        """Note that `chains` were written, by table; `foreign`: the entries beside them in a legacy table."""
        self._generation = -1
        for table, found in chains.items():
            self._uses[table] = _uses(found.items()) if self._kernel else Counter()
            self._entries[table] = foreign[table] + _entries(found)
            self.rules[table] = sum(map(len, found.values()))
        for table, _, ours in layout.JUMPS:
            self._uses[table][ours] += 1
            self._entries[table] += 1

    def wrote(self, table: str, before: Chains, after: Chains) -> None:
        """Note that chains of a table were replaced."""
        self._entries[table] += _entries(after) - _entries(before)
        self.rules[table] += sum(map(len, after.values())) - sum(map(len, before.values()))
        self._generation = -1
        if not self._kernel:
            return
        uses = self._uses[table]
        uses.subtract(_uses(before.items()))
        uses.update(_uses(after.items()))
        for name in before.keys() - after.keys():
            del uses[name]

    def noticed(self) -> bool:
        """Whether something of ours is missing or more."""
        return self._differs_in_nft() if self._kernel else self._differs_in_legacy()

    def _differs_in_nft(self) -> bool:
        assert self._kernel is not None
        generation = self._kernel.generation()
        if generation == self._generation:
            return False
        for table, wanted in self._uses.items():
            uses = self._kernel.uses(_NFT_FAMILIES[self._tool.version], table)
            if any(uses.get(name) != count for name, count in wanted.items()):
                return True
        self._generation = generation
        return False

    def _differs_in_legacy(self) -> bool:
        for table, expected in self._entries.items():
            entries, _ = legacy_size(self._tool.version, table)
            if entries == expected:
                continue
            if entries < expected or self._lacks_jump(table):
                return True
            self._entries[table] = entries
        return False

    def _lacks_jump(self, table: str) -> bool:
        return any(
            f"-A {builtin} -j {ours}" not in self._tool.rules_of(table, builtin)
            for name, builtin, ours in layout.JUMPS
            if name == table
        )


def _uses(chains: Iterable[tuple[str, list[str]]]) -> Counter[str]:
    """Return how often each chain is used: by its own rules, and by those that jump to it."""
    uses: Counter[str] = Counter()
    for name, rules in chains:
        uses[name] += len(rules)
        for rule in rules:
            target = rule.rpartition("-j ")[2]
            if target.startswith(layout.PREFIX):
                uses[target] += 1
    return uses


def _entries(chains: Chains) -> int:
    """Return how many entries chains take in a legacy table: one a rule, and two a chain (its name, its end)."""
    return sum(2 + len(rules) for rules in chains.values())
