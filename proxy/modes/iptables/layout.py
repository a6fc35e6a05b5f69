"""A `Plan` in iptables' words: chains and their rules, spelled as iptables-save spells them. Pure.

nat decides once a connection: PYNET-SERVICES sets the masquerade mark by origin, the tree of `dispatch` leads to a
Service port's own chain, whose rules are the DNAT rules themselves. What is refused or dropped is marked there as well
(a connection that is never confirmed meets nat with each packet), and constant rules of filter act on the mark. So a
change of endpoints rewrites one chain, and nothing grows with the Services but the tree and one chain each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from proxy.modes import unallocated
from proxy.modes.hairpin import SAME_ADDRESS
from proxy.modes.iptables import dispatch
from proxy.modes.iptables.balance import balance, digest_of
from proxy.modes.iptables.dispatch import Chains, Directory, Entry
from proxy.plan import (
    Action,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    LocalKind,
    NodeSettings,
    Origin,
    Plan,
    Verdict,
    VirtualServer,
    inside,
)

PREFIX = "PYNET-"
# table, built-in chain, ours: each jump is the first rule of its built-in chain
JUMPS = (
    ("nat", "PREROUTING", "PYNET-SERVICES"),
    ("nat", "OUTPUT", "PYNET-SERVICES"),
    ("nat", "POSTROUTING", "PYNET-POSTROUTING"),
    ("filter", "INPUT", "PYNET-INPUT"),
    ("filter", "FORWARD", "PYNET-FORWARD"),
    ("filter", "OUTPUT", "PYNET-OUTPUT"),
)
# what is counted, by the metric's name: table, chain, and what tells the rule there
COUNTING = {
    "iptables_ct_state_invalid_dropped_packets": ("filter", "PYNET-FORWARD", "--ctstate INVALID"),
    "iptables_localhost_nodeports_accepted_packets": ("nat", "PYNET-POSTROUTING", "--ctorigdst 127.0.0.0/8"),
}
_LOOPBACK = {Family.V4: "127.0.0.0/8", Family.V6: "::1/128"}
_UNSAFE = re.compile(r"[^A-Za-z0-9_./: -]")


def refuse_mark(settings: NodeSettings) -> int:
    """Return the bit that says "refused", beside the masquerade bit; both together say "dropped"."""
    mark = settings.masquerade_mark
    return mark << 1 if mark < 1 << 31 else mark >> 1


def chain_for(server: VirtualServer, action: Action) -> str:
    """Return the chain that does `action` for a Service port."""
    if action is Action.DROP:
        return "PYNET-DROP"
    return f"PYNET-{'SVL' if action is Action.LOCAL else 'SVC'}-{digest_of(server)}"


def entries_of(server: VirtualServer, settings: NodeSettings) -> tuple[Entry, ...]:
    """Return what leads to a Service port: an entry a frontend."""
    protocol = server.key.protocol.lower()
    return tuple(
        Entry(
            frontend.address,
            protocol,
            frontend.port,
            _entry_chain(server, frontend, settings),
            _comment(server, frontend),
        )
        for frontend in server.frontends
    )


def refused_addresses(server: VirtualServer) -> Iterable[str]:
    """Return the addresses of a Service port whose other ports are refused: its cluster IP."""
    return (f.address for f in server.frontends if f.kind is FrontendKind.CLUSTER_IP and f.address)


def server_chains(server: VirtualServer, settings: NodeSettings) -> Chains:
    """Return the chains that are a Service port's own, all in nat."""
    chains: Chains = {}
    actions = {v.action for f in server.frontends for v in (f.pod, f.node, f.outside)}
    if actions & {Action.CLUSTER, Action.REJECT}:
        name = chain_for(server, Action.CLUSTER)
        chains[name] = balance(server, server.cluster if Action.CLUSTER in actions else ())
    if Action.LOCAL in actions:
        chains[chain_for(server, Action.LOCAL)] = balance(server, server.local)
    for frontend in server.frontends:
        if not _goes_straight(frontend, settings):
            name = _origin_chain(server, frontend)
            if name not in chains:
                chains[name] = _origin_rules(server, frontend, settings)
        if frontend.source_ranges is not None:
            chains[_entry_chain(server, frontend, settings)] = [
                *(f"-s {network} -j {_inner_chain(server, frontend, settings)}" for network in frontend.source_ranges),
                "-j PYNET-DROP",
            ]
    return chains


