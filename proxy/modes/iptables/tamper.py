"""Whether somebody else changed our chains: told from numbers that the kernel gives away cheaply.

nft back end: nothing was committed since our own last write, or every chain of ours still has as many rules, and jumps
to it, as were written. Legacy: the table has no fewer entries than after our own last write.
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
        self._uses: dict[str, Counter[str]] = {}
        self._kernel = Nfnetlink() if tool.backend == "nft" else None
        self._generation = 0
        self._sizes: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        """Give the socket back."""
        if self._kernel:
            self._kernel.close()

    def wrote_all(self, chains: Mapping[str, Chains]) -> None:
        """Note that the kernel holds exactly `chains` of ours, by table."""
        self._uses = {table: _uses(found.items()) for table, found in chains.items()}
        for table, _, ours in layout.JUMPS:
            self._uses[table][ours] += 1
        self._note()

    def wrote(self, table: str, before: Chains, after: Chains) -> None:
        """Note that chains of a table were replaced."""
        uses = self._uses[table]
        uses.subtract(_uses(before.items()))
        uses.update(_uses(after.items()))
        for name in before.keys() - after.keys():
            del uses[name]
        self._note()

    def noticed(self) -> bool:
        """Whether something of ours is missing or more."""
        return self._differs_in_nft() if self._kernel else self._differs_in_legacy()

    def _note(self) -> None:
        if self._kernel:
            self._generation = self._kernel.generation()
        else:
            self._sizes = {table: legacy_size(self._tool.version, table) for table in self._uses}

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
        for table, noted in self._sizes.items():
            size = legacy_size(self._tool.version, table)
            if size == noted:
                continue
            if size < noted or self._lacks_jump(table):
                return True
            self._sizes[table] = size
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
