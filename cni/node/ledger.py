"""The record of assigned pod CIDRs, in the manifest directory, where every node's agent and proxy read it.

Written under a lock, by rename.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from pynet import files
from pynet.daemon import logs
from pynet.kernel.inotify import Watch
from pynet.sources.nodecidrs import FILE, Record, decoded, encoded

log = logs.get(__name__)
LOCK = ".pynet-node-cidrs.lock"


class Ledger:
    """The record in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self) -> Record:
        """Return each node's pod CIDRs; nothing where there is no record, or none that can be read (logged)."""
        data = files.read(self._directory / FILE)
        if data is None:
            return {}
        try:
            return decoded(data)
        except ValueError as error:
            log.error("record of pod CIDRs cannot be read", extra=logs.fields(file=self._directory / FILE, error=error))
            return {}

    def update(self, decide: Callable[[Record], Mapping[str, tuple[str, ...]]]) -> Record:
        """Put what `decide` makes of the record in its place, no other agent writing between; return it."""
        lock = os.open(self._directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.read()
            after = dict(decide(before))
            if after != before:
                files.replace(self._directory / FILE, encoded(after))
            return after
        finally:
            os.close(lock)

    def watch(self, changed: Callable[[], None], stop: threading.Event) -> None:
        """Call `changed` whenever the record may have changed, until `stop` is set."""
        while not stop.is_set():
            try:
                watch = Watch(self._directory)
            except OSError:
                stop.wait(0.5)
                continue
            try:
                changed()
                while not stop.is_set() and not watch.lost:
                    names = watch.wait(0.5)
                    if names is None or FILE in names:
                        changed()
            finally:
                watch.close()
