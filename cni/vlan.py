"""VLANs of a bridge port: `vlan`, `vlanTrunk`, `preserveDefaultVlan`, and the gateway's own link in a VLAN."""

from __future__ import annotations

import errno
import os
from _blake2 import blake2b  # hashlib would load all of OpenSSL

from cni import spec
from cni.netconf import NetConf
from cni.wiring import has_ipv6, request, skip_dad
from pynet.kernel import netlink, netns, rtnl

_ALIAS = "pynet-cni"
DEFAULT = 1
"""The VLAN that a bridge gives to every new port."""


def wanted(conf: NetConf) -> bool:
    """Say whether the network uses VLANs."""
    return bool(conf.vlan or conf.vlan_trunk)


def enable(host: netlink.Socket, bridge: rtnl.Link) -> None:
    """Make the bridge filter VLANs. Raise `CniError` where the kernel cannot."""
    if bridge.vlan_filtering:
        return
    if bridge.vlan_filtering is not None:
        try:
            rtnl.set_vlan_filtering(host, bridge.ifindex)
        except netlink.NetlinkError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        found = rtnl.link_named(host, bridge.name)
        if found is not None and found.vlan_filtering:
            return
    raise spec.CniError(
        spec.FAILED, "fields vlan and vlanTrunk: this kernel's bridge cannot filter VLANs",
        "it is built without CONFIG_BRIDGE_VLAN_FILTERING",
    )  # fmt: skip


def membership(conf: NetConf) -> dict[int, bool]:
    """Return the VLANs of a pod's port: number to whether it is the native one, untagged. Pure."""
    found = {vid: False for first, last in conf.vlan_trunk for vid in range(first, last + 1)}
    if conf.vlan:
        found[conf.vlan] = True
    if conf.preserve_default_vlan or not conf.vlan:
        found[DEFAULT] = not conf.vlan
    return found


def set_port(host: netlink.Socket, port: rtnl.Link, conf: NetConf) -> None:
    """Make a port a member of the network's VLANs and of no other. Raise `NetlinkError`."""
    if not (conf.preserve_default_vlan or not conf.vlan):
        message = rtnl.vlan_request(port.ifindex, DEFAULT, DEFAULT, add=False)
        request(host, message, f"default VLAN of {port.name}", absent=(errno.ENOENT,))
    for first, last in conf.vlan_trunk:
        request(host, rtnl.vlan_request(port.ifindex, first, last, add=True), f"VLANs {first}-{last} of {port.name}")
    for vid, native in membership(conf).items():
        if native:
            request(host, rtnl.vlan_request(port.ifindex, vid, vid, add=True, pvid=True), f"VLAN {vid} of {port.name}")


def difference(host: netlink.Socket, port: rtnl.Link, conf: NetConf) -> str:
    """Return what is wrong with a port's VLANs, nothing when all is well."""
    present = rtnl.vlans(host, port.ifindex)
    for vid, native in membership(conf).items():
        if vid not in present:
            return f"VLAN {vid} is missing on host veth {port.name}"
        if native and present[vid] & 6 != 6:
            return f"VLAN {vid} is not the native VLAN of host veth {port.name}"
    extra = sorted(set(present) - set(membership(conf)))
    return f"VLAN {extra[0]} is on host veth {port.name} and should not be" if extra else ""


def gateway_name(conf: NetConf) -> str:
    """Return the name of the link that holds the gateway's address in the VLAN. Raise `CniError` if too long."""
    name = f"{conf.bridge}.{conf.vlan}"
    if len(name) > 15:
        raise spec.CniError(spec.BAD_CONFIG, f"field bridge: {name}, the gateway's link, has more than 15 characters")
    return name


def is_gateway_port(port: rtnl.Link, bridge: str) -> bool:
    """Say whether a bridge's port is the other end of a link that holds a gateway's address."""
    return port.alias.startswith(f"{_ALIAS} {bridge}.")


def ensure_gateway_link(host: netlink.Socket, bridge: rtnl.Link, conf: NetConf) -> rtnl.Link:
    """Return the link that holds the gateway's address: a veth whose other end is a port in the VLAN."""
    name = gateway_name(conf)
    port_name = "vlan" + blake2b(name.encode(), digest_size=8).hexdigest()[:11]
    if rtnl.link_named(host, name) is None:
        own = netns.own()
        try:
            rtnl.add_veth(host, port_name, name, own, master=bridge.ifindex, mtu=conf.mtu, alias=f"{_ALIAS} {name}")
        except netlink.NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
        finally:
            os.close(own)
    port, link = rtnl.link_named(host, port_name), rtnl.link_named(host, name)
    if port is None or link is None:
        raise spec.CniError(spec.FAILED, f"the gateway's link {name} exists already and is not ours")
    set_port(host, port, conf._replace(vlan_trunk=(), preserve_default_vlan=False))
    if not link.up:
        if has_ipv6(name):
            skip_dad(name)
        request(host, rtnl.set_link(link.ifindex, up=True), f"gateway's link {name}")
    return link
