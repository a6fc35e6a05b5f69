"""Brings the masquerade into the kernel, and keeps it there: nftables where it works, else iptables with ipsets."""

from __future__ import annotations

from typing import Any, Literal

from cni.node.masquerade import TABLE, Masquerade, nft_changes, nft_table
from pynet.daemon import logs
from pynet.kernel import nftables

log = logs.get(__name__)
Choice = Literal["auto", "nftables", "iptables", "off"]


class Nftables:
    """Our table. What was put there last is remembered: a change of the cluster is a change of a few elements."""

    name = "nftables"

    def __init__(self) -> None:
        self._last: Masquerade | None = None

    def ensure(self, wanted: Masquerade, audit: bool) -> bool:
        """Bring the table to `wanted`; with `audit`, whatever became of it. Return whether that changed something."""
        if audit and self._last is not None and not self._intact(self._last):
            log.warning(
                "the masquerade table was changed by another hand; writing it anew", extra=logs.fields(table=TABLE)
            )
            self._last = None
        if wanted == self._last:
            return False
        script = nft_changes(self._last, wanted) if self._last is not None else ""
        try:
            if script:
                nftables.apply(script)
        except nftables.NftError as error:
            log.info("element changes refused; writing the whole table", extra=logs.fields(error=error))
            script = ""
        if not script:
            nftables.apply(nft_table(wanted))
        self._last = wanted
        return True

    @staticmethod
    def remove() -> bool:
        """Take our table away; return whether it was there."""
        if not nftables.list_table("inet", TABLE):
            return False
        nftables.apply(f"delete table inet {TABLE}\n")
        return True

    @staticmethod
    def _intact(last: Masquerade) -> bool:
        """Say whether the table still is what was written: all sets' elements, and as many rules in each chain."""
        rules: dict[str, int] = {}
        sets: dict[str, set[str]] = {}
        for entry in nftables.list_table("inet", TABLE):
            if "rule" in entry:
                chain = entry["rule"]["chain"]
                rules[chain] = rules.get(chain, 0) + 1
            elif "set" in entry:
                sets[entry["set"]["name"]] = {_prefix(element) for element in entry["set"].get("elem", ())}
        expected = {
            f"{role}{family}": {_shortest(member) for member in last.members(role, family)}
            for role in ("pods", "direct")
            for family in (4, 6)
        }
        return sets == expected and rules == {"postrouting": 2, "outside4": 3, "outside6": 3}


def _prefix(element: Any) -> str:
    if isinstance(element, dict) and "prefix" in element:
        return f"{element['prefix']['addr']}/{element['prefix']['len']}"
    return str(element)


def _shortest(prefix: str) -> str:
    """Return a prefix as nft lists it: a whole address without its length."""
    base, _, length = prefix.partition("/")
    return base if length == ("128" if ":" in base else "32") else prefix


def chosen(choice: Choice) -> Nftables | None:
    """Return what masquerades; None for nothing."""
    return None if choice == "off" else Nftables()
