"""Deletions that threads share: whoever returns finds the link gone at both ends, alone and in a crowd."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cni.deletion import SharedDeletion
from pynet.kernel import netlink, netns, rtnl
from support.netns import Names

pytestmark = pytest.mark.root


def in_namespace(name: str, work: Callable[[], None]) -> None:
    """Do `work` in a thread of its own there; an exception comes out."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            fd = netns.open_path(f"/run/netns/{name}")
            netns.enter(fd)
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_links_are_gone_at_both_ends(netns: Names, count: int) -> None:
    host, pod = netns("host"), netns("pod")
    pod_fd = open(f"/run/netns/{pod.name}")  # noqa: SIM115 - its descriptor is needed
    listed: list[bool] = []

    def work() -> None:
        deletion = SharedDeletion()
        with netlink.Socket() as sock:
            for number in range(count):
                rtnl.add_veth(sock, f"h{number}", f"p{number}", pod_fd.fileno())
            indexes = [link.ifindex for link in rtnl.links(sock, kind="veth")]

        def delete(index: int) -> None:
            with netlink.Socket() as sock:
                deletion.delete(sock, index)
                listed.append(rtnl.is_listed(index) or rtnl.link_at(sock, index) is not None)

        threads = [threading.Thread(target=delete, args=(index,)) for index in indexes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deletion.close()

    with pod_fd:
        in_namespace(host.name, work)
    assert listed == [False] * count
    assert "p0" not in pod.run("ip", "link")


def test_the_kernels_refusal_comes_back(netns: Names) -> None:
    def work() -> None:
        with netlink.Socket() as sock:
            SharedDeletion().delete(sock, 1)

    with pytest.raises(netlink.NetlinkError):
        in_namespace(netns("host").name, work)


def test_a_link_that_is_gone_is_no_error(netns: Names) -> None:
    def work() -> None:
        with netlink.Socket() as sock:
            SharedDeletion().delete(sock, 4711)

    in_namespace(netns("host").name, work)
