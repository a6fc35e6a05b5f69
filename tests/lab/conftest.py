"""Labs for tests: each under a name that no other test, worker or run has, gone afterwards whatever happened."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from netnslab import kernel, lifecycle
from netnslab.cluster import Lab
from netnslab.state import Spec

_counter = itertools.count()


def unique_name() -> str:
    """Return a lab's name that is nobody else's."""
    return f"t{os.getpid()}n{next(_counter)}"


@pytest.fixture(scope="module")
def make_lab() -> Iterator[Callable[..., Lab]]:
    """`make_lab(nodes=2, mode="nftables", …)` brings a lab up; where the kernel cannot, the test is skipped."""
    made: list[str] = []

    def make(nodes: int | None = None, *, demo: bool = False, **wanted: object) -> Lab:
        name = unique_name()
        made.append(name)
        try:
            return lifecycle.up(Spec(name, **wanted), nodes, demo=demo)  # type: ignore[arg-type]
        except kernel.Unable as error:
            pytest.skip(str(error))

    try:
        yield make
    finally:
        for name in made:
            lifecycle.down(name)
