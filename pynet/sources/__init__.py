"""Where objects come from: one interface, a snapshot and then changes; `manifests` and `apiserver` implement it.

Knows no consumer: what a change means is decided by whoever takes the batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from pynet.objects import Object, Ref


class Batch(msgspec.Struct, frozen=True):
    """What changed at once.

    `replaced`: kinds of which this batch carries the whole contents: objects of them not in `upserts` are gone. A
    source's first word on every kind that it serves is a batch that names it here; until then nothing is known of it.
    `received`: time.monotonic() when the change was first seen, seconds.
    """

    upserts: tuple[Object, ...] = ()
    deletes: tuple[Ref, ...] = ()
    replaced: frozenset[str] = frozenset()
    received: float = 0.0


class Source(Protocol):
    """A place that objects come from."""

    kinds: frozenset[str]

    def run(self, deliver: Callable[[Batch], None], stop: threading.Event) -> None:
        """Deliver batches, from this thread, until `stop` is set.

        Never raises for what the outside does wrong (a broken file, a lost server): it logs once, keeps what it said
        last, and goes on.
        """
