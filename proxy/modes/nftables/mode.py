"""nftables mode: keeps the tables `ip pynet-proxy` and `ip6 pynet-proxy` equal to the plans.

Rules, declarations and whole tables go through `nft`; elements, deletions and read-back through netlink. Our memory of
what the kernel holds is `Table`s: a change never reads the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence

from proxy.modes import ApplyError, Drift, Written
from proxy.modes.nftables.base import uses_loopback
from proxy.modes.nftables.compare import Comparison, Observed, compare, is_packets_own
from proxy.modes.nftables.names import REASONS, TABLE, WORDS, Words
from proxy.modes.nftables.picks import own_bytes
from proxy.modes.nftables.script import Change, Script, deletable, render
from proxy.modes.nftables.table import Step, Table, Unrenderable
from proxy.modes.nftables.tamper import Tamper
from proxy.modes.nftables.wire import decode, encode
from proxy.plan import Family, Plan, PlanChange, ServerKey
from pynet.kernel import nftables, sysctl
from pynet.kernel.nfnetlink import (
    DELSETELEM,
    NEWSETELEM,
    Message,
    Nfnetlink,
    NfnetlinkError,
    delete_chain,
    delete_set,
    elements,
    new_chain,
)

# Concatenations with intervals in maps, and `dnat` to address and port of a map: as kube-proxy asks for (KEP-3866).
_OLDEST_KERNEL = (5, 13)
_OLDEST_NFT = (1, 0, 1)
_MOST_ELEMENTS = 20_000  # of one batch; more goes through `nft`


class Nftables:
    """The mode, in the network namespace of its first use. Raise `ApplyError` where this host cannot have it."""

    name = "nftables"

    def __init__(self) -> None:
        if why := unsupported(platform.release(), _nft_version()):
            raise ApplyError(f"nftables mode: {why}")
        self._tables: dict[Family, Table] = {}
        self._rules: dict[Family, dict[str, tuple[bytes, ...]]] = {}  # as the kernel showed them after our writing
        self._is_sure = True  # whether the kernel holds what `_tables` say
        self._verified: int | None = None  # the generation that an audit found to be right
        self._socket: Nfnetlink | None = None
        self._tamper: Tamper | None = None

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Make the tables equal to `plans`; what is right already stays untouched. Raise `ApplyError`."""
        started = time.perf_counter()
        kernel = self._kernel()
        tables: dict[Family, Table] = {}
        whole: list[tuple[str, Change]] = []
        fresh: list[tuple[str, Change]] = []
        repairs: list[tuple[str, Change]] = []
        try:
            for plan in plans:
                table = tables[plan.family] = Table(plan.family, plan.settings)
                step = table.start(plan)
                word = WORDS[plan.family].ip
                observed = _observe(kernel, word)
                table.commit(step)
                whole.append((word, step.change))
                if observed is None or (comparison := compare(table, observed, None)).foreign:
                    fresh.append((word, step.change))
                else:
                    repairs.append((word, comparison.change))
        except Unrenderable as error:
            raise ApplyError(str(error), [error.key]) from error
        except ValueError as error:
            raise ApplyError(f"nftables: {error}") from error
        others = [WORDS[family].ip for family in WORDS if family not in tables and _exists(kernel, WORDS[family].ip)]
        script = render(fresh, fresh=True)
        script.extend(render(repairs))
        script.lines += [f"delete table {word} {TABLE}" for word in others]
        rendered = time.perf_counter()
        self._is_sure = False
        try:
            self._nft(script)
        except ApplyError:
            if not repairs:
                raise
            self._nft(render(whole, fresh=True))  # whatever stood there is in the way: make all of it anew
        self._tables, self._is_sure, self._verified = tables, True, None
        for table in tables.values():
            self._forget_clients(table, _live(table))
        self._rules = {family: kernel.rules(WORDS[family].ip, TABLE) for family in tables}
        self._allow_localhost(plans)
        return Written(script.objects, rendered - started, time.perf_counter() - rendered)

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Write the difference only. Raise `ApplyError`."""
        if any(self._needs_sync(change) for change in changes):
            return self._sync_with(changes)
        started = time.perf_counter()
        steps: list[tuple[Table, Step]] = []
        try:
            for change in changes:
                table = self._tables[change.new.family]
                steps.append((table, table.step({key: change.new.servers.get(key) for key in change.keys})))
        except Unrenderable as error:
            raise ApplyError(str(error), [error.key]) from error
        work = [(table, step) for table, step in steps if step.change]
        if sum(step.change.size() for _, step in work) > _MOST_ELEMENTS:
            return self._sync_with(changes)
        messages, owners = _messages(work)
        rendered = time.perf_counter()
        objects = self._declare(work)
        if messages:
            self._batch(messages, owners)
        for table, step in steps:
            table.commit(step)
            self._learn_rules(table, step)
            self._forget_clients(table, step.live)
        objects += sum(step.change.size() for _, step in work)
        return Written(objects, rendered - started, time.perf_counter() - rendered)

    def audit(self) -> Drift:
        """Compare the kernel with the last plans and repair it. Raise `ApplyError`."""
        if not self._tables:
            return Drift()
        kernel = self._kernel()
        if self._tamper:
            self._tamper.forget()
        generation = kernel.generation()
        if generation == self._verified:
            return Drift()  # nobody has committed anything, here or in any other table, since it was found right
        found: list[tuple[ServerKey | None, str]] = []
        repairs: list[tuple[Table, Comparison | None]] = []
        for family, table in self._tables.items():
            observed = _observe(kernel, WORDS[family].ip)
            if observed is None:
                found.append((None, f"table {WORDS[family].ip} {TABLE} is missing"))
                repairs.append((table, None))
                continue
            comparison = compare(table, observed, self._rules.get(family, {}))
            found += comparison.found
            if comparison.foreign or comparison.change:
                repairs.append((table, comparison))
        if repairs:
            self._repair(repairs)
        self._verified = None if repairs else generation
        for table in self._tables.values():
            self._forget_clients(table, _live(table))
        return Drift(tuple(found))

    def tampered(self) -> bool:
        """Return whether somebody else wrote to our tables since we last looked after them."""
        return bool(self._tables) and self._tamper is not None and self._tamper.noticed()

    def drops(self) -> dict[str, dict[tuple[Family, str], int]]:
        """Return what was refused or dropped since the sets began: reason → (family, what)."""
        kernel = self._kernel()
        found: dict[str, dict[tuple[Family, str], int]] = {}
        for family in self._tables:
            for reason in REASONS:
                name = f"{reason}-counts"
                rows = list(kernel.elements(WORDS[family].ip, TABLE, name))
                for element, (key, _) in zip(rows, decode(WORDS[family], name, rows), strict=True):
                    found.setdefault(reason, {})[family, key] = element.packets
        return found

    def guards_loopback(self) -> bool:
        """Whether the kernel holds our guard of loopback addresses, which says that route_localnet was set by us."""
        return "input" in self._kernel().chains("ip", TABLE)

    def cleanup(self) -> None:
        """Remove our tables, in both families: what leads packets there first.

        A packet between two lookups when all sets go at once would find its Service and no endpoint: be refused.
        """
        hooked = Script()
        for words in WORDS.values():
            names = (name for name, hook in self._kernel().chains(words.ip, TABLE).items() if hook)
            hooked.lines += [f"delete chain {words.ip} {TABLE} {name}" for name in names]
        with contextlib.suppress(ApplyError):  # somebody else may be removing them
            self._nft(hooked)
        script = Script()
        for words in WORDS.values():
            script.lines += [f"add table {words.ip} {TABLE}", f"delete table {words.ip} {TABLE}"]
        self._tables = {}
        self._nft(script)

    def _repair(self, repairs: Sequence[tuple[Table, Comparison | None]]) -> None:
        def anew(table: Table) -> Script:
            change = Table(table.family, table.settings).start(Plan(table.family, table.settings, table.servers)).change
            return render([(WORDS[table.family].ip, change)], fresh=True)

        for table, comparison in repairs:
            if comparison is None or comparison.foreign:
                self._nft(anew(table))
                continue
            try:
                self._nft(render([(WORDS[table.family].ip, comparison.change)]))
            except ApplyError:
                self._nft(anew(table))  # whatever stands there is in the way
        for table, _ in repairs:
            self._rules[table.family] = self._kernel().rules(WORDS[table.family].ip, TABLE)

    def _sync_with(self, changes: Sequence[PlanChange]) -> Written:
        plans = {family: Plan(family, table.settings, table.servers) for family, table in self._tables.items()}
        plans.update({change.new.family: change.new for change in changes})
        return self.sync(tuple(plans.values()))

    def _needs_sync(self, change: PlanChange) -> bool:
        table = self._tables.get(change.new.family)
        return table is None or not self._is_sure or table.settings != change.new.settings

    def _declare(self, work: Sequence[tuple[Table, Step]]) -> int:
        """Make the chains and maps that the batch's elements will refer to: nothing does yet. Return how many objects.

        Chains that pick endpoints, which come and go most, are in the batch itself: `nft` takes 3 to 40 ms, a batch a
        fraction of one.
        """
        declared: list[tuple[str, Change]] = []
        for table, step in work:
            words = WORDS[table.family]
            chains = {
                name: rules for name, rules in step.change.new_chains.items() if own_bytes(words, name, rules) is None
            }
            if step.change.new_sets or chains:
                change = Change(new_sets=step.change.new_sets, new_chains=chains)
                declared.append((WORDS[table.family].ip, change))
        script = render(declared)
        self._nft(script)
        return script.objects

    def _learn_rules(self, table: Table, step: Step) -> None:
        """Note how the kernel shows the rules that were just written, for later audits."""
        known = self._rules.setdefault(table.family, {})
        for name in step.change.new_chains:
            known.update(self._kernel().rules(WORDS[table.family].ip, TABLE, name))
        for name in step.change.old_chains:
            known.pop(name, None)

    def _forget_clients(self, table: Table, live: dict[str, frozenset[str]]) -> None:
        """Take clients out of the maps of remembered ones whose endpoint is no longer there to go to."""
        words = WORDS[table.family]
        for name, endpoints in live.items():
            for _ in range(5):  # a client may expire between our look and the deletion
                there = decode(words, name, self._kernel().elements(words.ip, TABLE, name))
                stale = [key for key, value in there if value not in endpoints]
                gone = elements(DELSETELEM, words.ip, TABLE, name, (encode(name, key) for key in stale))
                try:
                    if stale:
                        self._commit(lambda gone=tuple(gone): self._kernel().batch(gone))  # type: ignore[misc]
                    break
                except NfnetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise ApplyError(f"nftables: removing stale clients from {name}: {error.strerror}") from error

    def _batch(self, messages: Sequence[Message], owners: Sequence[ServerKey | None]) -> None:
        try:
            self._commit(lambda: self._kernel().batch(messages))
        except NfnetlinkError as error:
            owner = owners[error.index] if 0 <= error.index < len(owners) else None
            what = f" at {owner}" if owner else ""
            self._is_sure = False  # what was declared may stand: only a full sync knows
            raise ApplyError(f"nftables: the kernel refused a change{what}: {error.strerror}", _some(owner)) from error

    def _nft(self, script: Script) -> None:
        if not script.lines:
            return
        try:
            self._commit(lambda: nftables.apply(script.text))
        except nftables.NftError as error:
            owners = {script.owners[line] for line in error.lines if line in script.owners}
            raise ApplyError(f"nftables: {error}", sorted(owners)) from error

    def _commit(self, write: Callable[[], None]) -> None:
        if self._tamper is None:
            write()
        else:
            with self._tamper.ours():
                write()

    def _kernel(self) -> Nfnetlink:
        if self._socket is None:
            try:
                self._socket = Nfnetlink()
                self._tamper = Tamper(self._socket)
            except OSError as error:
                raise ApplyError(f"nftables: no netlink socket: {error.strerror}", transient=True) from error
        return self._socket

    def _allow_localhost(self, plans: Sequence[Plan]) -> None:
        """Let replies to node ports on 127.0.0.1 come back in; the guard in chain `input` stands already."""
        if any(uses_loopback(plan.family, plan.settings) for plan in plans):
            sysctl.write("net/ipv4/conf/all/route_localnet", 1)


def unsupported(kernel: str, nft: tuple[int, ...]) -> str:
    """Return what is too old for this mode and what to do, empty if nothing is."""
    found = re.match(r"(\d+)\.(\d+)", kernel)
    if found and (int(found[1]), int(found[2])) < _OLDEST_KERNEL:
        return f"needs Linux {_dotted(_OLDEST_KERNEL)} or newer, this is {kernel}: use --proxy-mode=iptables"
    if nft < _OLDEST_NFT:
        return f"needs nft {_dotted(_OLDEST_NFT)} or newer, this is {_dotted(nft)}: use --proxy-mode=iptables"
    return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _nft_version() -> tuple[int, ...]:
    try:
        return nftables.version()
    except nftables.NftError as error:
        raise ApplyError(f"nftables mode: {error}", transient=True) from error


def _some(key: ServerKey | None) -> tuple[ServerKey, ...]:
    return () if key is None else (key,)


def _exists(kernel: Nfnetlink, word: str) -> bool:
    return TABLE in kernel.tables(word)


def _live(table: Table) -> dict[str, frozenset[str]]:
    return {name: endpoints for _, part in table.layouts() for name, endpoints in part.live.items()}


def _observe(kernel: Nfnetlink, word: str) -> Observed | None:
    """Read a table of ours; None where there is none."""
    if not _exists(kernel, word):
        return None
    sets = {name: facts for name, facts in kernel.sets(word, TABLE).items() if not name.startswith("__")}  # anonymous
    held = {name: list(kernel.elements(word, TABLE, name)) for name in sets if not is_packets_own(name)}
    return Observed(sets, kernel.chains(word, TABLE), kernel.rules(word, TABLE), held)


def _messages(work: Iterable[tuple[Table, Step]]) -> tuple[list[Message], list[ServerKey | None]]:
    """Return the batch for elements and deletions, and the server that each message is for."""
    messages: list[Message] = []
    owners: list[ServerKey | None] = []

    def add(kind: int, words: Words, rows: dict[str, list[tuple[ServerKey | None, str]]]) -> None:
        for name, pairs in rows.items():
            of: dict[ServerKey | None, list[str]] = {}
            for owner, text in pairs:
                of.setdefault(owner, []).append(text)
            for owner, texts in of.items():
                wanted = (encode(name, *text.split(" : ")) for text in texts)
                made = list(elements(kind, words.ip, TABLE, name, wanted))
                messages.extend(made)
                owners.extend([owner] * len(made))

    for table, step in work:
        words = WORDS[table.family]
        for name, rules in step.change.new_chains.items():
            if (wire := own_bytes(words, name, rules)) is not None:
                messages += new_chain(words.ip, TABLE, name, wire)
        owners += [None] * (len(messages) - len(owners))
        add(DELSETELEM, words, step.change.old_elements)
        add(NEWSETELEM, words, step.change.new_elements)
        messages += [delete_chain(words.ip, TABLE, name) for name in deletable(step.change.old_chains)]
        messages += [delete_set(words.ip, TABLE, name) for name in step.change.old_sets]
        owners += [None] * (len(messages) - len(owners))
    return messages, owners
