"""What the reference plugins left of a pod that they made: after the type names of a configuration are exchanged, its
DEL comes to us. Rules of portmap, bridge, firewall (iptables, and nftables' spoof check) and bandwidth's ifb.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cni.ipam import hostlocal
from cni.spec import Request
from pynet.kernel import netlink, rtnl

_SPOOF = ("bridge", "nat")


def addresses(request: Request) -> list[str]:
    """Return the addresses that host-local has given the attachment: only then the reference plugins made it."""
    held = hostlocal.reservations(hostlocal.folder(request.config))
    return [one.address for one in held if one.is_of(request.container, request.ifname)]


def clear(
    network: str, container: str, ifname: str, held: list[str], host: netlink.Socket,
    attempt: Callable[[str, Callable[[], object]], object],
) -> None:  # fmt: skip
    """Remove rules and ifb; each step through `attempt`, under a name."""
    attempt("iptables", lambda: _clear_iptables(network, container, held))
    attempt("nftables", lambda: _clear_spoof_check(container, ifname))
    attempt("intermediate device", lambda: _delete(host, ifb_link(network, container)))


def ifb_link(network: str, container: str) -> str:
    """Return the name of the reference bandwidth plugin's intermediate device."""
    from hashlib import sha512  # loads all of OpenSSL: not for pods of our own

    return f"bwp{sha512((network + container).encode()).hexdigest()}"[:15]


def removal(saved: str, network: str, container: str, held: list[str]) -> str:
    """Return the rule file that removes an attachment's rules and chains from a saved table. Pure.

    bridge and portmap tell whose a rule is by a comment, firewall by the address alone.
    """
    comment = rf"name: \"{network}\" id: \"{container}\""
    # a network's masquerade and a port's translation have a chain for each pod, which only such rules lead to
    hosts = {f"{way} {address}/{128 if ':' in address else 32}" for address in held for way in ("-s", "-d")}
    lines = [line for line in saved.splitlines() if line.startswith("-A ")]
    own = [
        line for line in lines
        if comment in line or (line.startswith("-A CNI-FORWARD ") and any(f" {host} " in line for host in hosts))
    ]  # fmt: skip
    if not own:
        return ""
    declared = set(re.findall(r"^:(CNI-\S+) ", saved, re.MULTILINE))
    chains = {line.rpartition(" -j ")[2].split()[0] for line in own} & declared
    table = saved.partition("\n")[0]
    kept = [line for line in own if line.split()[1] not in chains]
    script = [table, *(f"-D{line[2:]}" for line in kept), *(f"-F {name}" for name in sorted(chains))]
    return "\n".join([*script, *(f"-X {name}" for name in sorted(chains)), "COMMIT", ""])


def _clear_iptables(network: str, container: str, held: list[str]) -> None:
    from pynet.kernel.iptables import BACKENDS, IptablesError, Tool, Version

    versions: tuple[Version, ...] = (4, 6)
    for tool in [Tool(backend, version) for backend in BACKENDS for version in versions]:
        try:
            tables = tool.tables()
        except IptablesError as error:
            if not error.transient:
                raise
            continue
        script = "".join(removal(saved, network, container, held) for saved in tables.values())
        if script:
            tool.restore(script)


def _clear_spoof_check(container: str, ifname: str) -> None:
    from pynet.kernel import nftables

    rules = [entry["rule"] for entry in nftables.list_table(*_SPOOF) if "rule" in entry]
    own = [rule for rule in rules if rule.get("comment") == f"macspoofchk-{container}-{ifname}"]
    chains = sorted({str(rule["chain"]) for rule in own if rule["chain"] != "PREROUTING"}, key=len)
    script = [
        f"delete rule bridge nat PREROUTING handle {rule['handle']}" for rule in own if rule["chain"] not in chains
    ]
    script += [f"flush chain bridge nat {name}" for name in chains] + [
        f"delete chain bridge nat {name}" for name in chains
    ]
    if script:
        nftables.apply("".join(f"{line}\n" for line in script))


def _delete(host: netlink.Socket, name: str) -> None:
    ifindex = rtnl.index_of(name)
    if ifindex:
        rtnl.delete_link(host, ifindex)
