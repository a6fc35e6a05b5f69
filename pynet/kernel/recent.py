"""The lists of addresses that the iptables match `recent` keeps (module xt_recent), as /proc shows them to this thread.

When a list is full, a new address takes the place of the one that was seen longest ago.
"""

from __future__ import annotations

from pathlib import Path

_LISTS = Path("/proc/thread-self/net/xt_recent")
_LIMIT = Path("/sys/module/xt_recent/parameters/ip_list_tot")


def most_addresses() -> int:
    """Return how many addresses a list holds; it is said when the module is loaded. 0: it is not."""
    try:
        return int(_LIMIT.read_text())
    except (OSError, ValueError):
        return 0


def addresses_in(name: str) -> int:
    """Return how many addresses a list has now; 0: there is no such list."""
    try:
        return (_LISTS / name).read_bytes().count(b"\n")
    except OSError:
        return 0
