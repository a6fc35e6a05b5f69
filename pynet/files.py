"""Files that are whole whenever somebody reads them, and stay so through a crash."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, data: bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """Put `data` at `path` in one step; `durable`: on disk before it is seen. What a crash leaves is overwritten next
    time. Not for two writers of one file at once.
    """
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        if durable:
            file.flush()
            os.fsync(descriptor)
    part.rename(path)
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> bytes | None:
    """Return a file's contents, None where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
