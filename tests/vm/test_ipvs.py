"""IPVS through our own netlink, in the virtual machine where this kernel has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pynet.ipvs import Service, ServiceId
from pynet.kernel import netlink
from pynet.kernel.ipvs import Ipvs
from support.netns import Names
from support.servicenet import inside

pytestmark = [pytest.mark.vm, pytest.mark.root]


def test_no_server_is_missed_while_those_of_another_namespace_go(netns: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {ServiceId(4, f"10.97.{number & 3}.{number >> 2}", 80, "TCP") for number in range(800)}
    theirs = [ServiceId(4, f"10.98.{number & 3}.{number >> 2}", 80, "TCP") for number in range(800)]
    with inside(netns("node")):
        here = Ipvs()
    with inside(netns("other")):
        there = Ipvs()
    here.send([here.add_service(name, Service("rr")) for name in mine])
    receive = netlink.Socket._receive

    def then_they_go(self: netlink.Socket) -> Iterator[tuple[int, int, int, bytes]]:
        yield from receive(self)
        monkeypatch.setattr(netlink.Socket, "_receive", receive)
        there.send([there.delete_service(name) for name in theirs])

    for read, missed in ((here.glance, True), (here.services, False)):
        there.send([there.add_service(name, Service("rr")) for name in theirs])
        monkeypatch.setattr(netlink.Socket, "_receive", then_they_go)
        assert (read().keys() < mine) is missed
    here.close()
    there.close()
