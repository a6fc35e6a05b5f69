"""sysctls through /proc/sys, of the network namespace that the process is in. Names as in `net/ipv4/ip_forward`."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/proc/sys")


class SysctlError(OSError):
    """A sysctl that could not be set; the message names it and the value."""


def read(name: str) -> str | None:
    """Return a sysctl's value, None where this kernel does not have it."""
    try:
        return (_ROOT / name).read_text().strip()
    except FileNotFoundError:
        return None


def write(name: str, value: str | int) -> bool:
    """Set a sysctl; return whether that changed it. Raise `SysctlError`."""
    text = str(value)
    if read(name) == text:
        return False
    try:
        (_ROOT / name).write_text(text)
    except OSError as error:
        raise SysctlError(error.errno, f"sysctl {name.replace('/', '.')} = {text}: {error.strerror}") from None
    return True
