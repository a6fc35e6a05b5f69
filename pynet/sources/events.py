"""Kubernetes Events: what an operator must know, once, and never as noise. `apievents` tells them."""

from __future__ import annotations

from typing import Literal, Protocol

from pynet.objects import Object, Ref

Severity = Literal["Normal", "Warning"]


class Events(Protocol):
    """Where Events go."""

    def emit(
        self, reason: str, message: str, about: Object | Ref | None = None, severity: Severity = "Warning"
    ) -> None:
        """Tell `message` about an object (None: this node); `reason` is one CamelCase word. Never blocks or raises."""

    def close(self) -> None:
        """Send what is waiting, for two seconds at most."""


class NoEvents:
    """Where no API server is: Events go nowhere; what they say is in the log."""

    def emit(
        self, reason: str, message: str, about: Object | Ref | None = None, severity: Severity = "Warning"
    ) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