def directory(plan: Plan) -> Directory:
    """Return the trees that lead to the Service ports of `plan`."""
    loopback = f"-d {_LOOPBACK[plan.family]} "
    # With route_localnet a neighbour's packet to 127.0.0.1 comes in: node ports answer there for the node alone.
    outsiders = "-m addrtype ! --src-type LOCAL " if uses_loopback(plan.family, plan.settings) else ""
    head = [f"{loopback}{outsiders}-j RETURN"]
    made = Directory(plan.family, head)
    for server in plan.servers.values():
        made.add(*entrances(server, plan.settings))
    return made


def uses_loopback(family: Family, settings: NodeSettings) -> bool:
    """Whether node ports answer on loopback addresses."""
    if family is Family.V6 or not settings.localhost_node_ports:
        return False
    return not settings.node_port_addresses or inside("127.0.0.1", settings.node_port_addresses)


def render(
    table: str,
    chains: Mapping[str, Iterable[str]],
    gone: Iterable[str] = (),
    commands: Iterable[str] = (),
) -> str:
    """Return the rule file that gives `chains` their rules, runs `commands` and removes the chains `gone`."""
    gone = list(gone)
    lines = [f"*{table}"]
    lines += (f":{chain} - [0:0]" for chain in chains)
    lines += (f":{chain} - [0:0]" for chain in gone)
    for chain, rules in chains.items():
        lines += (f"-A {chain} {rule}" for rule in rules)
    lines += commands
    lines += (f"-X {chain}" for chain in gone)
    lines.append("COMMIT\n")
    return "\n".join(lines)


def in_parts(
    table: str, chains: Chains, gone: Iterable[str], commands: Iterable[str], rules_at_once: int | None
) -> Iterator[str]:
    """Yield `render`'s rule file in transactions of about so many rules (None: all in one), the commands in the last.

    `chains` are in an order in which none uses a later one, so each part stands on the parts before it.
    """
    part: Chains = {}
    size = 0
    for name, rules in chains.items():
        if part and rules_at_once and size + len(rules) > rules_at_once:
            yield render(table, part)
            part, size = {}, 0
        part[name] = rules
        size += len(rules)
    yield render(table, part, gone, commands)


def all_server_chains(plan: Plan) -> Chains:
    """Return the chains of every Service port."""
    chains: Chains = {}
    for server in plan.servers.values():
        chains.update(server_chains(server, plan.settings))
    return chains


def entrances(server: VirtualServer | None, settings: NodeSettings) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Return what of a Service port is in the trees: they need no new look while this stays."""
    return (entries_of(server, settings), tuple(refused_addresses(server))) if server else ((), ())


def nat_chains(plan: Plan, trees: Chains) -> Chains:
    """Return all chains of nat; one that jumps follows those it jumps to. `trees`: the plan's `directory`, rendered."""
    constant = _constant_nat(plan.family, plan.settings)
    first = {name: constant.pop(name) for name in ("PYNET-REJECT", "PYNET-DROP")}
    return first | all_server_chains(plan) | trees | constant


def filter_chains(plan: Plan, *, drop_invalid: bool) -> Chains:
    """Return all chains of filter."""
    return health_chains(plan) | _constant_filter(plan.family, plan.settings, drop_invalid)


def health_chains(plan: Plan) -> Chains:
    """Return the chains of filter that let load balancers reach the health check node ports."""
    names = {server.health_check_port: server.key.service for server in plan.servers.values()}
    rules = {
        port: f'-p tcp -m tcp --dport {port} -m comment --comment "{_safe(name)} health check node port" -j ACCEPT'
        for port, name in names.items()
        if port
    }
    return dispatch.port_tree("PYNET-HEALTH", "tcp", rules)


