"""inotify(7) on one directory: names of entries whose contents are complete, or which went away."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_EVENT = struct.Struct("iIII")
_CLOSE_WRITE, _MOVED_FROM, _MOVED_TO = 0x8, 0x40, 0x80
_CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_OVERFLOW, _IGNORED = 0x4000, 0x8000
# CREATE: for symbolic and hard links, which are never closed after writing
_MASK = _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_ONLYDIR = 0x01000000


class Watch:
    """A watch on a directory. `wait` returns what changed; `lost` is set when the directory itself is gone."""

    def __init__(self, directory: Path) -> None:
        """Raise OSError (FileNotFoundError, NotADirectoryError …) where the directory cannot be watched."""
        self.lost = False
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "inotify")
        if _libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK | _ONLYDIR) < 0:
            error = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(error, os.strerror(error), str(directory))

    def wait(self, seconds: float) -> set[str] | None:
        """Return the names that changed within `seconds`, perhaps none; None: events were lost, look at everything."""
        ready, _, _ = select.select([self._fd], [], [], seconds)
        return self._read() if ready else set()

    def _read(self) -> set[str] | None:
        names: set[str] = set()
        overflow = False
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return None if overflow else names
            offset = 0
            while offset < len(data):
                _, mask, _, length = _EVENT.unpack_from(data, offset)
                name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
                offset += _EVENT.size + length
                overflow = overflow or bool(mask & _OVERFLOW)
                self.lost = self.lost or bool(mask & (_DELETE_SELF | _MOVE_SELF | _IGNORED))
                if name:
                    names.add(os.fsdecode(name))

    def close(self) -> None:
        """End the watch."""
        os.close(self._fd)
