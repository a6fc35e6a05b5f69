"""Writes the iptables layout: whole at first (only what differs from what the kernel holds), then chain by chain."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence

import msgspec

from proxy.modes import ApplyError, Drift, Written
from proxy.modes.iptables import layout
from proxy.modes.iptables.affinity import Forgetting
from proxy.modes.iptables.dispatch import Chains, Directory
from proxy.modes.iptables.tamper import Watcher
from proxy.plan import Family, Plan, PlanChange, ServerKey
from pynet.daemon import logs
from pynet.kernel import sysctl
from pynet.kernel.iptables import BACKENDS, Backend, IptablesError, Tool, Version, backend_of_host

log = logs.get(__name__)
_TABLES = ("filter", "nat")
_EMPTY = {  # a table that comes to be when it is written
    "filter": "".join(f":{chain} ACCEPT [0:0]\n" for chain in ("INPUT", "FORWARD", "OUTPUT")),
    "nat": "".join(f":{chain} ACCEPT [0:0]\n" for chain in ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")),
}
_RULES_AT_ONCE = 2000
_OURS = re.compile(
    r"PYNET-(SERVICES|NODEPORTS|HEALTH|IPS|REJECT|DROP|POSTROUTING|INPUT|FORWARD|OUTPUT|REFUSE|UNALLOCATED"
    r"|(SVC|SVL|EXT|FW|PT)-[A-Z2-7]{16}|IP-[0-9A-Z.-]+|NP-[0-9a-z-]+)"
)
_VERSIONS: dict[Family, Version] = {Family.V4: 4, Family.V6: 6}


class Held(msgspec.Struct, frozen=True):
    """What a table of the kernel holds: our chains with their rules, and which of our jumps.

    `foreign`: how many entries of a legacy table are not ours.
    """

    chains: Chains
    jumps: frozenset[tuple[str, str]]
    foreign: int = 0


class Standing(msgspec.Struct, frozen=True):
    """What was written last, in one family."""

    plan: Plan
    directory: Directory
    trees: Chains


class Step:
    """From the chains of a table that a change concerns to what they become."""

    def __init__(self, table: str, before: Chains, after: Chains) -> None:
        self.table = table
        self.differing = {name: rules for name, rules in after.items() if before.get(name) != rules}
        self.replaced = {name: rules for name, rules in before.items() if name in self.differing or name not in after}
        self._gone = [name for name in before if name not in after]

    def script(self, rules_at_once: int | None) -> str:
        """Return the rule file that does it; empty where nothing differs."""
        if not self.differing and not self._gone:
            return ""
        return "".join(layout.in_parts(self.table, self.differing, self._gone, (), rules_at_once))


class IptablesMode:
    """The iptables mode, on one back end. `backend`: None: the one that this host uses."""

    name = "iptables"

    def __init__(self, backend: Backend | None = None, *, drop_invalid: bool = True) -> None:
        self.backend: Backend = backend or backend_of_host()
        self._drop_invalid = drop_invalid
        # iptables-nft-restore 1.8.9 searches a transaction's chains from the start at each rule: 10,000 chains of 10
        # rules take 18 s at once and 3 s in parts. The legacy kernel replaces the whole table at each transaction.
        self._rules_at_once = _RULES_AT_ONCE if self.backend == "nft" else None
        self._standing: dict[Family, Standing] = {}
        self._unsure: set[Family] = (
            set()
        )  # where a change failed: the directory is ahead, parts of the change may stand
        self._watchers: dict[Family, Watcher] = {}
        self._forgetting = Forgetting()
        self._is_alone = False

    def sync(self, plans: Sequence[Plan]) -> Written:
        """Read what the kernel holds of ours and write what differs. Raise `ApplyError`."""
        written = Written.sum([self._converge(plan)[0] for plan in plans])
        if not self._is_alone:
            self._is_alone = True
            self._clean_other_backend()
        return written

    def update(self, changes: Sequence[PlanChange]) -> Written:
        """Rewrite the chains of the servers that changed. Raise `ApplyError`."""
        return Written.sum(
            self._update(change)
            if change.old.settings == change.new.settings and change.new.family in self._standing.keys() - self._unsure
            else self._converge(change.new)[0]
            for change in changes
        )

    def audit(self) -> Drift:
        """Read the kernel back and repair what differs from the last plans. Raise `ApplyError`."""
        found: list[tuple[ServerKey | None, str]] = []
        for standing in list(self._standing.values()):
            _, names = self._converge(standing.plan)
            owners = _owners(standing.plan) if names else {}
            found += ((owners.get(name), f"{standing.plan.family.value}: {what}") for name, what in names)
        self._forgetting.look(standing.plan for standing in self._standing.values())
        return Drift(tuple(found))

    def tampered(self) -> bool:
        """Whether somebody else removed or added rules in our chains."""
        try:
            return any(self._watchers[family].noticed() for family in self._standing)
        except (OSError, IptablesError) as error:
            log.warning("cannot tell whether rules were changed", extra=logs.fields(error=error))
            return True

    def rule_counts(self) -> dict[tuple[Family, str], int]:
        """Return how many rules of ours stand, by family and table."""
        return {
            (family, table): count
            for family, watcher in self._watchers.items()
            for table, count in watcher.rules.items()
        }

    def packets(self, what: str) -> int | None:
        """Return how many packets the rules of `layout.COUNTING` have seen; None: none stands. From any thread."""
        table, chain, match = layout.COUNTING[what]
        try:
            counts = [
                count
                for family in list(self._standing)
                for rule, count in self._tool(family).packets(table, chain)
                if match in rule
            ]
        except IptablesError as error:
            log.debug("packets cannot be counted", extra=logs.fields(what=what, error=error))
            return None
        return sum(counts) if counts else None

    def cleanup(self) -> None:
        """Remove our chains and jumps from both back ends."""
        for backend in BACKENDS:
            self._clean_backend(backend)
        self._standing.clear()
        for watcher in self._watchers.values():
            watcher.close()
        self._watchers.clear()

    def guards_loopback(self) -> bool:
        """Whether the kernel holds our guard of loopback addresses, which says that route_localnet was set by us."""
        tools = (Tool(backend, 4) for backend in BACKENDS)
        return any("-d 127.0.0.0/8" in rule for tool in tools for rule in tool.rules_of("filter", "PYNET-INPUT"))

    def _clean_other_backend(self) -> None:
        """Remove what an earlier run left in the back end that is not in use, now that this one's rules stand."""
        for backend in BACKENDS:
            if backend != self.backend:
                self._clean_backend(backend)

    def _clean_backend(self, backend: Backend) -> None:
        for version in _VERSIONS.values():
            tool = Tool(backend, version)
            try:
                saved = tool.tables()
                for table in _TABLES:
                    script = _removal(table, parse(saved.get(table, "")))
                    if script:
                        tool.restore(script)
            except IptablesError as error:
                log.warning("clean-up failed", extra=logs.fields(backend=backend, ip_version=version, error=error))

    def _tool(self, family: Family) -> Tool:
        return Tool(self.backend, _VERSIONS[family])

    def _converge(self, plan: Plan) -> tuple[Written, list[tuple[str, str]]]:
        """Make the kernel hold `plan`; return what was written, and (chain, what was wrong) for each difference."""
        began = time.monotonic()
        directory = layout.directory(plan)
        trees = directory.chains()
        wanted = {
            "filter": layout.filter_chains(plan, drop_invalid=self._drop_invalid),
            "nat": layout.nat_chains(plan, trees),
        }
        rendered = time.monotonic()
        tool = self._tool(plan.family)
        script = ""
        wrong: list[tuple[str, str]] = []
        foreign: dict[str, int] = {}
        for table in _TABLES:
            held = parse(_saved(tool, table) or _EMPTY[table])
            foreign[table] = held.foreign
            differing = {name: rules for name, rules in wanted[table].items() if held.chains.get(name) != rules}
            gone = [name for name in held.chains if name not in wanted[table]]
            jumps = [jump for jump in _jumps(table) if jump not in held.jumps]
            wrong += (
                (name, f"{table} chain {name} {'differs' if name in held.chains else 'is missing'}")
                for name in differing
            )
            wrong += ((name, f"{table} chain {name} is not in the plan") for name in gone)
            wrong += ((ours, f"{table} {builtin} does not jump to {ours}") for builtin, ours in jumps)
            if differing or gone or jumps:
                commands = [f"-I {builtin} -j {ours}" for builtin, ours in jumps]
                script += "".join(layout.in_parts(table, differing, gone, commands, self._rules_at_once))
        if layout.uses_loopback(plan.family, plan.settings):
            sysctl.write("net/ipv4/conf/all/route_localnet", 1)
        if script:
            self._standing.pop(plan.family, None)
            self._restore(tool, script, plan)
        if plan.family not in self._watchers:
            self._watchers[plan.family] = Watcher(tool)
        self._watchers[plan.family].wrote_all(wanted, foreign)
        self._standing[plan.family] = Standing(plan, directory, trees)
        self._unsure.discard(plan.family)
        return Written(script.count("\n-A "), rendered - began, time.monotonic() - rendered), wrong

    def _update(self, change: PlanChange) -> Written:
        began = time.monotonic()
        self._unsure.add(change.new.family)
        standing = self._standing[change.new.family]
        before: Chains = {}
        after: Chains = {}
        moved = []
        settings = change.new.settings
        for key in change.keys:
            old, new = standing.plan.servers.get(key), change.new.servers.get(key)
            before |= layout.server_chains(old, settings) if old else {}
            after |= layout.server_chains(new, settings) if new else {}
            left, entered = layout.entrances(old, settings), layout.entrances(new, settings)
            if left != entered:
                moved.append((left, entered))
        trees = standing.trees
        if moved:
            for left, _ in moved:
                standing.directory.remove(*left)
            for _, entered in moved:
                standing.directory.add(*entered)
            trees = standing.directory.chains()
            before |= {name: rules for name, rules in standing.trees.items() if trees.get(name) != rules}
            after |= {name: rules for name, rules in trees.items() if standing.trees.get(name) != rules}
        steps = [Step("nat", before, after)]
        if _health_ports(standing.plan, change.keys) != _health_ports(change.new, change.keys):
            steps.append(Step("filter", layout.health_chains(standing.plan), layout.health_chains(change.new)))
        script = "".join(step.script(self._rules_at_once) for step in steps)
        rendered = time.monotonic()
        if script:
            self._restore(self._tool(change.new.family), script, change.new)
            for step in steps:
                self._watchers[change.new.family].wrote(step.table, step.replaced, step.differing)
        self._standing[change.new.family] = Standing(change.new, standing.directory, trees)
        self._unsure.discard(change.new.family)
        return Written(script.count("\n-A "), rendered - began, time.monotonic() - rendered)

    def _restore(self, tool: Tool, script: str, plan: Plan) -> None:
        try:
            tool.restore(script)
        except IptablesError as error:
            text = line_of(script, error.line)
            names = re.findall(r"PYNET-[^ ]+", text)[:1]
            key = _owners(plan).get(names[0]) if names else None
            message = f"{error}; line {error.line}: {text}" if text else str(error)
            raise ApplyError(message, [key] if key else [], transient=error.transient) from error


