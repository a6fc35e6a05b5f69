"""Makes the VXLAN devices that are wanted, mends those that differ, and removes those that are not."""

from __future__ import annotations

from collections.abc import Iterable

from cni.node.routes import DEVICES, Device
from pynet.daemon import logs
from pynet.kernel.netlink import NetlinkError
from pynet.kernel.routes import Rtnetlink
from pynet.netstate import NetState, family_of

log = logs.get(__name__)
ALIAS = "pynetd"


def ensure(kernel: Rtnetlink, devices: Iterable[Device], state: NetState) -> bool:
    """Bring our VXLAN devices to what is wanted; return whether something changed. Raise `NetlinkError`."""
    changed = False
    for device in devices:
        link = state.link(device.name)
        if link is not None and link.vxlan != device.vxlan:
            log.info("VXLAN device made anew", extra=logs.fields(dev=device.name, was=link.vxlan, wanted=device.vxlan))
            kernel.delete_link(device.name)
            link = None
        made = link is None
        if link is None:
            kernel.make_vxlan(device.name, device.vxlan, device.mac, device.mtu)
            log.info("VXLAN device made", extra=logs.fields(dev=device.name, vxlan=device.vxlan, mtu=device.mtu))
        wanted = (device.mac, device.mtu, ALIAS, True, 0)
        if link is None or (link.mac, link.mtu, link.alias, link.up, link.master) != wanted:
            kernel.set_link(device.name, mac=device.mac, mtu=device.mtu, alias=ALIAS)
            changed = True
        present = set() if made else {f"{a.address}/{a.length}" for a in state.addresses if a.dev == device.name}
        for entry in sorted(present - set(device.addresses)):
            address, _, length = entry.partition("/")
            kernel.delete_address(device.name, address, int(length))
            changed = True
        for entry in device.addresses:
            if entry not in present:
                changed = _give_address(kernel, device.name, entry) or changed
    return changed


def _give_address(kernel: Rtnetlink, dev: str, entry: str) -> bool:
    """Give a device an address; where IPv6 is switched off, IPv4 goes on without it, and the routes tell. Return
    whether it was given. Raise `NetlinkError`.
    """
    address, _, length = entry.partition("/")
    try:
        kernel.set_address(dev, address, int(length))
    except NetlinkError as error:
        if family_of(address) == 4:
            raise
        log.debug("no IPv6 address on the VXLAN device", extra=logs.fields(dev=dev, error=error))
        return False
    return True


def remove_others(kernel: Rtnetlink, devices: Iterable[Device], state: NetState) -> bool:
    """Remove VXLAN devices of ours that are not in `devices`; return whether there were some."""
    keep = {device.name for device in devices}
    stale = [link.name for link in state.links if link.name in DEVICES.values() and link.kind == "vxlan"]
    for name in stale:
        if name not in keep:
            kernel.delete_link(name)
            log.info("VXLAN device removed", extra=logs.fields(dev=name))
    return any(name not in keep for name in stale)
