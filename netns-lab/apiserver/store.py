"""The objects and their history: one counter of versions, optimistic updates, and what a watch reads.

Stands for etcd and the watch cache. Knows no HTTP and no meaning of a resource. Stored objects are never changed in
place: a new version is a new dictionary.
"""

from __future__ import annotations

import threading
import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from apiserver import errors
from apiserver.resources import Resource
from apiserver.selectors import Predicate

Json = dict[str, Any]
Key = tuple[str, str]  # namespace, name
_HISTORY = 200_000


class Stored:
    """One version of one object, with its JSON (without kind and apiVersion, as lists carry it)."""

    __slots__ = ("_text", "obj", "version")

    def __init__(self, obj: Json, version: int) -> None:
        self.obj = obj
        self.version = version
        self._text: bytes | None = None

    @property
    def item(self) -> bytes:
        """As an item of a list."""
        if self._text is None:
            self._text = msgspec.json.encode(
                {key: value for key, value in self.obj.items() if key not in ("kind", "apiVersion")}
            )
        return self._text


@dataclass(frozen=True)
class Event:
    """One change: from `before` to `after` (None: not there)."""

    version: int
    before: Stored | None
    after: Stored | None


class _Shelf:
    """Objects and history of one resource."""

    def __init__(self, floor: int) -> None:
        self.objects: dict[Key, Stored] = {}
        self.events: list[Event] = []
        self.versions: list[int] = []
        self.floor = floor  # changes at or before this version are forgotten


