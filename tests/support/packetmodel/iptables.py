"""Interprets the text that iptables mode writes: `run` is `iptables-restore --noflush`, `send` a packet's way."""

from __future__ import annotations

import ipaddress
import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from proxy.plan import Packet
from support.packetmodel.outcomes import End, Ends, UnknownRule


class State(NamedTuple):
    """A packet on its way."""

    source: str
    to: str
    protocol: str
    port: int
    interface: str
    mark: int = 0
    dnat: bool = False
    masquerade: bool = False


# how likely, what it became, how it ended: "" (next rule), return, accept, drop, reject
Way = tuple[Fraction, State, str]
Match = Callable[..., bool | Fraction]
BUILTIN = {"nat": ("PREROUTING", "OUTPUT", "POSTROUTING", "INPUT"), "filter": ("INPUT", "FORWARD", "OUTPUT")}


class Ruleset:
    """The tables nat and filter of one family."""

    def __init__(self, addresses: Collection[str]) -> None:
        self.addresses = addresses
        self.tables: dict[str, dict[str, list[str]]] = {
            table: {chain: [] for chain in chains} for table, chains in BUILTIN.items()
        }

    # -- commands

    def run(self, script: str) -> None:
        """Carry out a rule file; a chain that is named is emptied first, as iptables-restore does."""
        chains: dict[str, list[str]] = {}
        for line in script.splitlines():
            if line.startswith("*"):
                chains = self.tables[line[1:]]
            elif line.startswith(":"):
                chains[line[1:].partition(" ")[0]] = []
            elif line.startswith(("-A ", "-I ")):
                command, chain, rule = line.split(" ", 2)
                self._known_target(chains, rule)
                chains[chain].insert(len(chains[chain]) if command == "-A" else 0, rule)
            elif line.startswith("-X "):
                name = line[3:]
                users = [c for c, rules in chains.items() if any(rule.endswith(f"-j {name}") for rule in rules)]
                assert not users, f"chain {name} is deleted and still used by {users}"
                assert not chains.pop(name), f"chain {name} is deleted and not empty"
            elif line != "COMMIT":
                raise UnknownRule(line)

    def _known_target(self, chains: dict[str, list[str]], rule: str) -> None:
        if "-j " not in rule:  # it counts
            return
        target = rule.partition("-j ")[2].split(" ")[0]
        assert target in chains or target in _TARGETS, f"{target} of {rule!r} is not there"

    # -- a packet's way

    def send(self, packet: Packet) -> Ends:
        """Return what becomes of the first packet of a connection."""
        protocol = packet.protocol.lower()
        start = State(packet.source, packet.destination, protocol, packet.port, packet.interface)
        found: defaultdict[End, Fraction] = defaultdict(Fraction)
        for share, state, end in self._path(start):
            if end in ("drop", "reject"):
                found[End(end)] += share
            elif state.dnat:
                found[End("forward", (state.to, state.port), state.masquerade)] += share
            else:
                assert not state.masquerade, "traffic to no Service is masqueraded"
                found[End("pass")] += share
        return dict(found)

    def _path(self, start: State) -> Iterator[Way]:
        for share, state, _ in self._chain("nat", "PREROUTING" if start.interface else "OUTPUT", start):
            to_node = state.to in self.addresses or ipaddress.ip_address(state.to).is_loopback
            hooks = [("filter", "INPUT" if to_node else "FORWARD")] if start.interface else [("filter", "OUTPUT")]
            if not (to_node and start.interface):
                hooks.append(("nat", "POSTROUTING"))
            yield from _scaled(share, self._hooks(hooks, state))

    def _hooks(self, hooks: list[tuple[str, str]], state: State) -> Iterator[Way]:
        if not hooks:
            yield Fraction(1), state, "accept"
            return
        for share, after, end in self._chain(*hooks[0], state):
            if end in ("drop", "reject"):
                yield share, after, end
            else:
                yield from _scaled(share, self._hooks(hooks[1:], after))

    def _chain(self, table: str, chain: str, state: State, at: int = 0) -> Iterator[Way]:
        rules = self.tables[table][chain]
        if at >= len(rules):
            yield Fraction(1), state, ""
            return
        for share, after, end in self._rule(table, rules[at], state):
            if end == "":
                yield from _scaled(share, self._chain(table, chain, after, at + 1))
            else:
                yield share, after, end

    def _rule(self, table: str, rule: str, state: State) -> Iterator[Way]:
        matches, target = _parsed(rule)
        chance = Fraction(1)
        for match, arguments, negated in matches:
            told = match(self, state, *arguments)
            if isinstance(told, Fraction):
                chance *= told
            elif bool(told) == negated:
                yield Fraction(1), state, ""
                return
        if chance < 1:
            yield 1 - chance, state, ""
        yield from _scaled(chance, self._target(table, target, state))

    def _target(self, table: str, words: list[str], state: State) -> Iterator[Way]:
        match words:
            case []:
                yield Fraction(1), state, ""
            case ["ACCEPT" | "DROP" | "RETURN" as word]:
                yield Fraction(1), state, word.lower()
            case ["REJECT", "--reject-with", "tcp-reset" | "icmp-port-unreachable" | "icmp6-port-unreachable"]:
                yield Fraction(1), state, "reject"
            case ["MARK", "--set-xmark", both]:
                value, mask = (int(part, 16) for part in both.split("/"))
                yield Fraction(1), state._replace(mark=(state.mark & ~mask & 0xFFFFFFFF) ^ value), ""
            case ["MASQUERADE", "--random-fully"]:
                yield Fraction(1), state._replace(masquerade=True), "accept"
            case ["DNAT", "--to-destination", to]:
                address, _, port = to.rpartition(":")
                yield Fraction(1), state._replace(to=address.strip("[]"), port=int(port), dnat=True), "accept"
            case [chain] if chain in self.tables[table]:
                for share, after, end in self._chain(table, chain, state):
                    yield share, after, "" if end == "return" else end
            case _:
                raise UnknownRule(" ".join(words))


