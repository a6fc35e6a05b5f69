"""sysctls through /proc/sys, of the network namespace that the process is in. Names as in `net/ipv4/ip_forward`."""

from __future__ import annotations

import os

_ROOT = "/proc/sys"


class SysctlError(OSError):
    """A sysctl that could not be set; the message names it and the value."""


def read(name: str) -> str | None:
    """Return a sysctl's value, None where this kernel does not have it."""
    try:
        fd = os.open(f"{_ROOT}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 4096).decode().strip()
    finally:
        os.close(fd)


def write(name: str, value: str | int) -> bool:
    """Set a sysctl; return whether that changed it. Raise `SysctlError`."""
    text = str(value)
    if read(name) == text:
        return False
    try:
        fd = os.open(f"{_ROOT}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise SysctlError(error.errno, f"sysctl {name.replace('/', '.')} = {text}: {error.strerror}") from None
    return True
