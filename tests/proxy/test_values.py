"""Durations as Go's flags spell them: what is written can be read."""

from __future__ import annotations

import pytest

from proxy.values import duration, spelled


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (30, "30s"), (0.001, "0.001s"), (1.5, "1.5s"), (2_592_000, "2592000s")]
)
def test_a_duration_is_written_as_it_is_read(seconds: float, text: str) -> None:
    assert spelled(seconds, is_duration=True) == text
    assert duration(text) == seconds
