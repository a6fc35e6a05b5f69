"""What all tests share: namespaces that clean up after themselves, and `--update-goldens`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.netns import Names
from vm import lane


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write golden files anew instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    lane.install(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: makes network namespaces")
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("lab"):
            item.add_marker(skip)


@pytest.fixture
def netns() -> Iterator[Names]:
    """A factory of network namespaces: `netns("pod")`; all of them are gone after the test, whatever it did."""
    names = Names()
    try:
        yield names
    finally:
        names.close()
