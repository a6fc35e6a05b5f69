"""The rule of a pick chain as netlink has it: the same bytes that `nft` makes of `base.pick_chain`'s text. Pure.

Only these chains come and go as endpoints do, so only they are worth writing without the program.
"""

from __future__ import annotations

import struct

from proxy.modes.nftables.names import LOCAL_OFFSET, Kind, Words
from pynet.kernel.nfnetlink import attribute, expression

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_NESTED = 0x8000
_L4PROTO = 16  # NFT_META_L4PROTO
_NETWORK, _TRANSPORT = 1, 2  # bases of payload
_FIRST = 1  # NFT_REG_1; registers of four bytes count from 8: NFT_REG32_00 is the same place
_WORDS = 8


def pick_rule(words: Words, kind: Kind, which: str, protocol: str, slots: int) -> bytes:
    """Return the expressions: a protocol match; key = (address,) port, index; look up; DNAT to what is found."""
    is_v4 = words.ip == "ip"
    size, offset = (4, 16) if is_v4 else (16, 24)
    address = size // 4  # in words of a register
    port_at = address if kind.by_address else 0
    parts = [
        expression("meta", [(2, _number(_L4PROTO)), (1, _number(_FIRST))]),
        expression(
            "cmp", [(1, _number(_FIRST)), (2, _number(0)), (3 | _NESTED, attribute(1, bytes([_NUMBERS[protocol]])))]
        ),
    ]
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
    name = f"{kind.prefix}-endpoints-{protocol}".encode() + b"\0"
    parts.append(expression("lookup", [(1, name), (2, _number(_FIRST)), (3, _number(_FIRST)), (5, _number(0))]))
    family = 2 if is_v4 else 10
    port = _number(_register(address))
    parts.append(
        expression("nat", [(1, _number(1)), (2, _number(family)), (3, _number(_FIRST)), (5, port)])  # 1: destination
    )
    return b"".join(parts)


def _payload(register: int, base: int, offset: int, size: int) -> bytes:
    facts = [(1, register), (2, base), (3, offset), (4, size)]
    return expression("payload", [(kind, _number(value)) for kind, value in facts])


def _register(word: int) -> int:
    """Return the register that begins `word` words after the first: whole ones have numbers of their own."""
    return _FIRST + word // 4 if word % 4 == 0 else _WORDS + word


def _number(value: int) -> bytes:
    return struct.pack(">I", value)
