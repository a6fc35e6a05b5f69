"""In the guest: all tests are imported and collected once, then done by forked processes, a file at a time.

On an emulated processor each further process that imports pytest and the tests costs ten seconds.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest


class Halves:
    """Runs the collected tests in `count` processes; `forked` is called in each new one with its number."""

    def __init__(self, count: int, forked: Callable[[int], None]) -> None:
        self._count = count
        self._forked = forked

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.config.option.collectonly or session.testsfailed:
            return None
        files = [list(group) for _, group in itertools.groupby(session.items, key=lambda item: item.path)]
        files.sort(key=len, reverse=True)
        turns, writer = os.pipe()
        os.write(writer, bytes(range(len(files))))
        os.close(writer)
        children = []
        for number in range(1, self._count):
            if child := os.fork():
                children.append(child)
                continue
            try:
                _capture_anew(session.config)
                self._forked(number)
                _take_turns(turns, files)
            finally:
                os._exit(0)  # what the first process has begun, that one ends
        _take_turns(turns, files)
        for child in children:
            os.waitpid(child, 0)
        return True


def _take_turns(turns: int, files: list[list[pytest.Item]]) -> None:
    """Do the tests of one file after the other: whichever is next when one is done."""
    while turn := os.read(turns, 1):
        tests = files[turn[0]]
        for item, following in zip(tests, [*tests[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def _capture_anew(config: pytest.Config) -> None:
    """Give this process files of its own to capture output in."""
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    capture.stop_global_capturing()
    capture.start_global_capturing()
