"""What makes this machine forward its pods' packets: sysctls, and a way past a FORWARD policy of DROP.

Each change is logged with what was there before. Nothing is set back at the end: others may have come to rely on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from pynet.daemon import logs
from pynet.kernel import sysctl

log = logs.get(__name__)


def sysctls(families: Iterable[int], loose: Iterable[str], links: Iterable[str]) -> list[str]:
    """Set what forwarding needs; return what cannot be set, in words.

    `loose`: links on which packets may come in that would leave by another one (one node sees the other on link, which
    sees it behind a router). `links`: those to the outside.
    """
    complaints: list[str] = []
    for family in sorted(set(families)):
        if family == 4:
            _set("net/ipv4/ip_forward", "1", complaints)
        elif sysctl.read("net/ipv6/conf/all/forwarding") == "0":
            # a router takes no router advertisements unless told to: the default route would run out
            for name in links:
                if sysctl.read(f"net/ipv6/conf/{name}/accept_ra") == "1":
                    _set(f"net/ipv6/conf/{name}/accept_ra", "2", complaints)
            _set("net/ipv6/conf/all/forwarding", "1", complaints)
        bridged = f"net/bridge/bridge-nf-call-ip{'6' if family == 6 else ''}tables"
        if sysctl.read(bridged) == "0":
            # else the answer to a Service of a pod on the same bridge never meets the translation that it needs
            _set(bridged, "1", complaints)
    for name in loose:
        every = sysctl.read("net/ipv4/conf/all/rp_filter") or "0"
        own = sysctl.read(f"net/ipv4/conf/{name}/rp_filter")
        if own is not None and max(every, own) == "1":  # the greater of the two is in force
            _set(f"net/ipv4/conf/{name}/rp_filter", "2", complaints)
    return complaints


def _set(name: str, value: str, complaints: list[str]) -> None:
    before = sysctl.read(name)
    if before is None:
        complaints.append(f"sysctl {name.replace('/', '.')} does not exist")
        return
    try:
        if sysctl.write(name, value):
            log.info("sysctl changed", extra=logs.fields(name=name.replace("/", "."), was=before, now=value))
    except sysctl.SysctlError as error:
        complaints.append(str(error))
