"""ipsets through the `ipset` program: scripts in, saved sets out. The only place that runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

import msgspec


class IpsetError(Exception):
    """`ipset` refused: what it said, with the line of the script that it points at."""


class Held(msgspec.Struct, frozen=True):
    """A set in the kernel: what it was created as (`hash:ip family inet …`), and its entries as it saves them."""

    created: str
    entries: frozenset[str]


def saved(prefix: str) -> dict[str, Held]:
    """Return the sets whose names begin with `prefix`, in this network namespace."""
    created: dict[str, str] = {}
    entries: dict[str, set[str]] = {}
    for line in _run(["save"]).splitlines():
        command, _, rest = line.partition(" ")
        name, _, words = rest.partition(" ")
        if not name.startswith(prefix):
            continue
        if command == "create":
            created[name] = words
            entries[name] = set()
        elif command == "add":
            entries[name].add(words)
    return {name: Held(created[name], frozenset(entries[name])) for name in created}


def restore(lines: Iterable[str]) -> None:
    """Run commands in their order, stopping at the first that fails. Raise `IpsetError`."""
    script = "".join(f"{line}\n" for line in lines)
    if script:
        _run(["restore"], script)


def destroy(names: Iterable[str]) -> None:
    """Remove sets, whatever they hold; no rule may name them any more. Raise `IpsetError`."""
    restore(f"destroy {name}" for name in names)


def _run(arguments: list[str], script: str | None = None) -> str:
    try:
        done = subprocess.run(["ipset", *arguments], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise IpsetError("the ipset program is missing: install the package ipset") from None
    if done.returncode:
        said = done.stderr.strip() or f"exit {done.returncode}"
        raise IpsetError(f"ipset {' '.join(arguments)}: {said}")
    return done.stdout
