"""ipMasqBackend iptables: applies what `masquerade` renders, through the back end that the host uses."""

from __future__ import annotations

import ipaddress

from cni import masquerade
from pynet.kernel.iptables import Backend, IptablesError, Tool, Version, backend_of_host


def apply(networks: list[tuple[str, str]], exceptions: tuple[str, ...], tag: str) -> None:
    """Masquerade the pod addresses given as (address, subnet): one restore for each family. Raise `IptablesError`."""
    backend = backend_of_host()
    for version, mine in _by_version(networks).items():
        tool = Tool(backend, version)
        # the same chain twice in one file would be emptied twice; one file an address is as good, and rare
        for address, subnet in mine:
            tool.restore(masquerade.iptables_rules(address, subnet, exceptions, tag))


def remove(tag: str) -> None:
    """Remove the jumps with this tag, whichever back end and family they are in."""
    for tool, saved in _saved():
        script = masquerade.iptables_removal(saved, tag)
        if script:
            tool.restore(script)


def remove_strays(network: str, spared: set[str]) -> None:
    """Remove the jumps of a network's attachments whose tags are not spared."""
    for tag in {tag for _, saved in _saved() for tag in masquerade.iptables_tags(saved, network)} - spared:
        remove(tag)


def missing(networks: list[tuple[str, str]], exceptions: tuple[str, ...], tag: str) -> str:
    """Return the first pod address that is not masqueraded, nothing when all are."""
    for version, mine in _by_version(networks).items():
        texts = [saved for tool, saved in _saved() if tool.version == version]
        for address, subnet in mine:
            if not any(masquerade.iptables_has(saved, address, subnet, exceptions, tag) for saved in texts):
                return address
    return ""


def _saved() -> list[tuple[Tool, str]]:
    """Return the nat tables of both back ends and families, as far as the programs are there."""
    found = []
    backends: tuple[Backend, ...] = ("legacy", "nft")
    versions: tuple[Version, ...] = (4, 6)
    for backend in backends:
        for version in versions:
            tool = Tool(backend, version)
            try:
                found.append((tool, tool.save("nat")))
            except IptablesError:
                continue
    return found


def _by_version(networks: list[tuple[str, str]]) -> dict[Version, list[tuple[str, str]]]:
    found: dict[Version, list[tuple[str, str]]] = {}
    for address, subnet in networks:
        version: Version = 6 if ipaddress.ip_address(address).version == 6 else 4
        found.setdefault(version, []).append((address, subnet))
    return found
