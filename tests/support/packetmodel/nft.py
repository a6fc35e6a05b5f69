"""Interprets the text that nftables mode writes: `Ruleset.run` is `nft -f -`, `Ruleset.send` a packet's way."""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from typing import NamedTuple

from proxy.plan import Packet
from support.packetmodel.outcomes import End, Ends, UnknownRule

_NUMBERS = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}


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


class Verdict(NamedTuple):
    """Where a rule sends a packet: accept, drop, reject, return, goto or jump (with the chain)."""

    word: str
    chain: str = ""


Step = tuple[Fraction, State, Verdict | None]


class Ruleset:
    """One table of text form, and the packets' ways through it."""

    def __init__(self, family: str, addresses: Collection[str]) -> None:
        self.family = family
        self.addresses = addresses
        self.clear()

    def clear(self) -> None:
        self.declared: dict[str, str] = {}
        self.elements: dict[str, dict[str, str]] = {}
        self.chains: dict[str, list[str]] = {}
        self.hooks: dict[str, str] = {}

    # -- commands

    def run(self, script: str) -> None:
        """Carry out a transaction's text; commands of the other family's table are left out."""
        lines = iter(script.splitlines())
        for line in lines:
            verb, kind, family, _table, *rest = line.split(" ")
            body: list[str] = []
            if line.endswith("{"):
                for row in lines:
                    if row == "}":
                        break
                    body += row.rstrip(",").split(", ")
                rest = rest[:-1]
            if family == self.family:
                self._command(verb, kind, rest, body)

    def _command(self, verb: str, kind: str, rest: list[str], body: list[str]) -> None:
        name = rest[0] if rest else ""
        text = " ".join(rest[1:])
        match verb, kind:
            case "add", "table":
                pass
            case "delete", "table":
                self.clear()
            case "add", "set" | "map":
                self.declared.setdefault(name, f"{kind} {text}")
                self.elements.setdefault(name, {})
            case "delete", "set" | "map":
                del self.declared[name], self.elements[name]
            case "add", "chain":
                self.chains.setdefault(name, [])
                if text:
                    self.hooks[name] = text
            case "flush", "chain":
                self.chains[name] = []
            case "delete", "chain":
                assert not list(self._users(name)), f"chain {name} is deleted and still in use"
                del self.chains[name]
            case "add", "rule":
                self.chains[name].append(text)
            case "add", "element":
                for key, value in map(_pair, body):
                    assert self.elements[name].get(key, value) == value, f"{name}: {key} is there with another value"
                    self.elements[name][key] = value
            case "delete", "element":
                for key, _ in map(_pair, body):
                    del self.elements[name][key]
            case _:
                raise UnknownRule(f"{verb} {kind} {' '.join(rest)}")

    def _users(self, chain: str) -> Iterator[str]:
        for rules in self.chains.values():
            yield from (rule for rule in rules if re.search(rf"(goto|jump) {re.escape(chain)}$", rule))
        for elements in self.elements.values():
            yield from (key for key, value in elements.items() if value == f"goto {chain}")

    # -- a packet's way

    def send(self, packet: Packet) -> Ends:
        """Return what becomes of the first packet of a connection."""
        start = State(packet.source, packet.destination, _NUMBERS[packet.protocol], packet.port, packet.interface or "")
        found: defaultdict[End, Fraction] = defaultdict(Fraction)
        for share, state, verdict in self._base("prerouting" if packet.interface else "output", start):
            if verdict in ("drop", "reject"):
                found[End(verdict)] += share
                continue
            for part, after, last in self._onward(self._hooks(packet, state), state):
                if last in ("drop", "reject"):
                    found[End(last)] += share * part
                elif state.dnat:
                    found[End("forward", (state.to, state.port), after.masquerade)] += share * part
                else:
                    assert not after.masquerade, "traffic to no Service is masqueraded"
                    found[End("pass")] += share * part
        return dict(found)

    def _hooks(self, packet: Packet, state: State) -> list[str]:
        """Return the base chains that a packet meets when its destination is decided."""
        if not packet.interface:
            return ["filter-output", "postrouting"]
        to_node = state.to in self.addresses or ipaddress.ip_address(state.to).is_loopback
        return ["input"] if to_node else ["forward", "postrouting"]

    def _onward(self, chains: list[str], state: State) -> Iterator[tuple[Fraction, State, str]]:
        if not chains:
            yield Fraction(1), state, "accept"
            return
        for share, after, verdict in self._base(chains[0], state):
            if verdict in ("drop", "reject"):
                yield share, after, verdict
            else:
                yield from _scaled(share, self._onward(chains[1:], after))

    def _base(self, chain: str, state: State) -> Iterator[tuple[Fraction, State, str]]:
        if chain not in self.chains:
            yield Fraction(1), state, "accept"
            return
        for share, after, verdict in self._walk(chain, state):
            yield share, after, "accept" if verdict in ("", "return") else verdict

    def _walk(self, chain: str, state: State, at: int = 0) -> Iterator[tuple[Fraction, State, str]]:
        rules = self.chains[chain]
        if at >= len(rules):
            yield Fraction(1), state, ""
            return
        for share, after, verdict in self._rule(rules[at], state):
            if verdict is None:
                yield from _scaled(share, self._walk(chain, after, at + 1))
            elif verdict.word == "goto":
                yield from _scaled(share, self._walk(verdict.chain, after))
            elif verdict.word == "jump":
                for part, there, ended in self._walk(verdict.chain, after):
                    if ended in ("", "return"):
                        yield from _scaled(share * part, self._walk(chain, there, at + 1))
                    else:
                        yield share * part, there, ended
            else:
                yield share, after, verdict.word

    def _rule(self, rule: str, state: State) -> Iterator[Step]:
        """Yield the ways through one rule: what follows it, or None where the next rule is to be tried."""
        rest = rule
        ways: list[tuple[Fraction, State]] = [(Fraction(1), state)]
        while rest:
            found, act = _statement(rest, rule)
            rest = rest[found.end() :].lstrip()
            onward: list[tuple[Fraction, State]] = []
            for share, now in ways:
                for part, after, verdict in act(self, found, now):
                    if verdict is None:
                        onward.append((share * part, after))
                    elif verdict == BREAK:
                        yield share * part, after, None
                    else:
                        yield share * part, after, verdict
            ways = onward
        for share, now in ways:
            yield share, now, None

    # -- expressions

    def value(self, expression: str, state: State) -> list[tuple[Fraction, str | None]]:
        """Return the values that an expression may have, joined by " . "; None: the rule does not apply."""
        ways: list[tuple[Fraction, list[str]]] = [(Fraction(1), [])]
        for word in expression.split(" . "):
            if found := re.fullmatch(r"numgen (?:random|inc) mod (\d+)(?: offset (\d+))?", word):
                total, first = int(found[1]), int(found[2] or 0)
                ways = [(s / total, [*v, str(first + index)]) for s, v in ways for index in range(total)]
                continue
            fact = self._fact(word, state)
            if fact is None:
                return [(Fraction(1), None)]
            ways = [(share, [*values, fact]) for share, values in ways]
        return [(share, " . ".join(values)) for share, values in ways]

    def _fact(self, word: str, state: State) -> str | None:
        match word.split():
            case [self.family, "saddr"]:
                return state.source
            case [self.family, "daddr"]:
                return state.to
            case ["meta", "l4proto"]:
                return state.protocol
            case ["th", "dport"]:
                return str(state.port)
            case ["tcp" | "udp" | "sctp" as protocol, "dport"]:
                return str(state.port) if state.protocol == protocol else None
        raise UnknownRule(word)

    def found(self, name: str, key: str) -> str | None:
        """Return the value of a key in a set or map; None: it is not there. Intervals match what they hold."""
        elements = self.elements[name]
        if "interval" not in self.declared[name]:
            return elements.get(key)
        *start, last = key.split(" . ")
        address = ipaddress.ip_address(last)
        for element, value in elements.items():
            *words, network = element.split(" . ")
            if words == start and address in ipaddress.ip_network(network):
                return value
        return None


