"""The rules that choose an endpoint as netlink has them: the same bytes that `nft` makes of their text. Pure.

Only these chains come and go as endpoints do, so only they are worth writing without the program.
"""

from __future__ import annotations

import re
import struct

from proxy.modes.nftables.base import pick_facts
from proxy.modes.nftables.names import LOCAL_OFFSET, Kind, Words
from pynet.kernel.nfnetlink import attribute, expression

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_NESTED = 0x8000
_L4PROTO = 16  # NFT_META_L4PROTO
_NETWORK, _TRANSPORT = 1, 2  # bases of payload
_FIRST = 1  # NFT_REG_1; registers of four bytes count from 8: NFT_REG32_00 is the same place
_WORDS = 8


_TURN = re.compile(r"meta l4proto (\w+) dnat ip6? addr \. port to numgen inc mod (\d+) map @([\w-]+)")


def own_bytes(words: Words, chain: str, rules: tuple[str, ...]) -> list[bytes] | None:
    """Return the rules of a chain as netlink has them; None: only `nft` can write them."""
    if facts := pick_facts(chain):
        return [pick_rule(words, *facts)]
    found = [_TURN.fullmatch(rule) for rule in rules]
    if chain.startswith("turn-") and all(found):
        return [turn_rule(words, turn[1], int(turn[2]), turn[3]) for turn in found if turn]
    return None


def turn_rule(words: Words, protocol: str, slots: int, name: str) -> bytes:
    """Return the expressions of a round-robin rule: a protocol match; the next index; look up; DNAT to that."""
    register = _number(_FIRST)
    numgen = [(1, register), (2, _number(slots)), (3, _number(0)), (4, _number(0))]  # 0: one after the other
    return b"".join((*_of_protocol(protocol), expression("numgen", numgen), *_to_found(words, name)))


def pick_rule(words: Words, kind: Kind, which: str, protocol: str, slots: int) -> bytes:
    """Return the expressions: a protocol match; key = (address,) port, index; look up; DNAT to that."""
    is_v4 = words.ip == "ip"
    size, offset = (4, 16) if is_v4 else (16, 24)
    address = size // 4  # in words of a register
    port_at = address if kind.by_address else 0
    parts = [*_of_protocol(protocol)]
    if kind.by_address:
        parts.append(_payload(_FIRST, _NETWORK, offset, size))
    parts.append(_payload(_register(port_at), _TRANSPORT, 2, 2))
    start = LOCAL_OFFSET if which == "local" else 0
    parts.append(
        expression(
            "numgen",
            [(1, _number(_register(port_at + 1))), (2, _number(slots)), (3, _number(1)), (4, _number(start))],
        )
    )
    parts += _to_found(words, f"{kind.prefix}-endpoints-{protocol}")
    return b"".join(parts)


def _of_protocol(protocol: str) -> tuple[bytes, bytes]:
    wanted = attribute(1, bytes([_NUMBERS[protocol]]))
    return (
        expression("meta", [(2, _number(_L4PROTO)), (1, _number(_FIRST))]),
        expression("cmp", [(1, _number(_FIRST)), (2, _number(0)), (3 | _NESTED, wanted)]),
    )


def _to_found(words: Words, name: str) -> tuple[bytes, bytes]:
    is_v4 = words.ip == "ip"
    found = [(1, name.encode() + b"\0"), (2, _number(_FIRST)), (3, _number(_FIRST)), (5, _number(0))]
    port = _number(_register(1 if is_v4 else 4))
    nat = [(1, _number(1)), (2, _number(2 if is_v4 else 10)), (3, _number(_FIRST)), (5, port)]  # 1: destination
    return expression("lookup", found), expression("nat", nat)


def _payload(register: int, base: int, offset: int, size: int) -> bytes:
    facts = [(1, register), (2, base), (3, offset), (4, size)]
    return expression("payload", [(kind, _number(value)) for kind, value in facts])


def _register(word: int) -> int:
    """Return the register that begins `word` words after the first: whole ones have numbers of their own."""
    return _FIRST + word // 4 if word % 4 == 0 else _WORDS + word


def _number(value: int) -> bytes:
    return struct.pack(">I", value)
