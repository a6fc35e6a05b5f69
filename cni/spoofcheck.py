"""macspoofchk: a pod sends under its own hardware address only. Set elements in the table `bridge pynet-cni`. Pure."""

from __future__ import annotations

from cni.ruleset import SPOOF

BASE = f"""\
add table {SPOOF}
add set {SPOOF} ports {{ type ifname; }}
add set {SPOOF} allowed {{ type ifname . ether_addr; }}
add chain {SPOOF} prerouting {{ type filter hook prerouting priority -300; policy accept; }}
flush chain {SPOOF} prerouting
add rule {SPOOF} prerouting iifname @ports iifname . ether saddr != @allowed drop
"""


def elements(port: str, mac: str, tag: str) -> list[str]:
    """Return the set elements of one bridge port."""
    return [f'{SPOOF} ports {{ "{port}" comment "{tag}" }}', f'{SPOOF} allowed {{ "{port}" . {mac} comment "{tag}" }}']


def keys(port: str, mac: str) -> list[str]:
    """Return the elements as removal names them."""
    return [f'{SPOOF} ports {{ "{port}" }}', f'{SPOOF} allowed {{ "{port}" . {mac} }}']