def parse(saved: str) -> Held:
    """Return what a saved table holds of ours."""
    chains: Chains = {}
    jumps = set()
    foreign = 1  # the end of the table
    for line in saved.splitlines():
        if line.startswith(":"):
            name, policy, _ = line[1:].split(" ", 2)
            if _OURS.fullmatch(name):
                chains[name] = []
            else:
                foreign += 2 if policy == "-" else 1
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            if chain in chains:
                chains[chain].append(rule)
            elif rule.startswith("-j PYNET-") and _OURS.fullmatch(rule[3:]) and (chain, rule[3:]) not in jumps:
                jumps.add((chain, rule[3:]))
            else:
                foreign += 1
    return Held(chains, frozenset(jumps), foreign)


def _health_ports(plan: Plan, keys: Iterable[ServerKey]) -> list[tuple[ServerKey, int]]:
    found = ((key, plan.servers.get(key)) for key in keys)
    return [(key, server.health_check_port) for key, server in found if server and server.health_check_port]


def line_of(script: str, number: int | None) -> str:
    """Return a rule file's line, empty where that says nothing."""
    lines = script.splitlines()
    text = lines[number - 1] if number and number <= len(lines) else ""
    return "" if text.startswith(("COMMIT", "*")) else text[:300]


def _removal(table: str, held: Held) -> str:
    """Return the rule file that removes what is held of ours; empty where nothing is."""
    jumps = [f"-D {builtin} -j {ours}" for builtin, ours in sorted(held.jumps)]
    if not jumps and not held.chains:
        return ""
    return layout.render(table, {}, held.chains, jumps)


def _jumps(table: str) -> Iterable[tuple[str, str]]:
    return ((builtin, ours) for name, builtin, ours in layout.JUMPS if name == table)


def _saved(tool: Tool, table: str) -> str:
    try:
        return tool.save(table)
    except IptablesError as error:
        raise ApplyError(str(error), transient=error.transient) from error


def _owners(plan: Plan) -> dict[str, ServerKey]:
    """Return which Service port each chain belongs to."""
    return {
        chain: server.key for server in plan.servers.values() for chain in layout.server_chains(server, plan.settings)
    }
