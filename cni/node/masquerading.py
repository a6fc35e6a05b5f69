"""Brings the masquerade into the kernel, and keeps it there: nftables where it works, else iptables with ipsets."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, Protocol

from cni.node.masquerade import CHAIN, JUMP, TABLE, Masquerade, chain_rules, nft_changes, nft_table, set_name
from pynet.daemon import logs
from pynet.kernel import ipset, nftables
from pynet.kernel.ipset import IpsetError
from pynet.kernel.iptables import BACKENDS, IptablesError, Tool, Version, backend_of_host
from pynet.kernel.nftables import NftError

log = logs.get(__name__)
VERSIONS: tuple[Version, ...] = (4, 6)
Choice = Literal["auto", "nftables", "iptables", "off"]


class Masquerading(Protocol):
    """One way to masquerade."""

    @property
    def name(self) -> str:
        """What it is called."""

    def ensure(self, wanted: Masquerade, audit: bool) -> bool:
        """Bring the kernel to `wanted`; with `audit`, whatever became of it. Return whether that changed something."""

    def remove(self) -> bool:
        """Take away all that this way put there; return whether there was something."""


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
        except NftError as error:
            log.info("element changes refused; writing the whole table", extra=logs.fields(error=error))
            script = ""
        if not script:
            nftables.apply(nft_table(wanted))
        self._last = wanted
        return True

    def remove(self) -> bool:
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


class Iptables:
    """Our chain in `nat` and its two ipsets, of each family that pods have."""

    name = "iptables"

    def __init__(self) -> None:
        self._last: Masquerade | None = None

    def ensure(self, wanted: Masquerade, audit: bool) -> bool:
        """Bring sets and chains to `wanted`; with `audit`, whatever became of them. Return whether that changed."""
        if wanted == self._last and not audit:
            return False
        backend = backend_of_host()
        held = ipset.saved(set_name("", 0))
        commands: list[str] = []
        changed = False
        for version in VERSIONS:
            if not wanted.members("pods", version):
                continue
            for role in ("pods", "direct"):
                name = set_name(role, version)
                have = {_whole(entry) for entry in held[name].entries} if name in held else set()
                want = {part for entry in wanted.members(role, version) for part in _halves(entry)}
                if name not in held:
                    commands.append(f"create {name} hash:net family {'inet' if version == 4 else 'inet6'}")
                commands += [f"del {name} {entry}" for entry in sorted(have - want)]
                commands += [f"add {name} {entry}" for entry in sorted(want - have)]
        ipset.restore(commands)
        for version in VERSIONS:
            if wanted.members("pods", version):
                changed = _ensure_chain(Tool(backend, version)) or changed
        changed = changed or bool(commands)
        if changed and wanted == self._last:
            log.warning("masquerade changed by another hand; put right", extra=logs.fields(chain=CHAIN))
        self._last = wanted
        return changed

    def remove(self) -> bool:
        """Take chains and sets away; return whether there were some."""
        found = False
        for backend in BACKENDS:
            for version in VERSIONS:
                tool = Tool(backend, version)
                saved = tool.save("nat").splitlines() if backend == "legacy" else tool.rules_of("nat", CHAIN)
                if any(line.startswith((f":{CHAIN} ", f"-N {CHAIN}")) for line in saved):
                    with contextlib.suppress(IptablesError):
                        tool.change("nat", ["-D", "POSTROUTING", *JUMP])
                    tool.change("nat", ["-F", CHAIN])
                    tool.change("nat", ["-X", CHAIN])
                    found = True
        held = ipset.saved(set_name("", 0))
        ipset.destroy(held)
        return found or bool(held)


def _ensure_chain(tool: Tool) -> bool:
    wanted = chain_rules(tool.version)
    changed = False
    if [rule for rule in tool.rules_of("nat", CHAIN) if rule.startswith("-A ")] != wanted:
        tool.restore("\n".join(["*nat", f":{CHAIN} - [0:0]", *wanted, "COMMIT", ""]))
        changed = True
    if not any(rule.endswith(f"-j {CHAIN}") for rule in tool.rules_of("nat", "POSTROUTING")):
        tool.change("nat", ["-A", "POSTROUTING", *JUMP])
        changed = True
    return changed


def _halves(prefix: str) -> tuple[str, ...]:
    """Return a prefix as hash:net takes it: it knows no length of 0."""
    return {"0.0.0.0/0": ("0.0.0.0/1", "128.0.0.0/1"), "::/0": ("::/1", "8000::/1")}.get(prefix, (prefix,))


def _whole(entry: str) -> str:
    """Return an entry as a prefix: ipset lists a whole address without its length."""
    return entry if "/" in entry else f"{entry}/{128 if ':' in entry else 32}"


class Auto:
    """nftables; iptables for good, where nftables refuses at the first time."""

    def __init__(self) -> None:
        self._way: Masquerading = Nftables()
        self._settled = False

    @property
    def name(self) -> str:
        """The way in use."""
        return self._way.name

    def ensure(self, wanted: Masquerade, audit: bool) -> bool:
        """As the way in use does."""
        if self._settled:
            return self._way.ensure(wanted, audit)
        try:
            changed = self._way.ensure(wanted, audit)
            with contextlib.suppress(IptablesError, IpsetError):
                Iptables().remove()
        except NftError as error:
            other = Iptables()
            try:
                changed = other.ensure(wanted, audit)
            except (IptablesError, IpsetError) as second:
                raise IptablesError(f"neither nftables nor iptables can masquerade: {error}; {second}") from None
            log.info("nftables cannot masquerade; iptables does", extra=logs.fields(error=error))
            self._way = other
        self._settled = True
        return changed

    def remove(self) -> bool:
        """Take both ways' objects away."""
        return Off().remove()


class Off:
    """No masquerade, and nothing left of an earlier one."""

    name = "off"

    def __init__(self) -> None:
        self._done = False

    def ensure(self, wanted: Masquerade, audit: bool) -> bool:  # noqa: ARG002
        """Remove what there is, once."""
        changed = not self._done and self.remove()
        self._done = True
        return changed

    def remove(self) -> bool:
        """Take both ways' objects away."""
        removed = False
        for way in (Nftables(), Iptables()):
            with contextlib.suppress(NftError, IptablesError, IpsetError):
                removed = way.remove() or removed
        return removed


class Only:
    """One way, and nothing left of the other: masquerading happens in one place."""

    def __init__(self, way: Masquerading, other: Masquerading) -> None:
        self._way, self._other = way, other
        self._clean = False
        self.name = way.name

    def ensure(self, wanted: Masquerade, audit: bool) -> bool:
        """As the way does."""
        changed = self._way.ensure(wanted, audit)
        if not self._clean:
            with contextlib.suppress(NftError, IptablesError, IpsetError):
                self._other.remove()
            self._clean = True
        return changed

    def remove(self) -> bool:
        """Take both ways' objects away."""
        return Off().remove()


def chosen(choice: Choice) -> Masquerading:
    """Return what masquerades."""
    ways: dict[Choice, Masquerading] = {
        "auto": Auto(),
        "nftables": Only(Nftables(), Iptables()),
        "iptables": Only(Iptables(), Nftables()),
        "off": Off(),
    }
    return ways[choice]
