"""What all verbs need around their steps: the pod's namespace, the kill tests' seam, an exception as one line."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cni import naming, spec
from cni.spec import CniError, Request
from pynet.kernel import netlink, netns

_TURN_SECONDS = 60
_KILL_AT = os.environ.get("PYNET_CNI_KILL_AT", "")


def step(name: str) -> None:
    """Mark a point at which a kill does no lasting harm: the tests name one, and the process ends there."""
    if name == _KILL_AT:
        os.kill(os.getpid(), 9)


@contextmanager
def pod(request: Request, given: int, *, needed: bool = False) -> Iterator[int]:
    """Give a descriptor of the pod's namespace: the `given` one, or that of CNI_NETNS; -1 when it is gone.

    Raise `CniError` 8 when it is `needed` and cannot be opened, or is our own, in which no pod is.
    """
    fd = given
    if given < 0 and request.netns:
        try:
            fd = netns.open_path(request.netns)
        except OSError as error:
            if needed:
                raise CniError(
                    spec.BAD_NETNS, f"CNI_NETNS: failed to open netns {request.netns!r}: {error.strerror}"
                ) from None
    try:
        if fd >= 0 and (not netns.is_netns(fd) or _is_own(fd)):
            if needed:
                raise CniError(
                    spec.BAD_NETNS,
                    f"CNI_NETNS: {request.netns} is not a pod's network namespace, or is the plugin's own",
                )
            yield -1
        else:
            yield fd
    finally:
        if fd >= 0 and fd != given:
            os.close(fd)


@contextmanager
def turn(request: Request, state_dir: str) -> Iterator[None]:
    """Let one call at a time work on an attachment. Raise `CniError` 11 when another one does not come to its end.

    The lock is a byte of one file, at a place of the attachment's own: it goes with its holder, and leaves nothing.
    """
    try:
        os.makedirs(state_dir, mode=0o700, exist_ok=True)
        fd = os.open(f"{state_dir}/attachments.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # where nothing can be written, no ADD comes far, and DEL removes what it can
        yield
        return
    try:
        place = naming.number(request.container, request.ifname) >> 2  # a file's offsets have 63 bits
        lock = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        deadline = time.monotonic() + _TURN_SECONDS
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CniError(
                        spec.TRY_LATER, f"another call for {request.container}/{request.ifname} is still under way"
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def inside(fd: int) -> netlink.Socket:
    """Return a socket of the pod's namespace."""
    with netns.inside(fd):
        return netlink.Socket()


def said(error: Exception) -> str:
    """Return what an exception says, on one line."""
    if isinstance(error, netlink.NetlinkError):
        return str(error.strerror)
    if isinstance(error, CniError):
        return error.message
    return " ".join(str(error).split()) or type(error).__name__


def _is_own(fd: int) -> bool:
    own = netns.own()
    try:
        return netns.identity(own) == netns.identity(fd)
    finally:
        os.close(own)
