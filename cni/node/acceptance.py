"""A way for pods' packets past a closed FORWARD chain: policy DROP as Docker sets it, or a last rule that refuses all.

In nftables an accept in one table does not outvote a drop in another, so the way has to be in the closed chain itself:
a jump to our own chain, in the back end (legacy, nft) that is closed. Closed chains of native nftables tables are not
touched, and told. The chain is decided purely; `ensure` applies it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable

from pynet.daemon import logs
from pynet.kernel import nftables
from pynet.kernel.iptables import BACKENDS, Backend, IptablesError, Tool, Version
from pynet.netstate import family_of

log = logs.get(__name__)
CHAIN = "PYNET-PODS"  # pyproxy has a PYNET-FORWARD of its own
_JUMP = ["-m", "comment", "--comment", "pynetd: pods", "-j", CHAIN]
_REFUSES_ALL = re.compile(r'^-A FORWARD (-m comment --comment ("[^"]*"|\S+) )?-j (DROP|REJECT)\b')
VERSIONS: tuple[Version, ...] = (4, 6)


def position(rules: list[str]) -> int | None:
    """Return where in FORWARD (`-S` lines) a jump has to stand to be reached: 0 for the end; None: it is open."""
    only = [rule for rule in rules if rule.startswith("-A FORWARD ")]
    for number, rule in enumerate(only, 1):
        if _REFUSES_ALL.match(rule):
            return number
    return 0 if "-P FORWARD DROP" in rules else None


def jump_at(rules: list[str]) -> int | None:
    """Return the number of our jump among FORWARD's rules."""
    only = [rule for rule in rules if rule.startswith("-A FORWARD ")]
    return next((number for number, rule in enumerate(only, 1) if rule.endswith(f"-j {CHAIN}")), None)


def accepting(cidrs: Iterable[str], version: Version) -> list[str]:
    """Return our chain's rules: all that pods send and get."""
    own = [cidr for cidr in cidrs if family_of(cidr) == version]
    return [f"-A {CHAIN} {side} {cidr} -j ACCEPT" for cidr in own for side in ("-s", "-d")]


def ensure(cidrs: Iterable[str]) -> list[str]:
    """Let `cidrs` pass where FORWARD is closed; return what stands in the way all the same, in words."""
    wanted = tuple(cidrs)
    complaints: list[str] = []
    for backend in BACKENDS:
        for version in VERSIONS:
            if not _exists(backend, version):
                continue
            try:
                _ensure(Tool(backend, version), accepting(wanted, version))
            except IptablesError as error:
                complaints.append(str(error))
    return complaints + [
        f"the chain {chain['family']} {chain['table']} {chain['name']} drops what it does not accept; "
        "let the pods' CIDRs pass there"
        for chain in foreign_closed()
    ]


def foreign_closed() -> list[dict[str, str]]:
    """Return the closed base chains of nftables at the forward hook that are not iptables' own."""
    try:
        chains = nftables.list_chains()
    except nftables.NftError:
        return []
    return [
        chain
        for chain in chains
        if chain.get("hook") == "forward"
        and chain.get("policy") == "drop"
        and (chain["family"], chain["table"]) not in (("ip", "filter"), ("ip6", "filter"))
        and chain["family"] in ("ip", "ip6", "inet")
    ]


def remove() -> bool:
    """Take jump and chain away everywhere; return whether they were somewhere."""
    found = False
    for backend in BACKENDS:
        for version in VERSIONS:
            if not _exists(backend, version):
                continue
            tool = Tool(backend, version)
            rules = _rules(tool, "FORWARD")
            if jump_at(rules):
                tool.change("filter", ["-D", "FORWARD", *_JUMP])
                found = True
            if _rules(tool, CHAIN):
                tool.change("filter", ["-F", CHAIN])
                tool.change("filter", ["-X", CHAIN])
                found = True
    return found


def _ensure(tool: Tool, wanted: list[str]) -> None:
    rules = _rules(tool, "FORWARD")
    there, at = position(rules), jump_at(rules)
    if not wanted or (there is None and at is None):
        return
    if [rule for rule in _rules(tool, CHAIN) if rule.startswith("-A ")] != wanted:
        tool.restore("\n".join(["*filter", f":{CHAIN} - [0:0]", *wanted, "COMMIT", ""]))
    if at is not None and (not there or at < there):
        return
    if at is not None:
        tool.change("filter", ["-D", "FORWARD", *_JUMP])
        rules = _rules(tool, "FORWARD")
        there = position(rules)
    tool.change("filter", ["-I", "FORWARD", str(there), *_JUMP] if there else ["-A", "FORWARD", *_JUMP])
    fields = logs.fields(backend=tool.backend, family=f"IPv{tool.version}", chain=CHAIN)
    log.info("FORWARD is closed; pods are let pass", extra=fields)


def _exists(backend: Backend, version: Version) -> bool:
    """Say whether a back end's program is installed: without it, nothing of it is closed that could be opened."""
    return shutil.which(f"ip{'6' if version == 6 else ''}tables-{backend}") is not None


def _rules(tool: Tool, chain: str) -> list[str]:
    """Return a chain's rules. Legacy tables are asked through `save`, which creates none that the host does not use."""
    if tool.backend == "nft":
        return tool.rules_of("filter", chain)
    policy = re.compile(rf"^:{chain} (\w+) ")
    lines = []
    for line in tool.save("filter").splitlines():
        if found := policy.match(line):
            lines.append(f"-P {chain} {found[1]}" if found[1] != "-" else f"-N {chain}")
        elif line.startswith(f"-A {chain} "):
            lines.append(line)
    return lines
