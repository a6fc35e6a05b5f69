"""List and watch of one kind, without I/O: bytes of answers in, changes out, and what to ask for next.

The truth here is the protocol (Kubernetes API concepts, "Efficient detection of changes"; KEP-3157 for streaming
lists; KEP-1904 for bookmarks; KEP-5504 for versions that can be compared). Knows no socket, clock or thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pynet.objects import KINDS, BadObject, Object, Ref, ref_of
from pynet.sources.transport import Status

INITIAL_END = "k8s.io/initial-events-end"
PAGE = 1000
_BROKEN_LIMIT = 3  # times that a watch may break at one version before that version is given up
_TOMBSTONES = 20_000
_TOO_LARGE = "ResourceVersionTooLarge"
_PASSING = (401, 403, 408, 429)  # answers that say nothing of the version that was asked for


class List(msgspec.Struct, frozen=True):
    """Ask for a page of the list; `limit` 0: all of it."""

    limit: int
    token: str = ""


class Watch(msgspec.Struct, frozen=True):
    """Ask for changes after `version`; `initial`: for the present state before them (a streaming list)."""

    version: str
    initial: bool = False


class Replace(msgspec.Struct, frozen=True):
    """The whole contents, first heard of now."""

    objects: tuple[Object, ...]


class Upsert(msgspec.Struct, frozen=True):
    """One object is new or changed."""

    object: Object


class Delete(msgspec.Struct, frozen=True):
    """One object is gone, or no longer selected."""

    ref: Ref


class Relist(msgspec.Struct, frozen=True):
    """The thread of changes is lost: the next request starts over. What was said stays true until then."""

    reason: str


class Broken(msgspec.Struct, frozen=True):
    """This answer cannot be followed any further: end it and ask again, in `wait` seconds or later."""

    reason: str
    wait: float = 0.0


Change = Replace | Upsert | Delete | Relist | Broken | BadObject


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class _Head(msgspec.Struct, frozen=True):
    metadata: _Meta = _Meta()


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct, frozen=True):
    metadata: _ListMeta = _ListMeta()
    items: tuple[msgspec.Raw, ...] | None = None


_event = msgspec.json.Decoder(_Event)
_head = msgspec.json.Decoder(_Head)
_page = msgspec.json.Decoder(_Page)
_status = msgspec.json.Decoder(Status)


class Reflector:
    """What is known of one kind at one server. `streaming`: its lists are asked for as streams."""

    def __init__(self, kind: str, *, streaming: bool = True, page: int = PAGE) -> None:
        self.kind = kind
        self.objects: Mapping[Ref, Object] = {}
        self.synced = False
        self.version = ""
        self.listing = True
        self._objects: dict[Ref, Object] = {}
        self._decoder = msgspec.json.Decoder(KINDS[kind])
        self.streaming = streaming
        self._page = self._limit = page
        self._token = ""
        self._collected: dict[Ref, Object] = {}
        self._gone: dict[Ref, int] = {}
        self._tail = bytearray()
        self._broken = 0
        self.objects = self._objects

    def request(self) -> List | Watch:
        """Return what to ask for next, and be ready for its answer."""
        self._tail.clear()
        if not self.listing:
            return Watch(self.version)
        if self.streaming:
            self._collected = {}
            return Watch("", initial=True)
        if not self._token:
            self._collected = {}
        return List(self._limit, self._token)

    def page(self, body: bytes) -> list[Change]:
        """Take in a page of a list; the last one settles what is there."""
        try:
            page = _page.decode(body)
        except msgspec.DecodeError as error:
            self._token = ""
            return [Broken(f"list of {self.kind}: {error}")]
        changes: list[Change] = []
        for raw in page.items or ():
            self._collect(raw, changes)
        self._token = page.metadata.continue_
        if not self._token:
            self._settle(page.metadata.resource_version, changes)
        return changes

    def feed(self, data: bytes) -> list[Change]:
        """Take in bytes of a watch, however they are cut; half a line waits for its other half."""
        *lines, rest = data.split(b"\n")
        changes: list[Change] = []
        for line in lines:
            if self._tail:
                line = bytes(self._tail) + line
                self._tail.clear()
            if line.strip():
                changes.extend(self.line(line))
                if changes and isinstance(changes[-1], Relist | Broken):
                    return changes
        self._tail += rest
        return changes

    def line(self, line: bytes) -> list[Change]:
        """Take in one event of a watch."""
        try:
            event = _event.decode(line)
            if event.type == "ERROR":
                return [self._error(_status.decode(event.object))]
            head = _head.decode(event.object).metadata
        except msgspec.DecodeError as error:
            self._broken += 1
            if self._broken >= _BROKEN_LIMIT:
                return [self._start_over(f"unreadable event: {error}")]
            return [Broken(f"unreadable event: {error}")]
        changes: list[Change] = []
        if event.type == "BOOKMARK":
            if self.listing:
                if not (head.annotations and head.annotations.get(INITIAL_END) == "true"):
                    return [self.unsupported("the server sent no end of the initial events")]
                self._settle(head.resource_version, changes)
        elif event.type not in ("ADDED", "MODIFIED", "DELETED"):
            return [Broken(f"event of unknown type {event.type!r}")]
        elif self.listing:
            self._collect(event.object, changes, deleted=event.type == "DELETED")
            return changes
        else:
            changes += self._follow(event, head)
        self._advance(head.resource_version)
        self._broken = 0
        return changes

    def refused(self, status: Status) -> list[Change]:
        """Take in an error in place of an answer."""
        if self.listing:
            if self.streaming and status.code in (400, 404, 405, 406, 422):
                return [self.unsupported(status.message)]
            if not self.streaming and self._token and status.code in (400, 410):
                self._token = ""
                self._limit = 0  # the pages outlived the history behind them; all at once cannot
                return [Relist(status.message)]
            return [Broken(str(status.code))]
        if status.code in _PASSING or (status.code >= 500 and _TOO_LARGE not in status.causes):
            return [Broken(str(status.code))]  # the server is in trouble, our version is not
        return [self._error(status)]

    def absent(self) -> list[Change]:
        """Take in that the server does not let this kind be read: there is none, unless some were known."""
        if self.synced:
            return []
        self.synced = True
        return [Replace(())]

    def interrupted(self, reason: str, *, silent: bool = False) -> list[Change]:
        """Take in that the answer was cut off; a streaming list without end is given up."""
        if not (self.listing and self.streaming):
            return []
        self._broken += 1
        if silent or self._broken >= _BROKEN_LIMIT:
            return [self.unsupported(reason)]
        return [Broken(reason)]

    def unsupported(self, reason: str) -> Relist:
        """Give up streaming lists with this server: the next list is paged."""
        self.streaming = False
        return self._start_over(f"streaming list: {reason}")

    def _error(self, status: Status) -> Change:
        if status.code == 410 or status.reason in ("Expired", "Gone"):
            return self._start_over(status.message)
        if _TOO_LARGE in status.causes or status.code == 400:
            return self._start_over(status.message)  # the server is younger than what we know: restored, or another
        self._broken += 1
        if self._broken >= _BROKEN_LIMIT and status.code not in (*_PASSING, 503):
            return self._start_over(status.message)
        wait = float(status.details.retry_after_seconds) if status.details else 0.0
        return Broken(f"{status.code} {status.reason}: {status.message}", wait)

    def _start_over(self, reason: str) -> Relist:
        self.listing = True
        self._token = ""
        self._collected = {}
        self._broken = 0
        return Relist(reason)

    def _collect(self, raw: msgspec.Raw, changes: list[Change], *, deleted: bool = False) -> None:
        """Add an object to the state that is being listed; of a bad one, keep what was known."""
        obj = self._decode(raw)
        if isinstance(obj, BadObject):
            changes.append(obj)
            head = _name_of(raw, self.kind)
            if head is not None and head in self._objects:
                self._collected[head] = self._objects[head]
            return
        if deleted:
            self._collected.pop(ref_of(obj), None)
        else:
            self._collected[ref_of(obj)] = obj

    def _settle(self, version: str, changes: list[Change]) -> None:
        """Make the collected state the known one; say only what differs, except the first time."""
        fresh, self._collected = self._collected, {}
        if self.synced:
            changes.extend(Delete(ref) for ref in self._objects if ref not in fresh)
            changes.extend(Upsert(obj) for ref, obj in fresh.items() if self._objects.get(ref) != obj)
        else:
            changes.append(Replace(tuple(fresh.values())))
        self._limit = self._page
        self._objects = fresh
        self.objects = fresh
        self._gone = {}
        self.version = version
        self.synced = True
        self.listing = False

    def _follow(self, event: _Event, head: _Meta) -> list[Change]:
        ref = Ref(self.kind, head.namespace, head.name)
        known = self._objects.get(ref)
        number = _number(head.resource_version)
        last = _number(known.metadata.resource_version) if known is not None else self._gone.get(ref)
        late = number is not None and last is not None and number < last
        if event.type == "DELETED":
            if late or known is None:
                return []
            del self._objects[ref]
            if number is not None:
                self._gone[ref] = number
                if len(self._gone) > _TOMBSTONES:
                    del self._gone[next(iter(self._gone))]
            return [Delete(ref)]
        if late or (known is None and number is not None and number == last):
            return []
        obj = self._decode(event.object)
        if isinstance(obj, BadObject):
            return [obj]
        if obj == known:
            return []
        self._objects[ref] = obj
        self._gone.pop(ref, None)
        return [Upsert(obj)]

    def _advance(self, version: str) -> None:
        old, new = _number(self.version), _number(version)
        if version and (old is None or new is None or new > old):
            self.version = version

    def _decode(self, raw: msgspec.Raw) -> Object | BadObject:
        try:
            obj: Object = self._decoder.decode(raw)
        except msgspec.DecodeError as error:
            ref = _name_of(raw, self.kind)
            reason, _, path = str(error).partition(" - at `$")
            return BadObject(str(ref or self.kind), path.rstrip("`").lstrip("."), reason)
        if not obj.metadata.name:
            return BadObject(self.kind, "metadata.name", "missing")
        return obj


def _name_of(raw: msgspec.Raw, kind: str) -> Ref | None:
    try:
        head = _head.decode(raw).metadata
    except msgspec.DecodeError:
        return None
    return Ref(kind, head.namespace, head.name)


def _number(version: str) -> int | None:
    return int(version) if version.isdigit() else None