def _mark(value: int, mask: int) -> str:
    return f"-j MARK --set-xmark {value:#x}/{mask:#x}"


def _constant_nat(family: Family, settings: NodeSettings) -> Chains:
    masquerade, refuse = settings.masquerade_mark, refuse_mark(settings)
    both = masquerade | refuse
    networks = settings.node_port_addresses
    to_node_ports = f"-m addrtype --dst-type LOCAL -j {dispatch.NODE_PORTS}"
    return {
        "PYNET-SERVICES": [
            *_default_marks(settings),
            f"-j {dispatch.ROOT}",
            *(f"{'' if network.endswith('/0') else f'-d {network} '}{to_node_ports}" for network in networks),
            *([] if networks else [to_node_ports]),
            _mark(0, both),
        ],
        "PYNET-REJECT": [_mark(refuse, both), "-j ACCEPT"],
        "PYNET-DROP": [_mark(both, both), "-j ACCEPT"],
        "PYNET-POSTROUTING": [
            *(["-m conntrack --ctstate DNAT --ctorigdst 127.0.0.0/8"] if uses_loopback(family, settings) else []),
            f'-m conntrack --ctstate DNAT -m bpf --bytecode "{SAME_ADDRESS[family]}" -j MASQUERADE --random-fully',
            f"-m mark ! --mark {masquerade:#x}/{masquerade:#x} -j RETURN",
            _mark(masquerade, 0),
            "-j MASQUERADE --random-fully",
        ],
    }


def _constant_filter(family: Family, settings: NodeSettings, drop_invalid: bool) -> Chains:
    masquerade, refuse = settings.masquerade_mark, refuse_mark(settings)
    both = masquerade | refuse
    icmp = "icmp6-port-unreachable" if family is Family.V6 else "icmp-port-unreachable"
    refused = f"-m mark --mark {refuse:#x}/{refuse:#x} -j PYNET-REFUSE"
    loopback = _LOOPBACK[family]
    # Loopback addresses become reachable with route_localnet; nobody else may use that (CVE-2020-8558).
    guard = f"! -s {loopback} -d {loopback} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
    dropped = unallocated.jumps(settings, "PYNET-UNALLOCATED")
    return {
        "PYNET-UNALLOCATED": [unallocated.DROP],
        "PYNET-REFUSE": [
            f"-m mark --mark {both:#x}/{both:#x} -j DROP",
            "-p tcp -j REJECT --reject-with tcp-reset",
            f"-j REJECT --reject-with {icmp}",
        ],
        "PYNET-INPUT": [refused, *([guard] if uses_loopback(family, settings) else []), "-p tcp -j PYNET-HEALTH"],
        "PYNET-OUTPUT": [refused, *dropped],
        "PYNET-FORWARD": [
            refused,
            *dropped,
            *(["-m conntrack --ctstate INVALID -j DROP"] if drop_invalid else []),
            f"-m mark --mark {masquerade:#x}/{masquerade:#x} -j ACCEPT",
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        ],
    }


def _pod_matches(detector: LocalDetector) -> list[str]:
    """Return matches, any of which says that the source is a pod; the first of them can be negated by `! `."""
    if detector.kind is LocalKind.CIDR:
        return [f"-s {network}" for network in detector.cidrs]
    if detector.kind is LocalKind.BRIDGE:
        return [f"-i {detector.interface}"]
    if detector.kind is LocalKind.PREFIX:
        return [f"-i {detector.interface}+"]
    return []


def _default_marks(settings: NodeSettings) -> list[str]:
    """Return the rules that give each packet the mark that a cluster IP wants for its origin."""
    mark = settings.masquerade_mark
    if settings.masquerade_all:
        return [_mark(mark, mark)]
    pods = _pod_matches(settings.detector)
    if not pods:
        return []
    return [f"! {pods[0]} {_mark(mark, mark)}", *(f"{pod} {_mark(0, mark)}" for pod in pods[1:])]