@lru_cache(maxsize=10_000)
def _parsed(rule: str) -> tuple[list[tuple[Match, list[str], bool]], list[str]]:
    """Return the matches of a rule (with their arguments; whether they are negated) and its target."""
    words = shlex.split(rule)
    found = []
    while words and words[0] != "-j":
        negated = words[0] == "!"
        words = words[negated:]
        shape, match = _match_for(words, rule)
        found.append((match, [w for s, w in zip(shape, words, strict=False) if s is None], negated))
        words = words[len(shape) :]
    return found, words[1:]


def _match_for(words: list[str], rule: str) -> tuple[tuple[str | None, ...], Match]:
    for shape, match in _MATCHES:
        if len(words) >= len(shape) and all(s in (None, w) for s, w in zip(shape, words, strict=False)):
            return shape, match
    raise UnknownRule(rule)


def _scaled(share: Fraction, ways: Iterator[Way]) -> Iterator[Way]:
    for part, state, end in ways:
        yield share * part, state, end


@lru_cache(maxsize=10_000)
def _within(address: str, network: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)


def _is_local(rules: Ruleset, address: str) -> bool:
    return address in rules.addresses or ipaddress.ip_address(address).is_loopback


def _interface(_rules: Ruleset, state: State, name: str) -> bool:
    return state.interface.startswith(name[:-1]) if name.endswith("+") else state.interface == name


def _port(_rules: Ruleset, state: State, ports: str) -> bool:
    first, _, last = ports.partition(":")
    return int(first) <= state.port <= int(last or first)


def _mark(_rules: Ruleset, state: State, both: str) -> bool:
    value, mask = (int(part, 16) for part in both.split("/"))
    return state.mark & mask == value


def _ct(_rules: Ruleset, state: State, states: str) -> bool:
    named = states.split(",")  # a first packet is neither established nor invalid
    return "NEW" in named or (state.dnat and "DNAT" in named)


def _bpf(_rules: Ruleset, state: State, program: str) -> bool:
    """The one program in use says that source and destination are equal: run it, do not believe it."""
    packed = ipaddress.ip_address(state.source).packed, ipaddress.ip_address(state.to).packed
    header = bytes(12) + packed[0] + packed[1] if len(packed[0]) == 4 else bytes(8) + packed[0] + packed[1]
    return run_bpf(program, header) != 0


def run_bpf(program: str, packet: bytes) -> int:
    """Return what a classic BPF program returns for a packet (the few instructions that we write)."""
    count, *lines = program.split(",")
    code = [tuple(map(int, line.split())) for line in lines]
    assert len(code) == int(count)
    a = x = at = 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == 32:  # ld [k]
            a = int.from_bytes(packet[k : k + 4], "big")
        elif op == 7:  # tax
            x = a
        elif op == 29:  # jeq x
            at += yes if a == x else no
        elif op == 6:  # ret k
            return k
        else:
            raise UnknownRule(f"BPF instruction {op}")


_MATCHES: tuple[tuple[tuple[str | None, ...], Match], ...] = (
    (("-s", None), lambda _r, s, n: _within(s.source, n)),
    (("-d", None), lambda _r, s, n: _within(s.to, n)),
    (("-i", None), _interface),
    (("-p", None), lambda _r, s, p: s.protocol == p),
    (("-m", "tcp"), lambda _r, s: s.protocol == "tcp"),
    (("-m", "udp"), lambda _r, s: s.protocol == "udp"),
    (("-m", "sctp"), lambda _r, s: s.protocol == "sctp"),
    (("--dport", None), _port),
    (("-m", "comment", "--comment", None), lambda _r, _s, _t: True),
    (("-m", "addrtype", "--dst-type", "LOCAL"), lambda r, s: _is_local(r, s.to)),
    (("-m", "addrtype", "!", "--dst-type", "LOCAL"), lambda r, s: not _is_local(r, s.to)),
    (("-m", "addrtype", "--src-type", "LOCAL"), lambda r, s: _is_local(r, s.source)),
    (("-m", "addrtype", "!", "--src-type", "LOCAL"), lambda r, s: not _is_local(r, s.source)),
    (("-m", "mark", "--mark", None), _mark),
    (("-m", "mark", "!", "--mark", None), lambda r, s, both: not _mark(r, s, both)),
    (("-m", "conntrack", "--ctstate", "DNAT", "--ctorigdst", None), lambda *_: True),  # of a rule that counts
    (("-m", "conntrack", "--ctstate", None), _ct),
    (("-m", "conntrack", "!", "--ctstate", None), lambda r, s, states: not _ct(r, s, states)),
    (("-m", "bpf", "--bytecode", None), _bpf),
    (
        ("-m", "statistic", "--mode", "random", "--probability", None),
        lambda _r, _s, p: Fraction(p),
    ),
    (
        ("-m", "statistic", "--mode", "nth", "--every", None, "--packet", "0"),
        lambda _r, _s, every: Fraction(1, int(every)),
    ),
    # the model's packets come from clients that are remembered nowhere
    (("-m", "recent", "--update", "--seconds", None, "--reap", "--name", None, "--mask", None, "--rsource"),
     lambda *_: False),
    (("-m", "recent", "--set", "--name", None, "--mask", None, "--rsource"), lambda *_: True),
)  # fmt: skip
_TARGETS = ("ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "MASQUERADE", "DNAT")
