"""Masquerade of what leaves a pod's network: one element an address and one chain a network, as text. Pure."""

from __future__ import annotations

import ipaddress
import re
from _blake2 import blake2b  # hashlib would load all of OpenSSL

from cni.ruleset import HERE

MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}


def chain_name(subnet: str, exceptions: tuple[str, ...]) -> str:
    """Return the name of the chain for pods of one subnet with these exceptions."""
    text = "\n".join((subnet, *sorted(exceptions)))
    return "network-" + blake2b(text.encode(), digest_size=6).hexdigest()


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
    return f'{HERE} masquerade{family} {{ {address} comment "{tag}" : goto {chain_name(subnet, exceptions)} }}'


def key(address: str) -> str:
    """Return the element's map and key, as removal names it."""
    return f"{HERE} masquerade{ipaddress.ip_address(address).version} {{ {address} }}"


# --- the same for ipMasqBackend iptables


def iptables_rules(address: str, subnet: str, exceptions: tuple[str, ...], tag: str) -> str:
    """Return the rule file for one pod address: the network's chain written anew, and a jump to it."""
    family = ipaddress.ip_network(subnet).version
    name = iptables_chain(subnet, exceptions)
    spared = [subnet, MULTICAST[family]]
    spared += [cidr for cidr in sorted(exceptions) if ipaddress.ip_network(cidr).version == family]
    lines = ["*nat", f":{name} - [0:0]", *(f"-A {name} -d {cidr} -j RETURN" for cidr in spared)]
    lines += [f"-A {name} -j MASQUERADE", f"-A POSTROUTING {_jump(address, tag)} -j {name}", "COMMIT"]
    return "\n".join(lines) + "\n"


def iptables_chain(subnet: str, exceptions: tuple[str, ...]) -> str:
    """Return the chain's name: at most 28 characters, in upper case as iptables users expect."""
    return "PYNET-CNI-" + chain_name(subnet, exceptions).removeprefix("network-").upper()


def iptables_removal(saved: str, tag: str) -> str:
    """Return the rule file that removes the jumps with this tag from a saved nat table, and chains left unused."""
    lines = saved.splitlines()
    jumps = [line for line in lines if line.startswith("-A POSTROUTING ") and _is_tagged(line, tag)]
    if not jumps:
        return ""
    rest = [line for line in lines if line.startswith("-A ") and line not in jumps]
    used = {line.rpartition(" -j ")[2] for line in rest}
    unused = sorted({line.rpartition(" -j ")[2] for line in jumps} - used)
    script = ["*nat", *(f"-D{line[2:]}" for line in jumps)]
    script += [f"-F {name}" for name in unused] + [f"-X {name}" for name in unused]
    return "\n".join([*script, "COMMIT", ""])


def iptables_tags(saved: str, network: str) -> set[str]:
    """Return the tags of a network's attachments in a saved nat table."""
    tag = re.compile(rf'-A POSTROUTING .*--comment "({re.escape(network)} \S+)" -j PYNET-CNI-')
    return {found[1] for line in saved.splitlines() if (found := tag.match(line))}


def iptables_has(saved: str, address: str, subnet: str, exceptions: tuple[str, ...], tag: str) -> bool:
    """Say whether a saved nat table holds the jump of one pod address and its network's chain with its MASQUERADE."""
    name = iptables_chain(subnet, exceptions)
    lines = saved.splitlines()
    return f"-A {name} -j MASQUERADE" in lines and any(
        line.startswith(f"-A POSTROUTING -s {address}/") and _is_tagged(line, tag) for line in lines
    )


def _jump(address: str, tag: str) -> str:
    return f'-s {address} -m comment --comment "{tag}"'


def _is_tagged(line: str, tag: str) -> bool:
    return f'--comment "{tag}"' in line or f"--comment {tag} " in line
