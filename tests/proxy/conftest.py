"""For all tests of the proxy: a lock of their own for legacy iptables.

The programs lock a file that all network namespaces of a machine share, though their tables have nothing in common.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_xtables_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTABLES_LOCKFILE", str(tmp_path_factory.mktemp("xtables") / "lock"))
        yield
