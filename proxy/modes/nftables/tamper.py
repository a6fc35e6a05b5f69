"""Whether somebody else wrote to our tables: heard from the kernel's own announcements, at no cost to what we write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from proxy.modes.nftables.names import TABLE, WORDS
from pynet.kernel.nfnetlink import Nfnetlink
from pynet.kernel.nftwatch import Watch

_OURS = frozenset(f"{words.ip} {TABLE}" for words in WORDS.values())


class Tamper:
    """Tells our transactions from other people's by the generation that each one makes."""

    def __init__(self, kernel: Nfnetlink) -> None:
        self._kernel = kernel
        self._watch = Watch()
        self._generation = kernel.generation()
        self._noticed = False

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Do not count what is committed inside, which must be one transaction or none, as somebody else's."""
        self._listen()
        self._watch.pause()  # ours may be large: its announcements would fill the buffer
        before = self._generation = max(self._generation, self._kernel.generation())
        try:
            yield
        finally:
            self._watch.resume()
            self._generation = self._kernel.generation()
            # More than one: somebody wrote meanwhile, unheard. To look once too often does no harm.
            self._noticed = self._noticed or self._generation > before + 1

    def noticed(self) -> bool:
        """Return whether somebody wrote to our tables and `forget` was not called since."""
        self._listen()
        return self._noticed

    def forget(self) -> None:
        """Begin anew: our tables are about to be read."""
        self._listen()
        self._noticed = False

    def _listen(self) -> None:
        for transaction in self._watch.heard():
            if transaction.generation > self._generation and transaction.tables & _OURS:
                self._noticed = True
        if self._watch.missed:
            self._watch.resume()
            self._generation = self._kernel.generation()
            self._noticed = True
