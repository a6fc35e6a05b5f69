"""The cluster that plays deploy/, one for all of its tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import containerd
from support.deployed import Deployed, deploy, populate


@pytest.fixture(scope="session")
def running() -> Iterator[Deployed]:
    """Both DaemonSets from the image that PYNET_IMAGE names, on two nodes."""
    if reason := containerd.why_not():
        pytest.skip(reason)
    with deploy(Path(os.environ["PYNET_IMAGE"])) as cluster:
        populate(cluster)
        yield cluster
