"""Network namespaces as file descriptors: open, compare, enter. Only the calling thread changes its namespace.

`os.setns` came with Python 3.12; before, the C library is called through ctypes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

CLONE_NEWNET = 0x40000000
Identity = tuple[int, int]
"""Device and inode number: the same for every path to one namespace, for as long as the namespace lives."""


def open_path(path: str) -> int:
    """Return a file descriptor of the namespace at `path`. Raise `OSError`; EINVAL when the file is no namespace."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe would wait for its writer
    if not is_netns(fd):
        os.close(fd)
        raise OSError(22, f"{path}: not a network namespace")
    return fd


def own() -> int:
    """Return a file descriptor of the calling thread's namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def is_netns(fd: int) -> bool:
    """Say whether `fd` is a network namespace: its link in /proc tells the kind, as an unbound mount has no name."""
    name = os.readlink(f"/proc/thread-self/fd/{fd}")
    if name.startswith("net:["):
        return True
    # a bind mount shows its path; the files of nsfs share one device with our own namespace's
    if os.fstat(fd).st_dev != os.stat("/proc/thread-self/ns/net").st_dev:
        return False
    import fcntl

    ns_get_nstype = 0xB703
    try:
        return fcntl.ioctl(fd, ns_get_nstype) == CLONE_NEWNET
    except OSError:
        return False


def identity(fd: int) -> Identity:
    """Return what tells this namespace from every other one alive."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def path_identity(path: str) -> Identity | None:
    """Return the identity of what is at `path`, None when nothing is."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """Put the calling thread into the namespace `fd`, and back again at the end."""
    before = own()
    try:
        enter(fd)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)


def enter(fd: int) -> None:
    """Put the calling thread into the namespace `fd` for good."""
    native = getattr(os, "setns", None)
    if native is not None:
        native(fd, CLONE_NEWNET)
        return
    import ctypes

    if _c_library().setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@cache
def _c_library() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)
