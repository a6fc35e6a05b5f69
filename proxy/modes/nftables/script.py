"""The difference of two layouts → one transaction's text, each line with the Service port that it is for. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from proxy.modes.nftables.base import Layout
from proxy.modes.nftables.names import TABLE
from proxy.plan import ServerKey

Part = tuple[ServerKey | None, Layout]


class Change(msgspec.Struct, gc=False):
    """What a transaction does to one table. Elements by set: (owner, text) pairs; declarations and rules by name."""

    new_sets: dict[str, str] = {}
    new_chains: dict[str, tuple[str, ...]] = {}
    old_elements: dict[str, list[tuple[ServerKey | None, str]]] = {}
    new_elements: dict[str, list[tuple[ServerKey | None, str]]] = {}
    old_chains: list[str] = []
    old_sets: list[str] = []

    def __bool__(self) -> bool:
        return any(getattr(self, field) for field in self.__struct_fields__)

    def size(self) -> int:
        """Return how many elements it writes and objects it removes."""
        elements = (*self.old_elements.values(), *self.new_elements.values())
        return sum(map(len, elements)) + len(self.old_chains) + len(self.old_sets)


class Script(msgspec.Struct, gc=False):
    """Text for `nft -f -`, and which server a line is for, by line number from 1. `objects`: how many it writes."""

    lines: list[str] = []
    owners: dict[int, ServerKey] = {}
    objects: int = 0

    def extend(self, other: Script) -> None:
        """Append another transaction's lines to this one."""
        self.owners.update({line + len(self.lines): owner for line, owner in other.owners.items()})
        self.lines += other.lines
        self.objects += other.objects

    @property
    def text(self) -> str:
        """Return the transaction as `nft` reads it."""
        return "\n".join(self.lines) + "\n"


def render(changes: Iterable[tuple[str, Change]], *, fresh: bool = False) -> Script:
    """Return the transaction for changes by family word (ip, ip6); `fresh`: the tables begin anew, empty."""
    script = Script([], {})
    for family, change in changes:
        table = f"{family} {TABLE}"
        script.lines.append(f"add table {table}")
        if fresh:
            script.lines += [f"delete table {table}", f"add table {table}"]
        _declare(script, table, change)
        for name, elements in change.old_elements.items():
            _elements(script, f"delete element {table} {name}", elements)
        for name, elements in change.new_elements.items():
            _elements(script, f"add element {table} {name}", elements)
        script.lines += [f"delete chain {table} {name}" for name in deletable(change.old_chains)]
        script.lines += [f"delete {kind_of(name)} {table} {name}" for name in change.old_sets]
        script.objects += len(change.old_chains) + len(change.old_sets)
    return script


def deletable(chains: Iterable[str]) -> list[str]:
    """Return chains in an order in which they can be deleted: those first that go to others."""
    return sorted(chains, key=lambda name: (not name.startswith("ranged-"), name))


def kind_of(own_set: str) -> str:
    """Return what a deletable set is: those that come and go with Services are maps."""
    return "map" if own_set.startswith(("sticky-", "turn-")) else "set"


def _declare(script: Script, table: str, change: Change) -> None:
    for name, declaration in change.new_sets.items():
        word, body = declaration.split(" ", 1)
        script.lines.append(f"add {word} {table} {name} {body}")
    for name, rules in change.new_chains.items():
        hook = f" {{ {rules[0]} }}" if is_base(rules) else ""
        script.lines += [f"add chain {table} {name}{hook}", f"flush chain {table} {name}"]
    for name, rules in change.new_chains.items():
        script.lines += [f"add rule {table} {name} {rule}" for rule in rules[is_base(rules) :]]
        script.objects += len(rules)
    script.objects += len(change.new_sets)


def is_base(rules: tuple[str, ...]) -> bool:
    """Whether the first of `rules` is a base chain's hook."""
    return bool(rules) and rules[0].startswith("type ")


def _elements(script: Script, command: str, elements: list[tuple[ServerKey | None, str]]) -> None:
    """Append one command; the elements of one owner stand in a line."""
    script.lines.append(f"{command} {{")
    owner: ServerKey | None = None
    row: list[str] = []

    def end_row() -> None:
        if row:
            script.lines.append(", ".join(row) + ",")
            if owner is not None:
                script.owners[len(script.lines)] = owner
            row.clear()

    for key, text in elements:
        if key != owner or len(row) >= 64:
            end_row()
            owner = key
        row.append(text)
    end_row()
    script.lines.append("}")
    script.objects += len(elements)
