"""Deletes links that several threads want gone at about the same time together, and answers when they are gone.

Deleting a veth costs the kernel 16 ms, a whole link group no more: while one deletion is under way, the wishes gather,
and the next one takes all of them. After 5 of the 16 ms nothing can see the links any more; the rest, in which their
memory is freed, nobody need wait for.
"""

from __future__ import annotations

import itertools
import threading

from pynet.kernel import netlink, rtnl

_GROUPS = 0x70790000
"""Link groups from here on are ours; a link is in one only while it is being deleted."""

_LOOK_AGAIN_SECONDS = 0.0005


class _Batch:
    """The links of one deletion, and what became of it: of the links not named in `failed`, that they are gone."""

    def __init__(self) -> None:
        self.links: list[int] = []
        self.out_of_sight = threading.Event()
        self.ended = threading.Event()
        self.failed: dict[int, BaseException] = {}


class SharedDeletion:
    """For all threads of one process and namespace."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._gathering: _Batch | None = None
        self._under_way: set[_Batch] = set()
        self._numbers = itertools.count()

    def delete(self, host: netlink.Socket, ifindex: int) -> None:
        """Delete a link and return when it is in no list of the kernel's. Raise `NetlinkError`."""
        with self._lock:
            is_first = self._gathering is None
            batch = self._gathering = self._gathering or _Batch()
            batch.links.append(ifindex)
        if is_first:
            with self._turn:
                with self._lock:
                    self._gathering = None
                self._carry_out(host, batch)
        else:
            batch.out_of_sight.wait()
        error = batch.failed.get(ifindex)
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the deletions under way."""
        with self._lock:
            under_way = list(self._under_way)
        for batch in under_way:
            batch.ended.wait(timeout=30)

    def _carry_out(self, host: netlink.Socket, batch: _Batch) -> None:
        """Begin a batch's deletion, and look until its links are gone: one thread for all that wait."""
        thread = threading.Thread(target=self._delete, args=(batch,), name="link-deletion", daemon=True)
        with self._lock:
            self._under_way.add(batch)
        try:
            try:
                thread.start()
            except RuntimeError:  # no thread left: here, to its end
                self._delete(batch)
            while not batch.ended.wait(_LOOK_AGAIN_SECONDS):
                if not any(rtnl.is_listed(ifindex) for ifindex in batch.links):
                    rtnl.link_at(host, batch.links[0])  # waits for the lock under which routes and port go as well
                    break
        finally:
            batch.out_of_sight.set()

    def _delete(self, batch: _Batch) -> None:
        try:
            with netlink.Socket() as host:
                batch.failed = self._attempt(host, list(dict.fromkeys(batch.links)))
        except OSError as error:
            batch.failed = dict.fromkeys(batch.links, error)
        finally:
            batch.ended.set()
            with self._lock:
                self._under_way.discard(batch)

    def _attempt(self, host: netlink.Socket, links: list[int]) -> dict[int, BaseException]:
        """Delete links; return the errors of those that could not be."""
        failed: dict[int, BaseException] = {}
        if len(links) > 1:
            group = _GROUPS + next(self._numbers) % 0x10000
            host.batch([rtnl.set_link(ifindex, group=group) for ifindex in links])
            rtnl.delete_group(host, group)
        for ifindex in links:
            try:
                if len(links) == 1 or rtnl.link_at(host, ifindex) is not None:
                    rtnl.delete_link(host, ifindex)
            except OSError as error:
                failed[ifindex] = error
        return failed
