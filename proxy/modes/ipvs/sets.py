"""ipset entries as they are and as they should be → the commands between, additions apart from removals. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from proxy.modes.ipvs.layout import SETS, Piece, set_name, set_options
from proxy.plan import Family

Entries = dict[str, frozenset[str]]
"""By the set's suffix."""


def entries_of(pieces: Iterable[Piece], on_link: Collection[str]) -> Entries:
    """Return what all pieces together have in the sets; `on_link`: the addresses of our link."""
    found: dict[str, set[str]] = {suffix: set() for suffix in SETS}
    for piece in pieces:
        for suffix, entries in piece.entries.items():
            found[suffix].update(entries)
    found["IPS"].update(on_link)
    return {suffix: frozenset(entries) for suffix, entries in found.items()}


def declarations(family: Family) -> list[str]:
    """Return the commands that make all sets, where they are not there yet."""
    lines = []
    for suffix, kind in SETS.items():
        options = (f"{key} {value}".strip() for key, value in set_options(family, suffix).items())
        lines.append(" ".join(("create", set_name(family, suffix), kind, *options, "-exist")))
    return lines


def differences(
    family: Family, have: Mapping[str, frozenset[str]], want: Mapping[str, frozenset[str]]
) -> tuple[list[str], list[str]]:
    """Return (additions, removals); an entry that only changes what it carries is an addition."""
    additions: list[str] = []
    removals: list[str] = []
    for suffix in SETS:
        name, had, wanted = set_name(family, suffix), have.get(suffix, frozenset()), want.get(suffix, frozenset())
        if had == wanted:
            continue
        kept = {_key(entry) for entry in wanted}
        additions += (f"add {name} {entry} -exist" for entry in sorted(wanted - had))
        removals += (f"del {name} {_key(entry)} -exist" for entry in sorted(had - wanted) if _key(entry) not in kept)
    return additions, removals


def marks_of(entries: Iterable[str]) -> dict[str, int]:
    """Return the firewall mark of each frontend, from the entries of the set that carries them."""
    found = {}
    for entry in entries:
        words = entry.split()
        if len(words) >= 3 and words[1] == "skbmark":
            found[words[0]] = int(words[2].partition("/")[0], 16)
    return found


def _key(entry: str) -> str:
    """Return what names an entry: what it carries (skbmark) is no part of it."""
    return entry.partition(" ")[0]
