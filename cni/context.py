"""What the calls that one process serves may share: open databases, the boot's identity, and how links are deleted."""

from __future__ import annotations

import threading
import time

from cni.deletion import SharedDeletion
from cni.ipam.store import Store
from cni.ipam.survivors import survivors
from cni.journal import Journal
from pynet.kernel import netlink, rtnl


class Context:
    """One for each process: the executable's lives for one call, the agent's for all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[tuple[str, ...], Store] = {}
        self._journals: dict[str, Journal] = {}
        self._boot = ""

    def store(self, data_dir: str, network: str, bridge: str = "", predecessor: str = "") -> Store:
        """Return the reservations of a network; one made anew knows who is on the bridge, or in host-local's folder."""
        key = (data_dir, network, bridge, predecessor)
        with self._lock:
            if key not in self._stores:
                self._stores[key] = Store(data_dir, network, lambda: survivors(network, bridge, predecessor))
            return self._stores[key]

    def journal(self, state_dir: str) -> Journal:
        """Return the attachments of a node."""
        with self._lock:
            if state_dir not in self._journals:
                self._journals[state_dir] = Journal(state_dir)
            return self._journals[state_dir]

    @property
    def boot(self) -> str:
        """The identity of this boot of the machine."""
        if not self._boot:
            with open("/proc/sys/kernel/random/boot_id") as file:
                self._boot = file.read().strip()
        return self._boot

    def now(self) -> float:
        """Return the time, in seconds since the epoch."""
        return time.time()

    def delete_link(self, host: netlink.Socket, ifindex: int) -> None:
        """Delete a link of the host."""
        rtnl.delete_link(host, ifindex)

    def close(self) -> None:
        """Close the databases."""
        with self._lock:
            for store in self._stores.values():
                store.close()
            for journal in self._journals.values():
                journal.close()
            self._stores.clear()
            self._journals.clear()


class AgentContext(Context):
    """The agent's: deletions of links at about the same time share the kernel's wait."""

    def __init__(self) -> None:
        super().__init__()
        self._deletion = SharedDeletion()

    def delete_link(self, host: netlink.Socket, ifindex: int) -> None:
        """Delete a link of the host."""
        self._deletion.delete(host, ifindex)

    def close(self) -> None:
        """Wait for deletions under way, and close the databases."""
        self._deletion.close()
        super().close()
