"""Masquerade of what leaves a pod's network: one map element an address, one chain a network. Pure but for iptables."""

from __future__ import annotations

import hashlib
import ipaddress

from cni.ruleset import HERE

MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}


def chain_name(subnet: str, exceptions: tuple[str, ...]) -> str:
    """Return the name of the chain for pods of one subnet with these exceptions."""
    text = "\n".join((subnet, *sorted(exceptions)))
    return "network-" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def chain(subnet: str, exceptions: tuple[str, ...]) -> str:
    """Return the chain: the pod's own subnet, multicast, the cluster's sets and the exceptions stay as they are."""
    family = ipaddress.ip_network(subnet).version
    ip = "ip" if family == 4 else "ip6"
    name = chain_name(subnet, exceptions)
    spared = [subnet, MULTICAST[family]]
    spared += [cidr for cidr in sorted(exceptions) if ipaddress.ip_network(cidr).version == family]
    lines = [f"{ip} daddr {cidr} return" for cidr in spared]
    lines += [f"{ip} daddr @cluster{family} return", "masquerade"]
    return "".join(
        (
            f"add chain {HERE} {name}\n",
            f"flush chain {HERE} {name}\n",
            *(f"add rule {HERE} {name} {line}\n" for line in lines),
        )
    )


def element(address: str, subnet: str, exceptions: tuple[str, ...], tag: str) -> str:
    """Return the map element of one pod address."""
    family = ipaddress.ip_address(address).version
    return f'masquerade{family} {{ {address} comment "{tag}" : goto {chain_name(subnet, exceptions)} }}'


def key(address: str) -> str:
    """Return the element's map and key, as removal names it."""
    return f"masquerade{ipaddress.ip_address(address).version} {{ {address} }}"
