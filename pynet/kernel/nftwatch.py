"""Who commits what to nftables in this namespace, as the kernel announces it to everybody (NFNLGRP_NFTABLES)."""

from __future__ import annotations

import contextlib
import errno
import socket

import msgspec

from pynet.kernel.nfnetlink import FAMILIES, NEWGEN, SOL_NETLINK, messages, number_of, open_socket, text_of

_ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 1, 2
_GROUP = 7


class Transaction(msgspec.Struct, frozen=True):
    """A transaction that somebody committed: who, its generation, and the tables it touched ("ip pynet-proxy")."""

    generation: int
    process: int
    program: str
    tables: frozenset[str]


class Watch:
    """Hears of every transaction in its namespace, whoever commits it. `missed`: some could not be kept."""

    def __init__(self) -> None:
        self._socket = open_socket(1 << 22)
        self._touched: set[str] = set()
        self.missed = False
        self.resume()

    def pause(self) -> None:
        """Hear nothing: our own big transactions would fill the buffer."""
        self._socket.setsockopt(SOL_NETLINK, _DROP_MEMBERSHIP, _GROUP)

    def resume(self) -> None:
        """Hear again; what was heard before is forgotten."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
        self._touched, self.missed = set(), False
        self._socket.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def heard(self) -> list[Transaction]:
        """Return the transactions since the last call, without waiting."""
        found: list[Transaction] = []
        while True:
            try:
                blob = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.missed = True
                continue
            for kind, _, payload in messages(blob):
                if kind & 0xFF == NEWGEN:
                    touched, self._touched = frozenset(self._touched), set()
                    found.append(
                        Transaction(number_of(payload, 1), number_of(payload, 2), text_of(payload, 3), touched)
                    )
                else:
                    family = next((word for word, number in FAMILIES.items() if number == payload[0]), "")
                    self._touched.add(f"{family} {text_of(payload, 1)}")
