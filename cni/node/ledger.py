"""The record of assigned pod CIDRs, in the manifest directory, where every node's agent reads it.

A ConfigMap in a file of its own: manifests' readers pass over it, people can read it. Written under a lock, by rename.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from pynet import files
from pynet.daemon import logs
from pynet.kernel.inotify import Watch

log = logs.get(__name__)
FILE, LOCK = "pynet-node-cidrs.json", ".pynet-node-cidrs.lock"
Record = dict[str, tuple[str, ...]]


class _Metadata(msgspec.Struct, frozen=True):
    name: str = "pynet-node-cidrs"
    namespace: str = "kube-system"


class _ConfigMap(msgspec.Struct, frozen=True, rename="camel"):
    data: dict[str, str]
    api_version: str = "v1"
    kind: str = "ConfigMap"
    metadata: _Metadata = _Metadata()


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
            entries = msgspec.json.decode(data, type=_ConfigMap).data
        except msgspec.DecodeError as error:
            log.error("record of pod CIDRs cannot be read", extra=logs.fields(file=self._directory / FILE, error=error))
            return {}
        return {name: tuple(cidr for cidr in text.split(",") if cidr) for name, text in entries.items()}

    def update(self, decide: Callable[[Record], Mapping[str, tuple[str, ...]]]) -> Record:
        """Put what `decide` makes of the record in its place, no other agent writing between; return it."""
        lock = os.open(self._directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.read()
            after = dict(decide(before))
            if after != before:
                content = _ConfigMap({name: ",".join(cidrs) for name, cidrs in sorted(after.items())})
                data = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
                files.replace(self._directory / FILE, data)
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
