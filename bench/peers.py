"""The layouts that kube-proxy 1.36 writes, generated for the same clusters, so that one run shows the ratio.

Source: the chains and rules that reference/service-proxy.md describes in sections 2.1 and 2.3.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

from cluster import cluster_ip, pod_ip


def _hash(*parts: object) -> str:
    return base64.b32encode(hashlib.sha256("".join(map(str, parts)).encode()).digest())[:16].decode()


def _endpoints(number: int, endpoints: int, shift: int) -> list[str]:
    numbers = [number * endpoints + index for index in range(endpoints)]
    if shift:
        numbers[-1] = 4_000_000 + (number * 64 + shift) % 4_000_000
    return [pod_ip(pod) for pod in numbers]


def iptables(services: int, endpoints: int) -> str:
    """Return a full iptables-restore input: a linear KUBE-SERVICES, a chain per Service and one per endpoint."""
    chains: list[str] = []
    rules: list[str] = []
    for number in range(services):
        declared, written = iptables_service(number, endpoints)
        chains += declared
        rules += written
    return _restore(chains, [*_entries(services), *rules])


def iptables_change(services: int, endpoints: int, number: int, shift: int) -> str:
    """Return a partial restore input, as KEP-3453 has it: all of KUBE-SERVICES, and one Service's chains."""
    declared, written = iptables_service(number, endpoints, shift)
    return _restore(declared, [*_entries(services), *written])


def iptables_service(number: int, endpoints: int, shift: int = 0) -> tuple[list[str], list[str]]:
    """Return one Service's chain declarations and rules."""
    chain = f"KUBE-SVC-{_hash(number)}"
    name = f'-m comment --comment "bench/svc-{number}:http"'
    declared = [f":{chain} - [0:0]"]
    rules = [f"-A {chain} {name} -d {cluster_ip(number)} -p tcp --dport 80 ! -s 10.128.0.0/9 -j KUBE-MARK-MASQ"]
    for index, address in enumerate(_endpoints(number, endpoints, shift)):
        endpoint = f"KUBE-SEP-{_hash(number, address)}"
        declared.append(f":{endpoint} - [0:0]")
        left = endpoints - index
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        rules.append(f"-A {chain} {name} {chance}-j {endpoint}")
        rules.append(f"-A {endpoint} {name} -s {address} -j KUBE-MARK-MASQ")
        rules.append(f"-A {endpoint} {name} -p tcp -m tcp -j DNAT --to-destination {address}:8080")
    return declared, rules


def _entries(services: int) -> Iterator[str]:
    for number in range(services):
        comment = f'-m comment --comment "bench/svc-{number}:http cluster IP"'
        yield f"-A KUBE-SERVICES {comment} -d {cluster_ip(number)} -p tcp --dport 80 -j KUBE-SVC-{_hash(number)}"


def _restore(chains: list[str], rules: list[str]) -> str:
    head = ["*nat", ":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]"]
    first = ["-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000"]
    return "\n".join([*head, *chains, *first, *rules, "COMMIT", ""])


def iptables_jumps() -> str:
    return "*nat\n-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\nCOMMIT\n"


def nftables(services: int, endpoints: int) -> str:
    """Return a full nft script: a verdict map of Services, and a chain with an anonymous map for each."""
    lines = [
        "add table ip kube-proxy",
        "add chain ip kube-proxy mark-for-masquerade",
        "add rule ip kube-proxy mark-for-masquerade meta mark set meta mark or 0x4000",
        "add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }",
        "add chain ip kube-proxy services",
        "add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips",
        "add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }",
        "add rule ip kube-proxy nat-output jump services",
        "add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat ; }",
        "add rule ip kube-proxy nat-prerouting jump services",
    ]
    for number in range(services):
        lines += [f"add chain ip kube-proxy {_nft_chain(number)}", *_nft_rules(number, endpoints)]
        element = f"{cluster_ip(number)} . tcp . 80 : goto {_nft_chain(number)}"
        lines.append(f"add element ip kube-proxy service-ips {{ {element} }}")
    return "\n".join([*lines, ""])


def nftables_change(endpoints: int, number: int, shift: int) -> str:
    """Return the script that replaces one Service's chain contents."""
    return "\n".join([f"flush chain ip kube-proxy {_nft_chain(number)}", *_nft_rules(number, endpoints, shift), ""])


def _nft_chain(number: int) -> str:
    return f"service-{_hash(number)[:8]}-bench/svc-{number}/tcp/http"


def _nft_rules(number: int, endpoints: int, shift: int = 0) -> list[str]:
    choice = ", ".join(
        f"{index} : {address} . 8080" for index, address in enumerate(_endpoints(number, endpoints, shift))
    )
    head = f"add rule ip kube-proxy {_nft_chain(number)}"
    return [
        f"{head} ip daddr {cluster_ip(number)} tcp dport 80 ip saddr != 10.128.0.0/9 jump mark-for-masquerade",
        f"{head} meta l4proto tcp dnat ip to numgen random mod {endpoints} map {{ {choice} }}",
    ]
