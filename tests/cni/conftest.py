"""What the plugin's tests share: a runtime that calls it in a host of its own, and one pod."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cni import Pod, Runtime
from support.netns import Names


@pytest.fixture
def runtime(netns: Names, tmp_path: Path) -> Runtime:
    """A host namespace and its state folder."""
    return Runtime(netns("host"), tmp_path / "state")


@pytest.fixture
def pod(runtime: Runtime, netns: Names) -> Pod:
    """A pod of that host, not wired yet."""
    return Pod(runtime, netns("pod"))
