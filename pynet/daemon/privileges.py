"""The capabilities of a daemon: which it lacks; giving up those not needed, for itself and all programs it starts.

Capabilities belong to a thread and are inherited by those that it starts: to be called before the first of them.
Numbers: linux/capability.h, prctl(2), capset(2).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from pathlib import Path

NET_BIND_SERVICE, NET_ADMIN, NET_RAW, SYS_ADMIN = 10, 12, 13, 21
_NAMES = {10: "CAP_NET_BIND_SERVICE", 12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW", 21: "CAP_SYS_ADMIN"}
_CAPBSET_READ, _CAPBSET_DROP = 23, 24
_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def lacking(capabilities: Iterable[int]) -> str:
    """Return the names of those that this process does not have, in words; or ""."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return " ".join(_NAMES[number] for number in capabilities if not effective >> number & 1)


def keep_only(capabilities: Iterable[int]) -> bool:
    """Drop every other capability from the bounding, permitted and effective sets; return whether that was possible."""
    kept = set(capabilities)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        is_there = _libc.prctl(_CAPBSET_READ, number, 0, 0, 0) == 1
        if number not in kept and is_there and _libc.prctl(_CAPBSET_DROP, number, 0, 0, 0) != 0:
            return False
    header = struct.pack("=Ii", _VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data) != 0:
        return False
    words = list(struct.unpack("=6I", data.raw[:24]))  # effective, permitted, inheritable; low words, then high ones
    mask = sum(1 << number for number in kept)
    for high in (0, 1):
        for place in range(3):
            words[high * 3 + place] &= (mask >> (32 * high)) & 0xFFFFFFFF
    return bool(_libc.capset(header, struct.pack("=6I", *words)) == 0)
