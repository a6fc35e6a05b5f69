"""The modes by name, each imported only when it is asked for: a mode's libraries and kernel needs are its own."""

from __future__ import annotations

from collections.abc import Callable

from proxy.config import Settings
from proxy.modes import Mode

Factory = Callable[[Settings], Mode]


def _iptables(settings: Settings) -> Mode:
    from proxy.modes.iptables.mode import IptablesMode

    backend = settings.iptables_backend
    return IptablesMode(
        "legacy" if backend == "legacy" else "nft" if backend == "nft" else None,
        drop_invalid=not settings.conntrack.tcp_be_liberal,
    )


def _nftables(settings: Settings) -> Mode:  # noqa: ARG001
    from proxy.modes.nftables.mode import Nftables

    return Nftables()


def _ipvs(settings: Settings) -> Mode:
    from proxy.modes.ipvs.choice import ipvs_mode

    return ipvs_mode(settings)


def _userspace(settings: Settings) -> Mode:
    from proxy.modes.userspace.mode import Options, UserspaceMode

    own = settings.userspace
    return UserspaceMode(Options(own.listen_only, own.udp_idle_seconds, own.max_connections))


MODES: dict[str, Factory] = {"iptables": _iptables, "nftables": _nftables, "ipvs": _ipvs, "userspace": _userspace}


def made(settings: Settings, name: str | None = None) -> Mode:
    """Return the mode of that name (default: the one in `settings`). Raise `ApplyError` where it cannot be.

    Without a name the mode may be another than the one asked for, where the kernel has no IPVS, and may serve node
    ports on loopback addresses besides.
    """
    if name is not None:
        return MODES[name](settings)
    if settings.mode == "ipvs":
        from proxy.modes.ipvs.choice import chosen

        mode = chosen(settings, MODES["iptables"])
    else:
        mode = MODES[settings.mode](settings)
    if settings.userspace.localhost and settings.mode != "userspace":
        from proxy.modes.userspace.localhost import WithLocalhost

        return WithLocalhost(mode, settings.userspace.udp_idle_seconds)
    return mode
