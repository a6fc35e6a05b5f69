"""Deletes links that several threads want gone at about the same time together, and answers when they are gone.

Deleting a veth costs the kernel 16 ms, a whole link group no more: while one deletion runs, the others gather, and the
next one takes all of them. After 5 of the 16 ms nothing can see the link any more; the rest, in which its memory is
freed, nobody need wait for.
"""

from __future__ import annotations

import itertools
import threading

from pynet.kernel import netlink, rtnl

_GROUPS = 0x70790000
"""Link groups from here on are ours; a link is in one only while it is being deleted."""

_LOOK_AGAIN_SECONDS = 0.0005


class _Wish:
    """One call's: the link it wants gone, and what became of it."""

    def __init__(self, ifindex: int) -> None:
        self.ifindex = ifindex
        self.done = threading.Event()
        self.error: BaseException | None = None


class SharedDeletion:
    """For all threads of one process and namespace."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[_Wish] = []
        self._deleter: threading.Thread | None = None
        self._numbers = itertools.count()

    def delete(self, host: netlink.Socket, ifindex: int) -> None:
        """Delete a link and return when it is in no list of the kernel's. Raise `NetlinkError`."""
        wish = _Wish(ifindex)
        with self._lock:
            self._wanted.append(wish)
            alone = self._deleter is None
            if alone:
                self._deleter = threading.Thread(target=self._work, name="link-deletion", daemon=True)
                self._deleter.start()
        # only who comes alone looks: in a crowd the looking would cost all of them more than the rest of the wait
        while not wish.done.wait(_LOOK_AGAIN_SECONDS if alone else None):
            if not rtnl.is_listed(ifindex):
                rtnl.link_at(host, ifindex)  # waits for the lock under which routes, neighbours and the port go as well
                return
        if wish.error is not None:
            raise wish.error

    def close(self) -> None:
        """Wait for the deletions under way."""
        deleter = self._deleter
        if deleter is not None:
            deleter.join(timeout=30)

    def _work(self) -> None:
        while True:
            with self._lock:
                batch, self._wanted = self._wanted, []
                if not batch:
                    self._deleter = None
                    return
            failed = self._delete(list(dict.fromkeys(wish.ifindex for wish in batch)))
            for wish in batch:
                wish.error = failed.get(wish.ifindex)
                wish.done.set()

    def _delete(self, batch: list[int]) -> dict[int, BaseException]:
        """Delete links; return the errors of those that could not be."""
        failed: dict[int, BaseException] = {}
        try:
            with netlink.Socket() as host:
                if len(batch) > 1:
                    group = _GROUPS + next(self._numbers) % 0x10000
                    host.batch([rtnl.set_link(ifindex, group=group) for ifindex in batch])
                    rtnl.delete_group(host, group)
                for ifindex in batch:
                    try:
                        if len(batch) == 1 or rtnl.link_at(host, ifindex) is not None:
                            rtnl.delete_link(host, ifindex)
                    except OSError as error:
                        failed[ifindex] = error
        except OSError as error:
            return dict.fromkeys(batch, error)
        return failed
