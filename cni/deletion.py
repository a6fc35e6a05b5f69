"""Deletes links that several threads want gone at about the same time together.

Deleting a veth costs the kernel 16 ms, a whole link group no more: while one deletion runs, the others gather, and the
next one takes all of them.
"""

from __future__ import annotations

import itertools
import threading

from pynet.kernel import netlink, rtnl

_GROUPS = 0x70790000
"""Link groups from here on are ours; a link is in one only while it is being deleted."""


class SharedDeletion:
    """For all threads of one process and namespace."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._wanted: dict[int, BaseException | None] = {}
        self._done: dict[int, BaseException | None] = {}
        self._busy = False
        self._numbers = itertools.count()

    def delete(self, ifindex: int) -> None:
        """Delete a link and return when it is gone. Raise `NetlinkError`."""
        with self._condition:
            self._wanted[ifindex] = None
            while self._busy and ifindex not in self._done:
                self._condition.wait()
            if ifindex in self._done:
                error = self._done.pop(ifindex)
                if error is not None:
                    raise error
                return
            self._busy = True
            batch = list(self._wanted)
            self._wanted.clear()
        failed = self._delete(batch)
        with self._condition:
            self._busy = False
            for one in batch:
                if one != ifindex:
                    self._done[one] = failed.get(one)
            self._condition.notify_all()
        own = failed.get(ifindex)
        if own is not None:
            raise own

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
