"""Whether this kernel can do the IPVS mode; if not, what it lacks, how to get it, and which mode there is instead."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable

from proxy.config import Settings
from proxy.modes import ApplyError, Mode
from proxy.modes.ipvs.mode import IpvsMode, Options
from pynet.daemon import logs
from pynet.ipvs import SCHEDULERS, Timeouts
from pynet.kernel import netlink, rtnl
from pynet.kernel.ipvs import Ipvs, IpvsMissing
from pynet.kernel.netlink import NetlinkError

log = logs.get(__name__)
FALLBACKS = ("iptables", "none")
_PROBE_LINK = "pynet-probe"


def ipvs_mode(settings: Settings) -> IpvsMode:
    """Return the IPVS mode for `settings`; asks nothing of the kernel yet."""
    own = settings.ipvs
    timeouts = Timeouts(*(round(seconds) for seconds in (own.tcp_seconds, own.tcp_fin_seconds, own.udp_seconds)))
    return IpvsMode(
        Options(own.scheduler or "rr", own.exclude_cidrs, own.strict_arp, timeouts, own.drain_seconds),
        backend="legacy" if settings.iptables_backend == "legacy" else "nft" if settings.iptables_backend else None,
    )


def chosen(settings: Settings, instead: Callable[[Settings], Mode]) -> Mode:
    """Return the IPVS mode, or where the kernel cannot do it the mode that `--ipvs-fallback` names.

    Raise `ApplyError`: for a scheduler that is none, and where no other mode may be taken.
    """
    own = settings.ipvs
    if own.fallback not in FALLBACKS:
        raise ApplyError(f"--ipvs-fallback: expected {' or '.join(FALLBACKS)}, found {own.fallback!r}")
    if own.scheduler and own.scheduler not in SCHEDULERS:
        raise ApplyError(f"--ipvs-scheduler: expected one of {', '.join(SCHEDULERS)}, found {own.scheduler!r}")
    lacking = missing_modules()
    if not lacking:
        mode = ipvs_mode(settings)
        try:
            if mode.lacking([own.scheduler or "rr"]):
                lacking = [f"ip_vs_{own.scheduler or 'rr'}"]
        except (NetlinkError, IpvsMissing) as error:
            raise ApplyError(f"--mode=ipvs: {error}") from error
        if not lacking:
            return mode
    advice = (
        f"load it: modprobe {' '.join(lacking)}; if there is no such module, install the distribution's full kernel"
    )
    if own.fallback == "none":
        raise ApplyError(f"--mode=ipvs: this kernel lacks {', '.join(lacking)}; {advice}")
    log.warning(
        "this kernel cannot do IPVS: going on in iptables mode (--ipvs-fallback)",
        extra=logs.fields(missing=",".join(lacking), advice=advice),
    )
    return instead(settings)


def missing_modules() -> list[str]:
    """Return the modules that this kernel has not and cannot load, of those that the mode cannot do without."""
    found = []
    try:
        _loaded("ip_vs")
        Ipvs().close()
    except (IpvsMissing, NetlinkError):
        found.append("ip_vs")
    if not _can_make_dummy():
        found.append("dummy")
    return found


def _loaded(module: str) -> None:
    """Try to load a module; a kernel that has it built in, or not at all, shows elsewhere."""
    try:
        subprocess.run(["modprobe", "-q", module], capture_output=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        log.debug("modprobe cannot be run", extra=logs.fields(error=error))


def _can_make_dummy() -> bool:
    _loaded("dummy")
    with netlink.Socket() as socket:
        try:
            rtnl.add_link(socket, _PROBE_LINK, "dummy", up=False)
        except NetlinkError as error:
            return error.errno == errno.EEXIST
        link = rtnl.link_named(socket, _PROBE_LINK)
        if link is not None:
            rtnl.delete_link(socket, link.ifindex)
    return True
