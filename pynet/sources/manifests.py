"""A directory of YAML and JSON manifests as a source: watched, and never worse than its last good state.

Files named *.yaml, *.yml and *.json count, hidden ones and subdirectories do not. A file that cannot be read or parsed
keeps what it last said, as does a single bad object of a file; both are logged once for each state of the file. An
object that two files name is taken from the file whose name sorts first. A Node without pod CIDRs has those that the
agents' record in the directory assigns to it.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from pynet.daemon import logs
from pynet.kernel.inotify import Watch
from pynet.objects import KINDS, BadObject, Node, Object, Ref, objects_of, ref_of
from pynet.sources import Batch, nodecidrs

log = logs.get(__name__)
SUFFIXES = (".yaml", ".yml", ".json")
FILE_LIMIT = 256 * 2**20  # bytes; a list of 10,000 EndpointSlices of 10 endpoints is 42 MB of JSON
DEPTH_LIMIT = 500  # levels of nesting in a YAML file
_SETTLE = 0.01  # seconds without an event after which a burst counts as over
_BURST_LIMIT = 0.2  # seconds after which a burst is delivered all the same
_POLL = 0.2  # seconds between looks at `stop`
_RESCAN = 10.0  # seconds between full looks, for what inotify cannot see (network file systems, mounts)


class _Loader(yaml.CSafeLoader):
    """YAML as the Kubernetes tools read it: a date is a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}

_Stamp = tuple[int, int, int, int]  # device, inode, size, mtime in ns: a file that shows the same is not read again


class Manifests:
    """The source. One directory; `kinds`: those to deliver; `assigned`: Nodes have the pod CIDRs of the record."""

    def __init__(self, directory: Path, kinds: frozenset[str] = frozenset(KINDS), *, assigned: bool = True) -> None:
        self.kinds = kinds
        self._directory = directory
        self._assigned = assigned
        self._record: nodecidrs.Record = {}
        self._stamps: dict[str, _Stamp] = {}
        self._contents: dict[str, dict[Ref, Object]] = {}
        self._holders: dict[Ref, set[str]] = {}

    def run(self, deliver: Callable[[Batch], None], stop: threading.Event) -> None:
        """Deliver the directory's contents, then its changes, until `stop` is set."""
        first = True
        complained = False
        while not stop.is_set():
            try:
                watch = Watch(self._directory)
            except OSError as error:
                if not complained:
                    log.warning(
                        "manifest directory cannot be read; waiting for it",
                        extra=logs.fields(directory=self._directory, error=error.strerror),
                    )
                complained = True
                stop.wait(_POLL)
                continue
            complained = False
            try:
                self._deliver(deliver, None, first)
                first = False
                self._follow(watch, deliver, stop)
            finally:
                watch.close()

    def load(self) -> list[Object]:
        """Return what the directory holds now: for one-shot commands."""
        self._refresh(None)
        return [self._effective(ref) for ref in self._holders]

    def _follow(self, watch: Watch, deliver: Callable[[Batch], None], stop: threading.Event) -> None:
        rescan_at = time.monotonic() + _RESCAN
        while not stop.is_set() and not watch.lost:
            names = watch.wait(_POLL)
            if names == set() and time.monotonic() < rescan_at:
                continue
            seen = time.monotonic()
            while names and time.monotonic() < seen + _BURST_LIMIT and (more := watch.wait(_SETTLE)) != set():
                names = names | more if more is not None else None
            # "..data" is how a mounted ConfigMap swaps all its files at once
            if not names or "..data" in names:
                names = None
                rescan_at = seen + _RESCAN
            self._deliver(deliver, names, False, seen)

    def _deliver(
        self, deliver: Callable[[Batch], None], names: set[str] | None, whole: bool, seen: float | None = None
    ) -> None:
        seen = time.monotonic() if seen is None else seen
        upserts, deletes = self._refresh(names)
        if whole:
            deliver(Batch(tuple(self._effective(ref) for ref in self._holders), (), self.kinds, seen))
        elif upserts or deletes:
            deliver(Batch(tuple(upserts), tuple(deletes), received=seen))

    def _refresh(self, names: set[str] | None) -> tuple[list[Object], list[Ref]]:
        """Read what changed among `names` (None: anything). Return objects that are new or differ, and those gone."""
        before: dict[Ref, Object | None] = {}
        for name in sorted(self._listed() if names is None else names):
            if name.startswith(".") or not name.endswith(SUFFIXES):
                continue
            stamp = _stamp_of(self._directory / name)
            # a file that an event names is read whatever it shows: a clock tick can hold two writes
            if stamp == self._stamps.get(name) and (names is None or stamp is None):
                continue
            old = self._contents.get(name, {})
            new = self._read(name, old) if stamp else {}
            if stamp:
                self._stamps[name] = stamp
                self._contents[name] = new
            else:
                self._stamps.pop(name, None)
                self._contents.pop(name, None)
            self._note(name, old, new, before)
            if name == nodecidrs.FILE and self._assigned:
                self._take_record(before)
        after = {ref: self._effective(ref) if ref in self._holders else None for ref in before}
        return (
            [obj for ref, obj in after.items() if obj is not None and obj != before[ref]],
            [ref for ref, obj in after.items() if obj is None and before[ref] is not None],
        )

    def _note(
        self, name: str, old: dict[Ref, Object], new: dict[Ref, Object], before: dict[Ref, Object | None]
    ) -> None:
        """Record that file `name` went from `old` to `new`; remember in `before` what was in force until now."""
        for ref in old.keys() | new.keys():
            if ref not in before:
                holders = self._holders.get(ref)
                first = min(holders) if holders else None
                held = None if first is None else old[ref] if first == name else self._contents[first][ref]
                before[ref] = None if held is None else self._filled(held)
            if ref not in new:
                self._holders[ref].discard(name)
                if not self._holders[ref]:
                    del self._holders[ref]
            elif ref not in old:
                holders = self._holders.setdefault(ref, set())
                if holders:
                    log.warning(
                        "object is in two files; the one that sorts first counts",
                        extra=logs.fields(object=ref, files=",".join(sorted({name, *holders}))),
                    )
                holders.add(name)

    def _effective(self, ref: Ref) -> Object:
        return self._filled(self._contents[min(self._holders[ref])][ref])

    def _filled(self, obj: Object) -> Object:
        return nodecidrs.with_assigned(obj, self._record) if self._record and isinstance(obj, Node) else obj

    def _take_record(self, before: dict[Ref, Object | None]) -> None:
        """Read the record of pod CIDRs; remember in `before` the Nodes that it may change."""
        nodes = {ref: self._effective(ref) for ref in self._holders if ref.kind == "Node" and ref not in before}
        try:
            self._record = nodecidrs.decoded((self._directory / nodecidrs.FILE).read_bytes())
        except FileNotFoundError:
            self._record = {}
        except msgspec.ValidationError as error:
            log.error("record of pod CIDRs cannot be used", extra=logs.fields(file=nodecidrs.FILE, error=error))
            return
        except (OSError, ValueError):  # told, as a manifest that cannot be read
            return
        before.update(nodes)

    def _listed(self) -> set[str]:
        try:
            return {entry.name for entry in os.scandir(self._directory)} | self._stamps.keys()
        except OSError as error:
            log.warning(
                "manifest directory cannot be listed; keeping what it said",
                extra=logs.fields(directory=self._directory, error=error.strerror),
            )
            return set()

    def _read(self, name: str, old: dict[Ref, Object]) -> dict[Ref, Object]:
        """Return the objects of a file; where something is bad, log it and keep what `old` had of it."""
        path = self._directory / name
        try:
            found = list(_parsed(path))
        except BadObject as bad:
            log.error(
                "manifest cannot be read; keeping what it last said",
                extra=logs.fields(file=path, error=bad.reason, kept=len(old)),
            )
            return old
        contents: dict[Ref, Object] = {}
        for obj in found:
            if isinstance(obj, BadObject):
                # a document that does not say which object it is may have been any of those that are now missing
                kept = {ref: old[ref] for ref in old if obj.ref in (None, ref)}
                log.error(
                    "bad object; keeping what was good before" if kept else "bad object skipped",
                    extra=logs.fields(object=obj.where, field=obj.field, error=obj.reason),
                )
                contents = {**kept, **contents}
                continue
            ref = ref_of(obj)
            if ref.kind in self.kinds:
                if ref in contents:
                    log.warning(
                        "object is twice in one file; the last one counts", extra=logs.fields(object=ref, file=path)
                    )
                contents[ref] = obj
        return contents