class Store:
    """All objects. Safe to use from many threads."""

    def __init__(self, version: int = 1) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = version
        self._floor = 0
        self._shelves: dict[str, _Shelf] = {}

    def shelf(self, resource: Resource) -> _Shelf:
        """Return objects and history of a resource; for use under `changed`."""
        return self._shelves.setdefault(f"{resource.group}/{resource.plural}", _Shelf(self._floor))

    def get(self, resource: Resource, namespace: str, name: str) -> Json:
        """Return an object. Raise 404."""
        with self.changed:
            found = self.shelf(resource).objects.get((namespace, name))
        if found is None:
            raise errors.not_found(resource.group, resource.plural, name)
        return found.obj

    def all(self, resource: Resource, namespace: str = "") -> list[Json]:
        """Return every object, of a namespace where one is named."""
        with self.changed:
            found = list(self.shelf(resource).objects.items())
        return [stored.obj for key, stored in found if not namespace or key[0] == namespace]

    def create(self, resource: Resource, obj: Json) -> Json:
        """Add a new object. Raise 409."""
        meta = dict(obj["metadata"])
        with self.changed:
            key = (meta.get("namespace", ""), meta["name"])
            if key in self.shelf(resource).objects:
                raise errors.already_exists(resource.group, resource.plural, meta["name"])
            meta["uid"] = str(uuid.uuid4())
            meta["creationTimestamp"] = now()
            if resource.generation:
                meta["generation"] = 1
            return self._put(resource, key, {**obj, "metadata": meta})

    def update(self, resource: Resource, obj: Json, *, status: bool = False) -> Json:
        """Replace an object; a `metadata.resourceVersion` must be the present one. Raise 404 or 409."""
        meta = dict(obj["metadata"])
        key = (meta.get("namespace", ""), meta["name"])
        with self.changed:
            known = self.get(resource, *key)
            wanted = meta.get("resourceVersion")
            if wanted and wanted != known["metadata"]["resourceVersion"]:
                raise errors.conflict(resource.group, resource.plural, meta["name"])
            for field in ("uid", "creationTimestamp", "resourceVersion", "generation", "deletionTimestamp"):
                meta.pop(field, None)
                if field in known["metadata"]:
                    meta[field] = known["metadata"][field]
            fresh = {**obj, "metadata": meta}
            if fresh == known:
                return known  # as etcd3's guaranteed update: nothing written, no event
            if resource.generation and not status and _specified(fresh) != _specified(known):
                meta["generation"] = known["metadata"].get("generation", 0) + 1
            if meta.get("deletionTimestamp") and not meta.get("finalizers"):
                return self._remove(resource, key, fresh)
            return self._put(resource, key, fresh)

    def modify(self, resource: Resource, namespace: str, name: str, change: Callable[[Json], Json]) -> Json:
        """Replace an object by what `change` makes of it, atomically."""
        with self.changed:
            return self.update(resource, change(self.get(resource, namespace, name)))

    def mark_deleted(self, resource: Resource, namespace: str, name: str, grace: int) -> Json:
        """Give an object its deletionTimestamp, as a graceful deletion does."""
        with self.changed:
            known = self.get(resource, namespace, name)
            if known["metadata"].get("deletionTimestamp"):
                return known
            meta = {**known["metadata"], "deletionTimestamp": now(), "deletionGracePeriodSeconds": grace}
            return self._put(resource, (namespace, name), {**known, "metadata": meta})

    def delete(self, resource: Resource, namespace: str, name: str) -> Json:
        """Remove an object; return its last form. Raise 404."""
        with self.changed:
            return self._remove(resource, (namespace, name), self.get(resource, namespace, name))

    def _put(self, resource: Resource, key: Key, obj: Json) -> Json:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        shelf = self.shelf(resource)
        stored = Stored(obj, self.version)
        self._record(shelf, Event(self.version, shelf.objects.get(key), stored))
        shelf.objects[key] = stored
        return obj

    def _remove(self, resource: Resource, key: Key, last: Json) -> Json:
        self.version += 1
        shelf = self.shelf(resource)
        before = shelf.objects.pop(key)
        self._record(shelf, Event(self.version, before, None))
        return {**last, "metadata": {**last["metadata"], "resourceVersion": str(self.version)}}

    def _record(self, shelf: _Shelf, event: Event) -> None:
        shelf.events.append(event)
        shelf.versions.append(event.version)
        if len(shelf.events) > _HISTORY:
            self._forget(shelf, shelf.versions[_HISTORY // 2])
        self.changed.notify_all()

    def compact(self, version: int | None = None) -> None:
        """Forget changes up to `version` (None: all so far), as etcd's compaction does: watches from there get 410."""
        with self.changed:
            self._floor = self.version if version is None else version
            for shelf in self._shelves.values():
                self._forget(shelf, self._floor)

    def _forget(self, shelf: _Shelf, version: int) -> None:
        index = bisect_right(shelf.versions, version)
        del shelf.events[:index], shelf.versions[:index]
        shelf.floor = max(shelf.floor, version)

    def snapshot(
        self, resource: Resource, namespace: str, selected: Predicate, version: int | None = None
    ) -> tuple[int, list[tuple[str, Stored]]]:
        """Return version and objects (by their key in order), as they are or as they were at `version`. Raise 410."""
        with self.changed:
            shelf = self.shelf(resource)
            objects: Mapping[Key, Stored] = shelf.objects
            if version is None or version >= self.version:
                version = self.version
                objects = dict(objects)
            else:
                objects = self._at(shelf, version)
        found = [
            (f"/{key[0]}/{key[1]}" if resource.namespaced else f"/{key[1]}", stored)
            for key, stored in objects.items()
            if (not namespace or key[0] == namespace) and selected(stored.obj)
        ]
        return version, sorted(found, key=lambda pair: pair[0])

    def _at(self, shelf: _Shelf, version: int) -> dict[Key, Stored]:
        if version < shelf.floor:
            raise errors.expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new "
                "list without the continue parameter, or use the continue token in this response to retrieve the "
                "remainder of the results."
            )
        objects = dict(shelf.objects)
        for event in reversed(shelf.events[bisect_right(shelf.versions, version) :]):
            stored = event.before or event.after
            assert stored is not None
            meta = stored.obj["metadata"]
            key = (meta.get("namespace", ""), meta["name"])
            if event.before is None:
                objects.pop(key, None)
            else:
                objects[key] = event.before
        return objects

    def after(self, resource: Resource, version: int) -> list[Event]:
        """Return the changes after `version`; for use under `changed`. Raise 410."""
        shelf = self.shelf(resource)
        if version < shelf.floor:
            raise errors.expired(f"too old resource version: {version} ({shelf.floor})")
        return shelf.events[bisect_right(shelf.versions, version) :]


def now() -> str:
    """Return the time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _specified(obj: Json) -> Json:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}
