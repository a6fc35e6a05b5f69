"""How iptables rules drop what is for an address of a ServiceCIDR that no Service has. Pure.

By new flows only, and only what nobody has led elsewhere (DNAT) and is not the node's own.
"""

from __future__ import annotations

from proxy.plan import NodeSettings

DROP = "-m conntrack ! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT -m addrtype ! --dst-type LOCAL -j DROP"
"""The rule of the chain to which `jumps` lead."""


def jumps(settings: NodeSettings, chain: str) -> list[str]:
    """Return the rules that lead there: one a network."""
    return [f"-d {network} -j {chain}" for network in settings.service_cidrs]
