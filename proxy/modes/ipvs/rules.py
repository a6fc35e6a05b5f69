"""The constant iptables rules of the IPVS mode, spelled as iptables-save spells them. Pure.

They do what IPVS cannot, by looking into the ipsets: drop by origin and source range and set the firewall mark (mangle,
before IPVS takes a packet), refuse what no endpoint serves (filter), masquerade (nat). Their number does not depend on
any Service. A packet for a virtual server meets: mangle PREROUTING, nat PREROUTING, filter INPUT, IPVS, filter OUTPUT
with the endpoint's address, nat POSTROUTING; one made by the node: mangle OUTPUT, nat OUTPUT, IPVS.
"""

from __future__ import annotations

from collections.abc import Iterable

from proxy.modes import unallocated
from proxy.modes.hairpin import SAME_ADDRESS
from proxy.modes.ipvs.layout import set_name, split_bit
from proxy.plan import Family, LocalDetector, LocalKind, NodeSettings

Chains = dict[str, list[str]]
PREFIX = "PYNET-IPVS-"
# table, built-in chain, ours: each jump is the first rule of its built-in chain
JUMPS = (
    ("mangle", "PREROUTING", "PYNET-IPVS-POLICY"),
    ("mangle", "OUTPUT", "PYNET-IPVS-POLICY"),
    ("nat", "PREROUTING", "PYNET-IPVS-MARK"),
    ("nat", "OUTPUT", "PYNET-IPVS-MARK"),
    ("nat", "POSTROUTING", "PYNET-IPVS-POST"),
    ("filter", "INPUT", "PYNET-IPVS-INPUT"),
    ("filter", "OUTPUT", "PYNET-IPVS-OUTPUT"),
    ("filter", "FORWARD", "PYNET-IPVS-FORWARD"),
)
TABLES = ("mangle", "nat", "filter")
_NEW = "-m conntrack --ctstate NEW "


def chains(family: Family, settings: NodeSettings) -> dict[str, Chains]:
    """Return our chains by table."""
    return {
        "mangle": _policy(family, settings),
        "nat": _marks(family, settings),
        "filter": _filter(family, settings),
    }


def render(table: str, wanted: Chains, gone: Iterable[str] = (), commands: Iterable[str] = ()) -> str:
    """Return the rule file that gives `wanted` their rules, runs `commands` and removes the chains `gone`."""
    gone = list(gone)
    lines = [f"*{table}"]
    lines += (f":{name} - [0:0]" for name in (*wanted, *gone))
    lines += (f"-A {name} {rule}" for name, rules in wanted.items() for rule in rules)
    lines += commands
    lines += (f"-X {name}" for name in gone)
    return "\n".join([*lines, "COMMIT", ""])


def parsed(saved: str) -> tuple[Chains, set[tuple[str, str]]]:
    """Return our chains in a saved table, and (built-in chain, ours) of each jump to one of them."""
    found: Chains = {}
    jumps = set()
    for line in saved.splitlines():
        if line.startswith(f":{PREFIX}"):
            found[line[1:].split(" ", 1)[0]] = []
        elif line.startswith("-A "):
            _, name, rule = line.split(" ", 2)
            if name in found:
                found[name].append(rule)
            elif rule.startswith(f"-j {PREFIX}"):
                jumps.add((name, rule[3:]))
    return found, jumps


def _policy(family: Family, settings: NodeSettings) -> Chains:
    ranged = f"{_NEW}{_match(family, 'RANGED')} -m set ! --match-set {set_name(family, 'RANGES')} dst,dst,src -j DROP"
    split = f"-j SET --map-set {set_name(family, 'SPLIT')} dst,dst --map-mark"
    found = {
        "PYNET-IPVS-POLICY": [
            f"-m set ! --match-set {set_name(family, 'SERVERS')} dst,dst -j RETURN",
            ranged,
            *_branches(settings, "PYNET-IPVS-PP", "PYNET-IPVS-PN"),
            f"{_NEW}{_match(family, 'DROP-OUT')} -j DROP",
        ],
        "PYNET-IPVS-PN": [f"{_NEW}{_match(family, 'DROP-NODE')} -j DROP", split],
    }
    if _pods(settings.detector):
        found["PYNET-IPVS-PP"] = [f"{_NEW}{_match(family, 'DROP-POD')} -j DROP", split]
    return found


