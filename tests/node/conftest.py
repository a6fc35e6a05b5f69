"""What the node agent's tests share: one machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import Names
from support.nodes import Cluster, Machine


@pytest.fixture
def own(netns: Names, tmp_path: Path) -> Iterator[Machine]:
    """The node n1, beside a router; its agent is not started yet."""
    (machine,) = Cluster(netns, tmp_path, 1).nodes
    machine.publish()
    yield machine
    if machine.agent is not None:
        machine.stop()
