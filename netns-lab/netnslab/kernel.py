"""Whether this machine can carry a lab: root, programs, kernel features; asked in a scratch namespace, left clean."""

from __future__ import annotations

import os
import shutil

from . import machine
from .state import Folder, LabError

UNABLE = 77  # exit status: not here
LOADING = 300.0  # seconds that the kernel may take to load its modules; an emulated machine needs a minute

# What a lab needs: a name for it, the programs, and shell commands that fail where the kernel lacks it.
Feature = tuple[str, tuple[str, ...], str]
IPV6: Feature = ("IPv6 (CONFIG_IPV6)", ("ip",), "ip -6 address add fd00::1/64 dev v0")
BASE: tuple[Feature, ...] = (
    ("veth links (CONFIG_VETH)", ("ip",), "ip link add v0 type veth peer name v1"),
    ("bridges (CONFIG_BRIDGE)", ("ip",), "ip link add b0 type bridge && ip link set v0 master b0"),
)
IPTABLES = "-j DNAT --to-destination 127.0.0.1:1"
MATCHES = (
    ("NAT in iptables (CONFIG_IP_NF_NAT, xt_nat)", "-p tcp " + IPTABLES),
    ("the statistic match (xt_statistic)", "-p tcp -m statistic --mode random --probability 0.5 " + IPTABLES),
    ("the comment match (xt_comment)", "-m comment --comment x"),
    ("the addrtype match (xt_addrtype)", "-m addrtype --dst-type LOCAL"),
    ("marks (xt_mark)", "-j MARK --or-mark 0x4000"),
    ("masquerading (xt_MASQUERADE)", None),
)
NFT = (
    "table ip probe { map m { type inet_service : verdict; }; chain c { type nat hook prerouting priority -100;"
    " tcp dport vmap @m; tcp dport 1 dnat to 127.0.0.1:1; };"
    " chain p { type nat hook postrouting priority 100; masquerade; }; }"
)
MODES = ("iptables", "nftables", "ipvs", "userspace")


def _iptables_features(program: str) -> tuple[Feature, ...]:
    found = []
    for name, rule in MATCHES:
        place = "POSTROUTING -j MASQUERADE" if rule is None else f"PREROUTING {rule}"
        found.append((name, (program,), f"{program} -w 5 -t nat -A {place}"))
    return tuple(found)


def features(mode: str, iptables_backend: str = "", ipv6: bool = False) -> tuple[Feature, ...]:
    """Return what a lab of a mode needs, in the order to ask for it."""
    base = (*BASE, *((IPV6,) if ipv6 else ()))
    program = f"iptables-{iptables_backend}" if iptables_backend else "iptables"
    nft = ("NAT and maps in nftables (CONFIG_NFT_NAT, CONFIG_NFT_MASQ)", ("nft",), f"nft '{NFT}'")
    dummy = ("dummy links (CONFIG_DUMMY)", ("ip",), "ip link add d0 type dummy")
    ipvs = ("IPVS (CONFIG_IP_VS)", (), "test -e /proc/net/ip_vs || modprobe ip_vs && test -e /proc/net/ip_vs")
    ipset = ("ipsets (CONFIG_IP_SET)", ("ipset",), "ipset create probe hash:ip")
    return {
        "iptables": (*base, *_iptables_features(program)),
        "nftables": (*base, nft),
        "ipvs": (*base, *_iptables_features(program), ipvs, dummy, ipset),
        "userspace": (*base, *_iptables_features(program)),
    }[mode]


class Unable(LabError):
    """This machine cannot carry the lab: the message names what is missing."""


def demand_root() -> None:
    """Raise `Unable` unless run by root."""
    if os.geteuid():
        raise Unable("needs root: it makes network namespaces and links (run it with sudo)")


def demand_features(folder: Folder, mode: str, iptables_backend: str = "", ipv6: bool = False) -> None:
    """Raise `Unable` with the name of the first feature that the kernel lacks."""
    wanted = features(mode, iptables_backend, ipv6)
    for name, programs, _ in wanted:
        for program in programs:
            if not shutil.which(program):
                raise Unable(f"{name}: the program {program} is not installed (make setup installs it)")
    scratch = folder.netns("probe")
    try:
        machine.run(["ip", "netns", "add", scratch], env=machine.marked(folder.name))
    except LabError as error:
        raise Unable(f"network namespaces cannot be made (CONFIG_NET_NS, CAP_SYS_ADMIN): {error.output}") from None
    try:
        script = "\n".join(
            f'said=$( {{ {command}; }} 2>&1 ) || {{ echo {index}; echo "$said"; exit 1; }}'
            for index, (_, _, command) in enumerate(wanted)
        )
        command = machine.inside(scratch, "sh", "-c", script)
        environment = machine.marked(folder.name, lock_file(folder))
        done = machine.run(command, check=False, env=environment, timeout=LOADING)
    finally:
        machine.delete_namespace(scratch)
    if done.returncode:
        index, _, reason = done.stdout.partition("\n")
        name = wanted[int(index)][0] if index.isdigit() else "a feature"
        reason = " ".join((reason + done.stderr).split())
        instead = "" if mode == "iptables" else " (--mode iptables needs less)"
        raise Unable(f"this kernel lacks {name}, which --mode {mode} needs{instead}: {reason}")


def lock_file(folder: Folder) -> dict[str, str]:
    """Return the setting that keeps iptables from waiting for other machines' rules: each lab machine has its lock."""
    return {"XTABLES_LOCKFILE": str(folder.path / "xtables.lock")}