def _marks(family: Family, settings: NodeSettings) -> Chains:
    mark, split = settings.masquerade_mark, split_bit(settings)

    def masqueraded(suffix: str) -> str:
        return f"{_match(family, suffix)} -j MARK --set-xmark {mark:#x}/{mark:#x}"

    found = {
        "PYNET-IPVS-MARK": [
            *_branches(settings, "PYNET-IPVS-MP", "PYNET-IPVS-MN"),
            masqueraded("MASQ-OUT"),
        ],
        "PYNET-IPVS-MN": [masqueraded("MASQ-NODE")],
        "PYNET-IPVS-POST": [
            "-o lo -j RETURN",
            f'-m bpf --bytecode "{SAME_ADDRESS[family]}" -j MASQUERADE --random-fully',
            # the node itself, whose source would be the Service's address or any other of its own
            f"-m set --match-set {set_name(family, 'IPS')} src -j MASQUERADE --random-fully",
            f"-m mark --mark {split:#x}/{split:#x} -m addrtype --src-type LOCAL -j MASQUERADE --random-fully",
            f"-m mark ! --mark {mark:#x}/{mark:#x} -j RETURN",
            f"-j MARK --set-xmark 0x0/{mark:#x}",
            "-j MASQUERADE --random-fully",
        ],
    }
    if _pods(settings.detector):
        found["PYNET-IPVS-MP"] = [masqueraded("MASQ-POD")]
    return found


def _filter(family: Family, settings: NodeSettings) -> Chains:
    icmp = "icmp6-port-unreachable" if family is Family.V6 else "icmp-port-unreachable"
    servers = set_name(family, "SERVERS")
    refused = [
        f"{_NEW}{_match(family, 'REJECT')} -j PYNET-IPVS-REFUSE",
        # every address of ours is the node's own, but no program of the node is to be reached there
        f"{_NEW}-m set --match-set {set_name(family, 'IPS')} dst -m set ! --match-set {servers} dst,dst "
        "-j PYNET-IPVS-REFUSE",
    ]
    dropped = unallocated.jumps(settings, "PYNET-IPVS-UNALLOCATED")
    return {
        "PYNET-IPVS-UNALLOCATED": [unallocated.DROP],
        "PYNET-IPVS-INPUT": [*refused, f"-m set --match-set {servers} dst,dst -j ACCEPT"],
        "PYNET-IPVS-OUTPUT": [*refused, *dropped],
        "PYNET-IPVS-FORWARD": ["-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", *dropped],
        "PYNET-IPVS-REFUSE": [
            "-p tcp -j REJECT --reject-with tcp-reset",
            f"-p udp -j REJECT --reject-with {icmp}",
            f"-p sctp -j REJECT --reject-with {icmp}",
        ],
    }


def _match(family: Family, suffix: str) -> str:
    return f"-m set --match-set {set_name(family, suffix)} dst,dst"


def _branches(settings: NodeSettings, pod: str, node: str) -> list[str]:
    """Return the rules that send pods' and the node's packets elsewhere for good; the others go on."""
    return [
        *(f"{match} -g {pod}" for match in _pods(settings.detector)),
        f"-m addrtype --src-type LOCAL -g {node}",
    ]


def _pods(detector: LocalDetector) -> list[str]:
    """Return matches, any of which says that the source is a pod."""
    if detector.kind is LocalKind.CIDR:
        return [f"-s {network}" for network in detector.cidrs]
    if detector.kind is LocalKind.BRIDGE:
        return [f"-i {detector.interface}"]
    if detector.kind is LocalKind.PREFIX:
        return [f"-i {detector.interface}+"]
    return []
