"""STATUS: could an ADD be served now, and do the network's running pods suffer? Success, or error 50 or 51 and why."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cni import ctl, delegate, netconf, spec, vlan, wiring
from cni.context import Context
from cni.database import Damaged
from cni.ipam import verbs as ipam
from cni.netconf import NetConf
from cni.spec import CniError, Request
from pynet.kernel import netlink, netns, rtnl, sysctl

_LEAST_ROOM = 1 << 16
"""Bytes without which the databases cannot take another pod."""


def status(request: Request, environment: Mapping[str, str], context: Context, pod_netns: int) -> str:
    """Say by success that an ADD could be served. Raise `CniError` 51 where running pods suffer as well, 50 else.

    The details count the free addresses, whatever the reason.
    """
    del pod_netns
    try:
        conf = netconf.parse(request.config, request.args, request.version)
        found = degradation(conf, request, context) or hindrance(conf, environment)
        free = ipam.free_addresses(request, context) if conf.ipam_type == ipam.TYPE else ""
        if not found:
            _ask_ipam(conf, request, context, environment)
            return ""
    except (CniError, Damaged, OSError) as error:
        if isinstance(error, CniError) and error.code in (spec.CANNOT_ADD, spec.DEGRADED):
            raise
        details = error.details if isinstance(error, CniError) else ""
        raise CniError(spec.CANNOT_ADD, f"STATUS: {ctl.said(error)}", details) from None
    code, message, details = found
    raise CniError(code, f"STATUS: {message}", "; ".join(part for part in (details, free) if part))


def degradation(conf: NetConf, request: Request, context: Context) -> tuple[int, str, str] | None:
    """Return what keeps running pods of the network from their traffic, as code, message and details."""
    records = context.journal(conf.state_dir).all(request.network)
    alive = [
        one for one in records if not one.made_bridge and netns.path_identity(one.netns) == (one.device, one.inode)
    ]
    if not alive:
        return None
    pods = f"{len(alive)} pods of network {request.network} are attached to it"
    with netlink.Socket() as host:
        for name in dict.fromkeys(one.bridge for one in alive):
            bridge = rtnl.link_named(host, name)
            if bridge is None or bridge.kind != "bridge":
                return spec.DEGRADED, f"bridge {name} is missing", pods
            if not bridge.up:
                return spec.DEGRADED, f"bridge {name} is down", pods
    versions = {6 if ":" in address else 4 for one in alive for address in one.addresses}
    for version, name in wiring.FORWARDING.items():
        if conf.is_gateway and version in versions and sysctl.read(name) != "1":
            said = f"the host does not forward IPv{version}: sysctl {name.replace('/', '.')} is not 1"
            return spec.DEGRADED, said, f"{len(alive)} pods of network {request.network} need it"
    return None


def hindrance(conf: NetConf, environment: Mapping[str, str]) -> tuple[int, str, str] | None:
    """Return what stands in the way of another pod, as code, message and details."""
    full = _bridge(conf)
    if full:
        return full
    if (conf.ip_masq or conf.mac_spoof_check) and not _has_nft(environment):
        return spec.CANNOT_ADD, "the program nft is missing: install the package nftables", ""
    return _room(conf.state_dir)


def _bridge(conf: NetConf) -> tuple[int, str, str] | None:
    with netlink.Socket() as host:
        bridge = rtnl.link_named(host, conf.bridge)
        if bridge is None:
            return None
        if bridge.kind != "bridge":
            return spec.CANNOT_ADD, f"field bridge: {conf.bridge} is not a bridge", ""
        ports = len(rtnl.links(host, master=bridge.ifindex))
        if ports >= wiring.BRIDGE_PORTS:
            said = f"{ports} of at most {wiring.BRIDGE_PORTS} ports of a Linux bridge are in use"
            return spec.CANNOT_ADD, f"bridge {conf.bridge} is full", said
        if vlan.wanted(conf) and bridge.vlan_filtering is None:
            return (
                spec.CANNOT_ADD, "fields vlan and vlanTrunk: this kernel's bridge cannot filter VLANs",
                "it is built without CONFIG_BRIDGE_VLAN_FILTERING",
            )  # fmt: skip
    return None


def _room(folder: str) -> tuple[int, str, str] | None:
    """Return why a folder, or the one it will be made in, takes no database."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        return spec.CANNOT_ADD, f"folder {folder} cannot be written", ""
    space = os.statvfs(folder)
    if space.f_blocks and space.f_bavail * space.f_frsize < _LEAST_ROOM:
        return spec.CANNOT_ADD, f"no space is left for folder {folder}", ""
    return None


def _ask_ipam(conf: NetConf, request: Request, context: Context, environment: Mapping[str, str]) -> None:
    if conf.ipam_type == ipam.TYPE:
        room = _room(ipam.parse(request).data_dir)
        if room:
            raise CniError(*room)
        ipam.status(request, context)
    elif conf.ipam_type:
        delegate.run("STATUS", request, conf.ipam_type, environment)


def _has_nft(environment: Mapping[str, str]) -> bool:
    folders = environment.get("PATH", os.defpath).split(":")
    return any(os.access(f"{folder}/nft", os.X_OK) for folder in folders)
