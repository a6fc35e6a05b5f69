"""What all verbs need around their steps: the pod's namespace, the kill tests' seam, an exception as one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cni import spec
from cni.spec import CniError, Request
from pynet.kernel import netlink, netns

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