def _stamp_of(path: Path) -> _Stamp | None:
    """Return what tells a file's state apart from another; None where there is no regular file."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _parsed(path: Path) -> Iterator[Object | BadObject]:
    """Yield the objects of a file. Raise `BadObject` where it is not whole, not text, or not YAML or JSON."""
    try:
        data = path.read_bytes() if path.stat().st_size <= FILE_LIMIT else None
    except OSError as error:
        raise BadObject(str(path), "", error.strerror or str(error)) from None
    if data is None:
        raise BadObject(str(path), "", f"larger than {FILE_LIMIT >> 20} MiB")
    if not data.strip():
        raise BadObject(str(path), "", "empty, as a half-written file is (delete the file to delete its objects)")
    try:
        documents: Iterable[Any] = [msgspec.json.decode(data)] if path.suffix == ".json" else _yaml_documents(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadObject(str(path), "", " ".join(str(error).split())) from None
    for document in documents:
        yield from objects_of(document, path.name)


def _yaml_documents(data: bytes) -> list[Any]:
    # a depth needs as many opening brackets, or a line as long: most files are cleared without a second parse
    deepest = data.count(b"[") + data.count(b"{") + max(map(len, data.splitlines()))
    if deepest > DEPTH_LIMIT or (b"*" in data and b"&" in data):
        _refuse_traps(data)
    return list(yaml.load_all(data, Loader=_Loader))  # a safe loader, with fewer resolvers


def _refuse_traps(data: bytes) -> None:
    """Refuse what a small file can do to its reader: nesting that overruns libyaml's stack (PyYAML 6.0.3 ends with a
    segmentation fault), and aliases inside of anchored nodes, a few lines of which expand to any size.
    """
    anchored: list[bool] = []
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            anchored.append(event.anchor is not None or (bool(anchored) and anchored[-1]))
            if len(anchored) > DEPTH_LIMIT:
                raise ValueError(f"nested more than {DEPTH_LIMIT} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored.pop()
        elif isinstance(event, yaml.AliasEvent) and anchored and anchored[-1]:
            raise ValueError(
                f"alias *{event.anchor} inside of an anchored node is not taken: it can expand to any size"
            )
