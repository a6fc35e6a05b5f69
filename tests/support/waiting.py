"""Waiting for what comes in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 15.0


def until(what: str, true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `true` returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        found = true()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s; last seen: {found!r}")
        time.sleep(0.03)
