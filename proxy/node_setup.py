"""What the proxy sets on the node at its start: connection tracking's limits and timeouts, its own standing.

What this network namespace may not set (limits that belong to the whole machine) is left alone, with a word in the log.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from proxy.config import Conntrack, Settings
from pynet.daemon import logs
from pynet.kernel import sysctl

log = logs.get(__name__)
_PER_CORE_LIMIT = 1_048_576
_HASHSIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
_PREFIX = "net/netfilter/nf_conntrack_"


def tracked_limit(settings: Conntrack, cpus: int) -> int:
    """Return how many connections are to be tracked; 0: as it is."""
    if settings.max_per_core <= 0:
        return 0
    return max(min(settings.max_per_core * cpus, _PER_CORE_LIMIT), settings.min)


def sysctls_for(settings: Conntrack) -> dict[str, str]:
    """Return the sysctls of this network namespace that the settings ask for."""
    wanted = {
        "tcp_timeout_established": settings.tcp_established_seconds,
        "tcp_timeout_close_wait": settings.tcp_close_wait_seconds,
        "udp_timeout": settings.udp_seconds,
        "udp_timeout_stream": settings.udp_stream_seconds,
    }
    found = {_PREFIX + name: str(int(seconds)) for name, seconds in wanted.items() if seconds}
    if settings.tcp_be_liberal:
        found[_PREFIX + "tcp_be_liberal"] = "1"
    return found


def prepare(settings: Settings) -> None:
    """Set all of it."""
    for name, value in sysctls_for(settings.conntrack).items():
        _set(name, value)
    if _is_first_namespace():
        _raise_limit(tracked_limit(settings.conntrack, os.cpu_count() or 1))
    if settings.oom_score_adj is not None:
        try:
            Path("/proc/self/oom_score_adj").write_text(str(settings.oom_score_adj))
        except OSError as error:
            log.debug("oom_score_adj stays", extra=logs.fields(reason=error.strerror))


def _raise_limit(limit: int) -> None:
    current = sysctl.read("net/netfilter/nf_conntrack_max")
    if not limit or current is None or int(current) >= limit:
        return
    _set("net/netfilter/nf_conntrack_max", str(limit))
    try:
        if int(_HASHSIZE.read_text()) < limit // 4:
            _HASHSIZE.write_text(str(limit // 4))
    except OSError as error:
        log.info("conntrack's hash table keeps its size", extra=logs.fields(reason=error.strerror))


def _is_first_namespace() -> bool:
    """Whether this is the machine's own network namespace: limits of the whole machine are set from there only.

    The kernel itself says so (nf_conntrack_standalone.c: elsewhere the file is read-only); process 1 would not, as in
    a container it is the container's own.
    """
    try:
        return bool(os.stat("/proc/sys/net/netfilter/nf_conntrack_max").st_mode & stat.S_IWUSR)
    except OSError:
        return False


def _set(name: str, value: str) -> None:
    if sysctl.read(name) is None:
        return
    try:
        if sysctl.write(name, value):
            log.info("sysctl set", extra=logs.fields(name=name.replace("/", "."), value=value))
    except sysctl.SysctlError as error:
        log.info("sysctl stays as it is", extra=logs.fields(reason=error))
