"""Bandwidth limits of a pod: a token bucket on the host's end towards it, another on an ifb for what it sends."""

from __future__ import annotations

import errno

from cni import naming
from cni.netconf import Bandwidth
from cni.spec import FAILED, CniError
from pynet.kernel import netlink, rtnl, tc

LEAST_BURST = 16 * 1024 * 8
"""In bits: without a burst given, a bucket of 16 KiB, or of what flows in 10 ms if that is more."""


def with_bursts(limits: Bandwidth) -> Bandwidth:
    """Return the limits with a burst for every rate that has none. Pure."""

    def burst(rate: int, given: int) -> int:
        return given or (max(rate // 100, LEAST_BURST) if rate else 0)

    return limits._replace(
        ingress_burst=burst(limits.ingress_rate, limits.ingress_burst),
        egress_burst=burst(limits.egress_rate, limits.egress_burst),
    )


def shape(host: netlink.Socket, veth: rtnl.Link, ifb_name: str, alias: str, limits: Bandwidth) -> rtnl.Link | None:
    """Apply limits; return the ifb where one is needed. Raise `NetlinkError`, `CniError`."""
    wanted = with_bursts(limits)
    if wanted.ingress_rate:
        tc.set_bucket(host, veth.ifindex, tc.bucket(wanted.ingress_rate, wanted.ingress_burst))
    if not wanted.egress_rate:
        return None
    stale = rtnl.link_named(host, ifb_name)
    if stale is not None:
        rtnl.delete_link(host, stale.ifindex)
    try:
        rtnl.add_link(host, ifb_name, "ifb", alias=alias, mtu=veth.mtu, mac=naming.mac(ifb_name))
    except netlink.NetlinkError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise CniError(FAILED, "bandwidth: this kernel has no ifb devices (CONFIG_IFB)") from None
        raise
    ifb = rtnl.link_named(host, ifb_name)
    if ifb is None:
        raise CniError(FAILED, f"bandwidth: {ifb_name} vanished while it was set up")
    tc.set_bucket(host, ifb.ifindex, tc.bucket(wanted.egress_rate, wanted.egress_burst))
    tc.redirect_ingress(host, veth.ifindex, ifb.ifindex)
    return ifb


def difference(host: netlink.Socket, veth: rtnl.Link, ifb_name: str, limits: Bandwidth) -> str:
    """Return what is missing or changed of the limits, nothing when all is there."""
    wanted = with_bursts(limits)
    if wanted.ingress_rate:
        wrong = _unlike(host, veth, tc.bucket(wanted.ingress_rate, wanted.ingress_burst))
        if wrong:
            return wrong
    if not wanted.egress_rate:
        return ""
    ifb = rtnl.link_named(host, ifb_name)
    if ifb is None:
        return f"shaping: intermediate device {ifb_name} is missing"
    if not ifb.up:
        return f"shaping: intermediate device {ifb_name} is down"
    if not tc.redirects(host, veth.ifindex):
        return f"shaping: {veth.name} does not redirect to {ifb_name}"
    return _unlike(host, ifb, tc.bucket(wanted.egress_rate, wanted.egress_burst))


def _unlike(host: netlink.Socket, link: rtnl.Link, want: tc.Bucket) -> str:
    """Return in what a link's bucket is not the wanted one; the kernel rounds to its ticks."""
    found = tc.buckets(host, link.ifindex)
    if not found:
        return f"shaping: {link.name} has no bucket of {want.rate * 8} bit/s"
    if abs(found[0].rate - want.rate) > max(1, want.rate // 1000):
        return f"shaping: rate of {link.name} is {found[0].rate * 8} bit/s, expected {want.rate * 8}"
    if want.burst <= tc.deepest(want.rate) and abs(found[0].burst - want.burst) > max(64, 2 * tc.grain(want.rate)):
        return f"shaping: burst of {link.name} is {found[0].burst * 8} bits, expected {want.burst * 8}"
    return ""
