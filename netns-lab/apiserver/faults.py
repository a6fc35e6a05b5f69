"""What goes wrong on purpose: a script of faults, each for the requests that it matches, as often as it says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from apiserver import errors
from apiserver.errors import ApiError


@dataclass
class Fault:
    """One fault.

    Which requests: `plural` and `verb` ("list", "watch", "get", "create" …; "": any), `times` (None: always).
    What happens: `error` is the answer; `delay` seconds pass before it; `hang`: no answer, until the server lets go;
    `hangup`: the connection is closed after an answer that did not say so; `gzip`: it is compressed, as by a proxy.
    On a watch, after `after` events of it: `cut` ends the connection in mid-line, `close` ends it well, `stall` says
    nothing more and keeps it open, `gone` sends an ERROR event 410, `tells` one with that error, `garbage` sends a
    line that is no JSON. All along a watch: `duplicate` sends each event twice, `swap` sends events in pairs, the later
    one first, `quiet` sends no bookmarks, `drip` sends that many bytes at a time, `pause` seconds between.
    """

    plural: str = ""
    verb: str = ""
    times: int | None = 1
    error: ApiError | None = None
    delay: float = 0.0
    hang: bool = False
    hangup: bool = False
    gzip: bool = False
    after: int = 0
    cut: bool = False
    close: bool = False
    stall: bool = False
    gone: bool = False
    tells: ApiError | None = None
    garbage: bool = False
    duplicate: bool = False
    swap: bool = False
    quiet: bool = False
    drip: int = 0
    pause: float = 0.0
    met: int = field(default=0, compare=False)

    @property
    def ends_watch(self) -> bool:
        """Whether a watch ends by it."""
        return bool(self.cut or self.close or self.stall or self.gone or self.tells or self.garbage)


class Script:
    """The faults that wait for their request."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, *faults: Fault, **fields: Any) -> Fault:
        """Add faults, or one made of `fields`; return the last."""
        with self._lock:
            self._faults += faults or (Fault(**fields),)
            return self._faults[-1]

    def clear(self) -> None:
        """Let everything go well from now on."""
        with self._lock:
            self._faults.clear()

    def next(self, plural: str, verb: str) -> Fault | None:
        """Return the fault of this request, if there is one, and count it."""
        with self._lock:
            for fault in self._faults:
                if fault.plural in ("", plural) and fault.verb in ("", verb):
                    fault.met += 1
                    if fault.times is not None and fault.met >= fault.times:
                        self._faults.remove(fault)
                    return fault
        return None


@dataclass(frozen=True)
class End:
    """How a watch ends before its time: `last` lines are still sent, `rest` is cut in half; `stall`: silence after."""

    last: list[bytes]
    rest: bytes = b""
    stall: bool = False


def troubled(lines: Iterator[list[bytes]], fault: Fault) -> Iterator[list[bytes] | End]:
    """Yield the lines of a watch with what the fault does to them."""
    sent = 0
    held: list[bytes] = []
    for batch in lines:
        if fault.quiet:
            batch = [line for line in batch if b'"BOOKMARK"' not in line[:24]]
        if fault.duplicate:
            batch = [copy for line in batch for copy in (line, line)]
        if fault.swap:
            held += batch
            pairs = len(held) // 2 * 2
            batch = [line for at in range(0, pairs, 2) for line in (held[at + 1], held[at])]
            held = held[pairs:]
        if fault.ends_watch and sent + len(batch) >= fault.after:
            room = fault.after - sent
            yield _ending(batch[:room], batch[room:], fault)
            return
        sent += len(batch)
        yield batch


def _ending(sent: list[bytes], left: list[bytes], fault: Fault) -> End:
    if fault.gone or fault.tells:
        told = fault.tells or errors.expired("too old resource version: 1 (2)")
        return End([*sent, b'{"type":"ERROR","object":' + msgspec.json.encode(told.status()) + b"}\n"])
    if fault.garbage:
        return End([*sent, b'{"type":"ADDED","object":{"metadata"}\n'])
    if fault.cut:
        return End(sent, left[0] if left else b'{"type":"MODIFIED","object":{"kind"' * 2)
    return End(sent, stall=fault.stall)
