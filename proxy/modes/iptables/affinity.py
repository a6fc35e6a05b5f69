"""Tells when session affinity forgets clients: the lists that remember them are bounded by the kernel."""

from __future__ import annotations

import random
from collections.abc import Iterable

from proxy.modes.iptables.balance import client_lists
from proxy.plan import Plan
from pynet.daemon import logs
from pynet.kernel import recent

log = logs.get(__name__)
_AT_ONCE = 500  # lists that one look reads: each is a file


class Forgetting:
    """Says once that a list is full, and which Service port's: what it says holds for all."""

    def __init__(self) -> None:
        self._is_told = False

    def look(self, plans: Iterable[Plan]) -> None:
        """Look at some of the lists of clients."""
        if self._is_told:
            return
        servers = (server for plan in plans for server in plan.servers.values() if server.affinity_seconds)
        lists = [(name, server.key) for server in servers for name in client_lists(server)]
        most = recent.most_addresses() if lists else 0
        for name, key in random.sample(lists, min(len(lists), _AT_ONCE)) if most else ():
            if recent.addresses_in(name) >= most:
                self._is_told = True
                log.warning(
                    "session affinity forgets clients: an endpoint's list is full, and a new client takes the place of "
                    "the one not seen for longest; load xt_recent with a greater ip_list_tot, or use nftables mode",
                    extra=logs.fields(port=key, ip_list_tot=most),
                )
                return
