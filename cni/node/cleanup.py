"""`pynetd --cleanup`: takes away all that is the agent's on this machine, and nothing else.

What belongs to pods stays while there are pods: the bridge while it has ports, the record of their addresses. Sysctls
stay as they are: others may have come to rely on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cni.node import acceptance, conflist, status
from cni.node.masquerading import Off
from cni.node.routes import DEVICES, PROTOCOL
from cni.serve import SOCKET
from pynet.kernel.ipset import IpsetError
from pynet.kernel.iptables import IptablesError
from pynet.kernel.netlink import NetlinkError
from pynet.kernel.nftables import NftError
from pynet.kernel.routes import Rtnetlink


def clean(state_dir: Path, conf_dir: Path | None, bridge: str) -> Iterator[tuple[str, str]]:
    """Remove what is ours; yield each thing that was there, and `removed` or why it was not."""
    with Rtnetlink() as kernel:
        yield from _tried("routes", lambda: _routes(kernel))
        yield from _tried("VXLAN devices", lambda: _devices(kernel))
        yield from _bridge(kernel, bridge)
    yield from _tried("masquerade", Off().remove)
    yield from _tried(f"chain {acceptance.CHAIN}", acceptance.remove)
    if conf_dir is not None:
        yield from _tried(str(conf_dir / conflist.NAME), lambda: conflist.remove(conf_dir))
    for name in (status.STATUS, status.NODE, SOCKET):
        yield from _tried(str(state_dir / name), partial(_file, state_dir / name))


def _tried(what: str, remove: Callable[[], bool]) -> Iterator[tuple[str, str]]:
    try:
        if remove():
            yield what, "removed"
    except (NetlinkError, NftError, IptablesError, IpsetError, OSError) as error:
        yield what, f"not removed: {error}"


def _routes(kernel: Rtnetlink) -> bool:
    kernel.links()
    ours = [route for family in (4, 6) for route in kernel.routes(family) if route.protocol == PROTOCOL]
    for _, error in kernel.delete(ours):
        raise error
    return bool(ours)


def _devices(kernel: Rtnetlink) -> bool:
    ours = [link.name for link in kernel.links() if link.name in DEVICES.values() and link.kind == "vxlan"]
    for name in ours:
        kernel.delete_link(name)
    return bool(ours)


def _bridge(kernel: Rtnetlink, name: str) -> Iterator[tuple[str, str]]:
    links = kernel.links()
    bridge = next((link for link in links if link.name == name and link.kind == "bridge"), None)
    if bridge is None:
        return
    ports = sum(link.master == bridge.index for link in links)
    if ports:
        yield f"bridge {name}", f"left: {ports} pods are on it"
        return

    def remove() -> bool:
        kernel.delete_link(name)
        return True

    yield from _tried(f"bridge {name}", remove)


def _file(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