def _default_masquerade(settings: NodeSettings, origin: Origin) -> bool:
    if settings.masquerade_all:
        return True
    return settings.detector.kind is not LocalKind.NONE and origin is not Origin.POD


def _origins(settings: NodeSettings) -> tuple[Origin, ...]:
    if settings.detector.kind is LocalKind.NONE:
        return (Origin.NODE, Origin.OUTSIDE)
    return (Origin.POD, Origin.NODE, Origin.OUTSIDE)


def _forwards(verdict: Verdict) -> bool:
    return verdict.action in (Action.CLUSTER, Action.LOCAL)


def _goes_straight(frontend: Frontend, settings: NodeSettings) -> bool:
    """Whether one chain serves every origin, with the marks as PYNET-SERVICES has set them."""
    verdicts = [(origin, frontend.verdict_for(origin)) for origin in _origins(settings)]
    return (
        len({verdict.action for _, verdict in verdicts}) == 1
        and all(
            not _forwards(verdict) or verdict.masquerade == _default_masquerade(settings, origin)
            for origin, verdict in verdicts
        )
        and frontend.kind is FrontendKind.CLUSTER_IP
    )


def _origin_chain(server: VirtualServer, frontend: Frontend) -> str:
    """Return the chain that tells origins apart; frontends with the same verdicts share one."""
    first = next(f for f in server.frontends if f.kind is not FrontendKind.CLUSTER_IP or f is frontend)
    verdicts = (frontend.pod, frontend.node, frontend.outside)
    if verdicts == (first.pod, first.node, first.outside) and frontend.kind is not FrontendKind.CLUSTER_IP:
        return f"PYNET-EXT-{digest_of(server)}"
    spelled = "|".join(f"{v.action.value}{int(v.masquerade)}" for v in verdicts)
    return f"PYNET-EXT-{digest_of(server, spelled)}"


def _inner_chain(server: VirtualServer, frontend: Frontend, settings: NodeSettings) -> str:
    if _goes_straight(frontend, settings):
        return chain_for(server, frontend.node.action)
    return _origin_chain(server, frontend)


def _entry_chain(server: VirtualServer, frontend: Frontend, settings: NodeSettings) -> str:
    if frontend.source_ranges is not None:
        return f"PYNET-FW-{digest_of(server, f'{frontend.address}|{frontend.port}')}"
    return _inner_chain(server, frontend, settings)


def _origin_rules(server: VirtualServer, frontend: Frontend, settings: NodeSettings) -> list[str]:
    """Return rules that give each origin its verdict; those alike in all origins are one."""
    origins = _origins(settings)
    decided = {origin: frontend.verdict_for(origin) for origin in origins}
    mark = settings.masquerade_mark
    rules: list[str] = []
    if len(set(decided.values())) == 1:
        origins = (Origin.OUTSIDE,)
    for origin in origins:
        verdict = decided[origin]
        matches = {
            Origin.POD: [f"{pod} " for pod in _pod_matches(settings.detector)],
            Origin.NODE: ["-m addrtype --src-type LOCAL "],
            Origin.OUTSIDE: [""],
        }[origin]
        is_default = len(origins) > 1 and verdict.masquerade == _default_masquerade(settings, origin)
        for match in matches:
            if _forwards(verdict) and not is_default:
                rules.append(f"{match}{_mark(mark if verdict.masquerade else 0, mark)}")
            rules.append(f"{match}-j {chain_for(server, verdict.action)}")
    return rules


def _comment(server: VirtualServer, frontend: Frontend) -> str:
    """Return words for whoever lists the rules: nothing in them can end the quoted text or the line."""
    key = server.key
    return _safe(f"{key.service}:{key.port_name} {frontend.kind.value}")


def _safe(text: str) -> str:
    return _UNSAFE.sub("?", text)[:200]
