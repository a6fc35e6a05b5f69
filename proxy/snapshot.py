"""The state file: what was known of the cluster when it was last in the kernel, for a start without any source.

One file, written whole and renamed into place, with a checksum: half a file or another program's is never believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pynet.daemon import logs

log = logs.get(__name__)
_MAGIC = b"pyproxy-state-1\n"
_DIGEST = 16
_INTERVAL = 10.0  # seconds between two writes


class StateFile:
    """The file. `store` writes at most every ten seconds, and only what is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stored_at = -float("inf")
        self._generation = -1
        self._is_failing = False

    def load(self) -> bytes | None:
        """Return what was stored; None where there is none, or it is damaged."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("state file cannot be read", extra=logs.fields(file=self._path, reason=error.strerror))
            return None
        digest, body = data[len(_MAGIC) : len(_MAGIC) + _DIGEST], data[len(_MAGIC) + _DIGEST :]
        if not data.startswith(_MAGIC) or digest != _digest(body):
            log.warning("state file is damaged and will be replaced", extra=logs.fields(file=self._path))
            return None
        return body

    def store(self, state: Callable[[], bytes], generation: int, now: float) -> None:
        """Store a state unless `generation` was stored before or the last write is too recent."""
        if generation == self._generation or now - self._stored_at < _INTERVAL:
            return
        body = state()
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._stored_at = now
        try:
            with beside.open("wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(_MAGIC + _digest(body) + body)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            if not self._is_failing:
                log.warning("state file cannot be written", extra=logs.fields(file=self._path, reason=error.strerror))
            self._is_failing = True
            with contextlib.suppress(OSError):
                beside.unlink()
            return
        self._is_failing = False
        self._generation = generation


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()
