"""Writes the constant iptables rules, says what was missing of them, removes them."""

from __future__ import annotations

from proxy.modes.ipvs import rules
from proxy.plan import Family, NodeSettings
from pynet.daemon import logs
from pynet.kernel.iptables import BACKENDS, IptablesError, Tool, Version
from pynet.kernel.nfnetlink import Nfnetlink

log = logs.get(__name__)
VERSIONS: dict[Family, Version] = {Family.V4: 4, Family.V6: 6}


def converge(tool: Tool, family: Family, settings: NodeSettings) -> list[str]:
    """Make our chains and jumps what they should be; return a line for each that was not. Raise `IptablesError`."""
    wrong: list[str] = []
    script = ""
    saved = tool.tables()
    for table, wanted in rules.chains(family, settings).items():
        held, jumps = rules.parsed(saved.get(table, ""))
        differing = {name: lines for name, lines in wanted.items() if held.get(name) != lines}
        gone = [name for name in held if name not in wanted]
        missing = [jump[1:] for jump in rules.JUMPS if jump[0] == table and jump[1:] not in jumps]
        wrong += (f"{table} chain {name} {'differs' if name in held else 'is missing'}" for name in differing)
        wrong += (f"{table} chain {name} is not ours any more" for name in gone)
        wrong += (f"{table} {builtin} does not jump to {ours}" for builtin, ours in missing)
        if differing or gone or missing:
            script += rules.render(table, differing, gone, [f"-I {builtin} -j {ours}" for builtin, ours in missing])
    if script:
        tool.restore(script)
    return wrong


class Canary:
    """Whether the jumps to our chains stand, in one family; nft's rules are read only after somebody's commit."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._kernel = Nfnetlink() if tool.backend == "nft" else None
        self._seen = -1

    def is_alive(self) -> bool:
        """Look. Raise `IptablesError`, `OSError`."""
        generation = self._kernel.generation() if self._kernel else -1
        if generation == self._seen != -1:
            return True
        saved = self._tool.tables()
        there = {table: rules.parsed(text)[1] for table, text in saved.items()}
        is_alive = all((builtin, ours) in there.get(table, ()) for table, builtin, ours in rules.JUMPS)
        self._seen = generation if is_alive else -1
        return is_alive

    def close(self) -> None:
        """Give the socket back."""
        if self._kernel:
            self._kernel.close()


def remove() -> None:
    """Remove our chains and jumps from both back ends and both IP versions; what fails is logged."""
    for backend in BACKENDS:
        for version in VERSIONS.values():
            tool = Tool(backend, version)
            try:
                saved = tool.tables()
                for table in rules.TABLES:
                    held, jumps = rules.parsed(saved.get(table, ""))
                    if held or jumps:
                        deletions = [f"-D {builtin} -j {ours}" for builtin, ours in sorted(jumps)]
                        tool.restore(rules.render(table, {}, held, deletions))
            except IptablesError as error:
                log.warning("clean-up failed", extra=logs.fields(backend=backend, ip_version=version, error=error))
