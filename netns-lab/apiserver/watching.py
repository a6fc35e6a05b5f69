"""A watch as a generator of events: initial state, changes as the selectors see them, bookmarks, its end."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from apiserver import errors
from apiserver.errors import Cause
from apiserver.resources import Resource
from apiserver.selectors import Predicate
from apiserver.store import Event, Store, Stored

Json = dict[str, Any]
INITIAL_END = "k8s.io/initial-events-end"
_TICK = 0.25  # seconds between looks at whether the client is still there
_FUTURE_WAIT = 3.0  # seconds that a version of the future is waited for


def head(resource: Resource) -> bytes:
    """Return how an object of a watch begins: kind and version, which stored items lack."""
    return f'{{"kind":"{resource.kind}","apiVersion":"{resource.api_version}"'.encode()


def whole(resource: Resource, stored: Stored) -> bytes:
    """Return an object's JSON with kind and version."""
    return head(resource) + (b"," + stored.item[1:] if len(stored.item) > 2 else b"}")


def seen(event: Event, namespace: str, selected: Predicate) -> tuple[str, Stored] | None:
    """Return what a watch with these selectors is told of a change: its type and the object, or None."""

    def visible(stored: Stored | None) -> bool:
        return (
            stored is not None
            and (not namespace or stored.obj["metadata"].get("namespace") == namespace)
            and selected(stored.obj)
        )

    before, after = visible(event.before), visible(event.after)
    if after:
        assert event.after is not None
        return ("MODIFIED" if before else "ADDED", event.after)
    if before:
        assert event.before is not None
        last = event.before.obj  # the last form that was seen, with the version of the change that took it away
        meta = {**last["metadata"], "resourceVersion": str(event.version)}
        return "DELETED", Stored({**last, "metadata": meta}, event.version)
    return None


def bookmark(resource: Resource, version: int, *, initial_end: bool = False) -> Json:
    """Return the object of a bookmark."""
    meta: Json = {"resourceVersion": str(version)}
    if initial_end:
        meta["annotations"] = {INITIAL_END: "true"}
    return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": meta, **dict(resource.zero)}


def checked(query: Mapping[str, str], *, streaming: bool) -> None:
    """Raise 422 for options that do not go together, as the server of the lists does."""
    initial, match = query.get("sendInitialEvents"), query.get("resourceVersionMatch")
    found = []
    if initial is not None and not streaming:
        text = "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
        found.append(Cause("sendInitialEvents", text, "FieldValueForbidden"))
    elif initial is not None and match != "NotOlderThan":
        text = 'Forbidden: sendInitialEvents requires setting resourceVersionMatch to "NotOlderThan"'
        found.append(Cause("sendInitialEvents", text, "FieldValueForbidden"))
    if match is not None and initial is None:
        text = "Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
        found.append(Cause("resourceVersionMatch", text, "FieldValueForbidden"))
    if found:
        raise errors.invalid("meta.k8s.io", "ListOptions", "", found)


def begin(store: Store, query: Mapping[str, str]) -> int | None:
    """Return the version to start after; None: with the present state. Raise 400 or 504."""
    text = query.get("resourceVersion", "")
    if text and not text.isdigit():
        raise errors.ApiError(400, "BadRequest", f'resourceVersion: Invalid value: "{text}": invalid version')
    asked = int(text or 0)
    deadline = time.monotonic() + min(_FUTURE_WAIT, float(query.get("timeoutSeconds", 3) or 3))
    with store.changed:
        while asked > store.version and (left := deadline - time.monotonic()) > 0:
            store.changed.wait(left)
        if asked > store.version:
            raise errors.too_large_version(asked, store.version)
    return None if asked == 0 or query.get("sendInitialEvents") == "true" else asked


def events(
    store: Store,
    resource: Resource,
    namespace: str,
    selected: Predicate,
    query: Mapping[str, str],
    start: int | None,
    bookmark_every: float,
    alive: Callable[[], bool],
) -> Iterator[list[tuple[str, Stored | Json]]]:
    """Yield batches of (type, object) until the watch's time is over; an empty batch is a chance to look around.

    The object of ADDED, MODIFIED and DELETED is a `Stored`, of BOOKMARK and ERROR a dictionary.
    """
    seconds = float(query.get("timeoutSeconds") or 0) or random.uniform(1800, 3600)
    deadline = time.monotonic() + seconds
    marks = query.get("allowWatchBookmarks") in ("true", "1")
    if start is None:
        version, found = store.snapshot(resource, namespace, selected)
        yield [("ADDED", stored) for _, stored in found]
        if query.get("sendInitialEvents") == "true":
            yield [("BOOKMARK", bookmark(resource, version, initial_end=True))]
    else:
        version = start
    next_mark = time.monotonic() + bookmark_every
    if seconds > 10:  # the last one, two seconds before the end
        next_mark = min(next_mark, deadline - 2)
    while alive():
        with store.changed:
            now = time.monotonic()
            try:
                fresh = store.after(resource, version)
                if not fresh and now < deadline:
                    store.changed.wait(min(_TICK, deadline - now))
                    fresh = store.after(resource, version)
            except errors.ApiError as error:
                yield [("ERROR", error.status())]
                return
            reached = store.version
        told = [pair for event in fresh if (pair := seen(event, namespace, selected))]
        version = reached if reached >= version else version
        if told:
            yield list(told)
        now = time.monotonic()
        if now >= deadline:
            return
        if marks and now >= next_mark:
            yield [("BOOKMARK", bookmark(resource, version))]
            next_mark = now + bookmark_every
            if seconds > 10 and next_mark > deadline - 2 > now:
                next_mark = deadline - 2
        elif not told:
            yield []


def page_token(version: int, last_key: str) -> str:
    """Return the continue token after an item: version and key, as kube-apiserver encodes them."""
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": last_key + "\0"}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def page_start(token: str) -> tuple[int, str]:
    """Return version and first key of a continue token. Raise 400."""
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        body = msgspec.json.decode(raw)
        return int(body["rv"]), str(body["start"])
    except (ValueError, KeyError, TypeError, msgspec.DecodeError):
        text = "continue key is not valid: invalid character 'o' in literal null (expecting 'u')"
        raise errors.bad_request(f"invalid continue token: {text}") from None