BREAK = Verdict("break")


def _statement(rest: str, rule: str) -> tuple[re.Match[str], Callable[..., list[Step]]]:
    for pattern, act in _STATEMENTS:
        if found := pattern.match(rest):
            return found, act
    raise UnknownRule(f"{rest!r} in {rule!r}")


def _scaled(share: Fraction, ways: Iterator[tuple[Fraction, State, str]]) -> Iterator[tuple[Fraction, State, str]]:
    for part, state, verdict in ways:
        yield share * part, state, verdict


def _pair(element: str) -> tuple[str, str]:
    key, _, value = element.partition(" : ")
    return key, value


def _if(state: State, matches: bool) -> list[Step]:
    return [(Fraction(1), state, None if matches else BREAK)]


def _in_set(rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    steps: list[Step] = []
    for share, key in rules.value(found[1], state):
        inside = key is not None and rules.found(found[2], key) is not None
        steps.append((share, state, None if inside else BREAK))
    return steps


def _vmap(rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    steps: list[Step] = []
    for share, key in rules.value(found[1], state):
        value = None if key is None else rules.found(found[2], key)
        steps.append((share, state, BREAK if value is None else Verdict(*value.split(" "))))
    return steps


def _dnat_map(rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    steps: list[Step] = []
    for share, key in rules.value(found[1], state):
        value = None if key is None else rules.found(found[2], key)
        if value is None:
            steps.append((share, state, BREAK))
        else:
            address, port = value.split(" . ")
            steps.append((share, state._replace(to=address, port=int(port), dnat=True), Verdict("accept")))
    return steps


def _dnat_to(_rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    address = found[1].strip("[]")
    return [(Fraction(1), state._replace(to=address, port=int(found[2]), dnat=True), Verdict("accept"))]


def _numgen_below(_rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    share = Fraction(int(found[2]), int(found[1]))
    return [(share, state, None), (1 - share, state, BREAK)]


def _fib(rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    address = state.source if found[1] == "saddr" else state.to
    return _if(state, address in rules.addresses or ipaddress.ip_address(address).is_loopback)


def _iifname(_rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    matches = state.interface.startswith(found[2]) if found[3] else state.interface == found[2]
    return _if(state, matches != bool(found[1]))


def _literal(rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    ((_, address),) = rules.value(found[1], state)
    return _if(state, ipaddress.ip_address(address or "") in ipaddress.ip_network(found[2]))


def _known_client(_rules: Ruleset, _found: re.Match[str], state: State) -> list[Step]:
    return _if(state, False)  # the model's packets come from clients that are remembered nowhere


def _mark_is(_rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    return _if(state, state.mark & int(found[1], 16) == int(found[2], 16))


def _mark_or(_rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    return [(Fraction(1), state._replace(mark=state.mark | int(found[1], 16)), None)]


def _mark_and(_rules: Ruleset, found: re.Match[str], state: State) -> list[Step]:
    return [(Fraction(1), state._replace(mark=state.mark & int(found[1], 16)), None)]


_FACT = r"(?:ip6? [sd]addr|meta l4proto|(?:th|tcp|udp|sctp) dport|numgen (?:random|inc) mod \d+(?: offset \d+)?)"
_CONCAT = rf"({_FACT}(?: \. {_FACT})*)"
_NAME = r"([\w./-]+)"
_STATEMENTS: tuple[tuple[re.Pattern[str], Callable[..., list[Step]]], ...] = tuple(
    (re.compile(pattern), act)
    for pattern, act in (
        (rf"{_CONCAT} vmap @{_NAME}", _vmap),
        (rf"dnat ip6? addr \. port to {_CONCAT} map @{_NAME}", _dnat_map),
        (r"dnat to (\S+):(\d+)", _dnat_to),
        (r"dnat to ip6? saddr map @\S+ : \d+", _known_client),
        (r"ip6? saddr @sticky-[\w-]+", _known_client),
        (rf"{_CONCAT} @{_NAME}", _in_set),
        (r"(ip6? [sd]addr) ([0-9a-f:.]+(?:/\d+)?)", _literal),
        (r"fib ([sd]addr) type local", _fib),
        (r"meta l4proto (tcp|udp|sctp)\b", lambda _r, f, s: _if(s, s.protocol == f[1])),
        (r"numgen (?:random|inc) mod (\d+) < (\d+)", _numgen_below),
        (r"meta mark & (0x\w+) == (0x\w+)", _mark_is),
        (r"meta mark set meta mark \| (0x\w+)", _mark_or),
        (r"meta mark set meta mark & (0x\w+)", _mark_and),
        (r"ct status dnat", lambda _r, _f, s: _if(s, s.dnat)),
        (r"ct state new", lambda _r, _f, s: _if(s, True)),
        (r"ct state established,related", lambda _r, _f, s: _if(s, False)),
        (r'iifname (!= )?"([\w.@-]+)(\*)?"', _iifname),
        (r"update @\S+ \{ [^}]+ \}", lambda _r, _f, s: _if(s, True)),
        (r"masquerade fully-random", lambda _r, _f, s: [(Fraction(1), s._replace(masquerade=True), Verdict("accept"))]),
        (r"reject with tcp reset", lambda _r, _f, s: [(Fraction(1), s, Verdict("reject"))]),
        (rf"(goto|jump) {_NAME}", lambda _r, f, s: [(Fraction(1), s, Verdict(f[1], f[2]))]),
        (r"(return|accept|drop|reject)$", lambda _r, f, s: [(Fraction(1), s, Verdict(f[1]))]),
    )
)
