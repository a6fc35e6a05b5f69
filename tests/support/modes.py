"""The proxy's kernel modes by the names that tests are parametrised with."""

from __future__ import annotations

from proxy.modes import Mode

KERNEL_MODES = ("iptables-legacy", "iptables-nft", "nftables")


def made(name: str) -> Mode:
    """Return a mode, to be used inside the node's namespace."""
    if name == "nftables":
        from proxy.modes.nftables.mode import Nftables

        return Nftables()
    from proxy.modes.iptables.mode import IptablesMode

    return IptablesMode("legacy" if name == "iptables-legacy" else "nft")
