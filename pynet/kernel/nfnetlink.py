"""nftables over netlink: what the `nft` program is too slow for, or cannot say. The only encoder of its messages.

Single elements, deletions, read-back and the generation number; `nftwatch` hears of other people's transactions. What a
rule means is known elsewhere: here it is bytes. Constants: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence

import msgspec

GETTABLE = 1
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE = 6, 7
GETSET, DELSET = 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
NEWGEN, GETGEN = 15, 16
FAMILIES = {"inet": 1, "ip": socket.AF_INET, "ip6": socket.AF_INET6}  # NFPROTO_INET, and the two as sockets know them

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_REQUEST, _DUMP = 0x1, 0x300
_CREATE, _APPEND = 0x400, 0x800
_ERROR, _DONE, _OVERRUN = 2, 3, 4
SOL_NETLINK = 270
_EXT_ACK = 11
_SNDBUFFORCE, _RCVBUFFORCE = 32, 33
_NESTED = 0x8000
_TYPE = 0x3FFF
_MOST = 32000  # bytes of elements in one message: an attribute's length is 16 bits


class NfnetlinkError(OSError):
    """The kernel refused a batch, all of it. `index`: the message at fault, -1 where that is not known."""

    def __init__(self, number: int, message: str, index: int = -1) -> None:
        super().__init__(number, message)
        self.index = index


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message of a batch."""

    kind: int
    family: str
    payload: bytes

    @property
    def flags(self) -> int:
        """Return the flags that its kind asks for."""
        return _REQUEST | {NEWSETELEM: _CREATE, NEWCHAIN: _CREATE, NEWRULE: _CREATE | _APPEND}.get(self.kind, 0)


class Element(msgspec.Struct, frozen=True, gc=False):
    """An element as the kernel has it. `chain`: where a verdict goes to; `end`: the last key of an interval.

    `is_end`: not an element but where the interval before it stops. `packets`: what its counter says.
    """

    key: bytes
    data: bytes = b""
    chain: str = ""
    end: bytes = b""
    is_end: bool = False
    packets: int = 0


def attribute(kind: int, value: bytes) -> bytes:
    """Return one netlink attribute, padded."""
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def string(kind: int, value: str) -> bytes:
    """Return a string attribute."""
    return attribute(kind, value.encode() + b"\0")


def attributes(blob: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type, value) of a run of attributes."""
    view = memoryview(blob)
    at, end = 0, len(view)
    while at + 4 <= end:
        length, kind = struct.unpack_from("=HH", view, at)
        if length < 4:
            return
        yield kind & _TYPE, view[at + 4 : at + length]
        at += (length + 3) & ~3


def elements(kind: int, family: str, table: str, name: str, wanted: Iterable[Element]) -> Iterator[Message]:
    """Yield messages that add or delete (`kind`) elements of a set, as many as are needed."""
    head = string(1, table) + string(2, name)
    blobs: list[bytes] = []
    size = 0
    for element in wanted:
        blob = attribute(1 | _NESTED, _element(element))
        if size + len(blob) > _MOST:
            yield Message(kind, family, head + attribute(3 | _NESTED, b"".join(blobs)))
            blobs, size = [], 0
        blobs.append(blob)
        size += len(blob)
    if blobs:
        yield Message(kind, family, head + attribute(3 | _NESTED, b"".join(blobs)))


def expression(name: str, facts: Iterable[tuple[int, bytes]]) -> bytes:
    """Return one expression of a rule: its kernel name, and its attributes in their order."""
    body = b"".join(attribute(kind, value) for kind, value in facts)
    return attribute(1 | _NESTED, string(1, name) + attribute(2 | _NESTED, body))


def new_chain(family: str, table: str, name: str, rules: Iterable[bytes]) -> Iterator[Message]:
    """Yield the messages that make a chain (no base chain) with rules, each the bytes of its expressions."""
    yield Message(NEWCHAIN, family, string(1, table) + string(3, name))
    for rule in rules:
        yield Message(NEWRULE, family, string(1, table) + string(2, name) + attribute(4 | _NESTED, rule))


def delete_chain(family: str, table: str, name: str) -> Message:
    """Return the message that deletes a chain with its rules; nothing may refer to it."""
    return Message(DELCHAIN, family, string(1, table) + string(3, name))


def delete_set(family: str, table: str, name: str) -> Message:
    """Return the message that deletes a set or map with its elements; no rule may refer to it."""
    return Message(DELSET, family, string(1, table) + string(2, name))


def _element(element: Element) -> bytes:
    blob = attribute(1 | _NESTED, attribute(1, element.key))
    if element.end:
        blob += attribute(10 | _NESTED, attribute(1, element.end))
    if element.chain:
        verdict = attribute(1, struct.pack(">i", -4)) + string(2, element.chain)  # NFT_GOTO
        blob += attribute(2 | _NESTED, attribute(2 | _NESTED, verdict))
    elif element.data:
        blob += attribute(2 | _NESTED, attribute(1, element.data))
    return blob


# length and first bytes of an element that is a key, or a key and a value → where they are, and what is in between
Shapes = dict[tuple[int, bytes], tuple[int, int, int, int, bytes]]


def _all_parsed(blob: bytes, shapes: Shapes) -> Iterator[Element]:
    """Yield the elements of a message. In a set nearly all have one shape, known after the first: ten times faster."""
    at = 0
    while at + 4 <= len(blob):
        length = int.from_bytes(blob[at : at + 2], sys.byteorder)
        if length < 4:
            return
        body = blob[at + 4 : at + length]
        at += (length + 3) & ~3
        shape = shapes.get((length, body[:8]))
        if shape and body[shape[1] : shape[2]] == shape[4]:
            yield Element(body[8 : shape[0]], body[shape[2] : shape[3]])
            continue
        element = _parsed(memoryview(body))
        yield element
        if element == Element(element.key, element.data):
            key_end = 8 + len(element.key)
            between = (key_end + 3) & ~3
            start = between + 8 if element.data else between
            end = start + len(element.data)
            if (end + 3) & ~3 == len(body) + (-len(body) % 4) and body[8:key_end] == element.key:
                shapes[length, body[:8]] = (key_end, between, start, end, body[between:start])


def _parsed(blob: memoryview) -> Element:
    key = data = end = b""
    chain = ""
    is_end = False
    packets = 0
    for kind, value in attributes(blob):
        if kind in (1, 10):
            found = bytes(value[4:])
            if kind == 1:
                key = found
            else:
                end = found
        elif kind == 2:
            for inner, content in attributes(value):
                if inner == 1:
                    data = bytes(content)
                else:
                    chain = next((bytes(v[:-1]).decode() for k, v in attributes(content) if k == 2), "")
        elif kind == 3:
            is_end = bool(int.from_bytes(value, "big") & 1)
        elif kind == 7:
            packets = _packets(value)
    return Element(key, data, chain, end, is_end, packets)


def _packets(expression: memoryview) -> int:
    """Return what an expression counted, 0 for one that is no counter."""
    facts = dict(attributes(expression))
    if bytes(facts.get(1, b"")) != b"counter\0":
        return 0
    return next((int.from_bytes(value, "big") for kind, value in attributes(facts[2]) if kind == 2), 0)


class Nfnetlink:
    """A socket in the network namespace that it was made in. It stays open: closing one waits for the kernel's RCU
    grace period after each transaction that deleted something (12-30 ms; the reason why `nft` is not used for that).
    """

    def __init__(self) -> None:
        self._socket = open_socket(1 << 22)
        self._sequence = 0

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def generation(self) -> int:
        """Return the number of the last transaction that anybody committed in this namespace."""
        for kind, payload in self._ask(GETGEN, "", b"", 0):
            if kind == NEWGEN:
                return number_of(payload, 1)
        raise NfnetlinkError(errno.EPROTO, "nf_tables told no generation")

    def batch(self, wanted: Sequence[Message]) -> None:
        """Commit `wanted` as one transaction: all or nothing. Raise `NfnetlinkError`."""
        first = self._sequence + 1
        self._sequence += len(wanted) + 2
        parts = [_message(_BATCH_BEGIN, _REQUEST, first, 0, b"", _SUBSYSTEM)]
        for sequence, message in enumerate(wanted, first + 1):
            parts.append(
                _message(
                    _SUBSYSTEM << 8 | message.kind,
                    message.flags,
                    sequence,
                    FAMILIES[message.family],
                    message.payload,
                    0,
                )
            )
        parts.append(_message(_BATCH_END, _REQUEST, self._sequence, 0, b"", _SUBSYSTEM))
        try:
            self._socket.send(b"".join(parts))
        except OSError as error:
            raise NfnetlinkError(error.errno or 0, f"sending to nf_tables: {error.strerror}") from None
        self._refusals(first)  # the kernel has dealt with the batch when send returns

    def _refusals(self, first: int) -> None:
        refused: NfnetlinkError | None = None
        while True:
            try:
                blob = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            for kind, sequence, payload in messages(blob):
                number = -struct.unpack_from("=i", payload)[0] if kind == _ERROR else 0
                if number and sequence >= first and refused is None:
                    refused = NfnetlinkError(number, os.strerror(number), sequence - first - 1)
        if refused is not None:
            raise refused

    def tables(self, family: str) -> list[str]:
        """Return the names of the tables of a family."""
        return [text_of(payload, 1) for _, payload in self._ask(GETTABLE, family, b"", _DUMP)]

    def sets(self, family: str, table: str) -> dict[str, bytes]:
        """Return the sets and maps of a table: name → what declares it, as the kernel has it."""
        found = {}
        for _, payload in self._ask(GETSET, family, string(1, table), _DUMP):
            facts = dict(attributes(payload[4:]))
            if bytes(facts[1][:-1]).decode() == table:
                declared = b"".join(bytes(facts.get(kind, b"")) + b"|" for kind in (3, 4, 5, 6, 7, 11))
                found[bytes(facts[2][:-1]).decode()] = declared
        return found

    def chains(self, family: str, table: str) -> dict[str, bytes]:
        """Return the chains of a table: name → what declares a base chain (hook, policy, type), empty for others."""
        found = {}
        for _, payload in self._ask(GETCHAIN, family, b"", _DUMP):
            facts = dict(attributes(payload[4:]))
            if bytes(facts[1][:-1]).decode() == table:
                base = b"|".join(bytes(facts[kind]) for kind in (4, 5, 7) if kind in facts)
                found[bytes(facts[3][:-1]).decode()] = base
        return found

    def policy(self, family: str, table: str, chain: str) -> tuple[int, int]:
        """Return a base chain's policy (0 drops; of another chain 0) and how many rules it has, jumps to it counted in;
        (-1, 0): there is no such chain.
        """
        try:
            ((_, payload),) = self._ask(GETCHAIN, family, string(1, table) + string(3, chain), 0)
        except NfnetlinkError as error:
            if error.errno == errno.ENOENT:
                return -1, 0
            raise
        return number_of(payload, 5), number_of(payload, 6)

    def uses(self, family: str, table: str) -> dict[str, int]:
        """Return how many rules each chain of a table has, those counted in that jump to it: a cheap fingerprint."""
        found = {}
        for _, payload in self._ask(GETCHAIN, family, b"", _DUMP):
            facts = dict(attributes(payload[4:]))
            if bytes(facts[1][:-1]).decode() == table:
                found[bytes(facts[3][:-1]).decode()] = int.from_bytes(facts.get(6, b""), "big")
        return found

    def rules(self, family: str, table: str, chain: str = "") -> dict[str, tuple[bytes, ...]]:
        """Return the rules of a table (of one chain of it) by chain: each as the bytes of its expressions."""
        found: dict[str, list[bytes]] = {}
        asked = string(1, table) + (string(2, chain) if chain else b"")
        for _, payload in self._ask(GETRULE, family, asked, _DUMP):
            facts = dict(attributes(payload[4:]))
            if bytes(facts[1][:-1]).decode() == table:
                found.setdefault(bytes(facts[2][:-1]).decode(), []).append(bytes(facts.get(4, b"")))
        return {chain: tuple(rules) for chain, rules in found.items()}

    def elements(self, family: str, table: str, name: str) -> Iterator[Element]:
        """Yield the elements of a set or map. Raise `NfnetlinkError`: ENOENT when there is none of that name."""
        shapes: Shapes = {}
        for _, payload in self._ask(GETSETELEM, family, string(1, table) + string(2, name), _DUMP):
            for kind, value in attributes(payload[4:]):
                if kind == 3:
                    yield from _all_parsed(bytes(value), shapes)

    def _ask(self, kind: int, family: str, payload: bytes, flags: int) -> list[tuple[int, memoryview]]:
        self._sequence += 1
        sequence = self._sequence
        number = FAMILIES.get(family, 0)
        self._socket.send(_message(_SUBSYSTEM << 8 | kind, _REQUEST | flags, sequence, number, payload, 0))
        answers: list[tuple[int, memoryview]] = []  # read whole: a dump broken off would block the socket's next one
        while True:
            for found, of, body in messages(self._socket.recv(1 << 20)):
                if of != sequence:
                    continue
                if found in (_ERROR, _DONE):
                    code = struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if code:
                        raise NfnetlinkError(-code, os.strerror(-code))
                    return answers
                answers.append((found & 0xFF, body))
                if not flags:
                    return answers


def open_socket(buffer: int) -> socket.socket:
    """Return a socket to netfilter, with buffers of so many bytes where we may."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    for option in (_SNDBUFFORCE, _RCVBUFFORCE):
        with contextlib.suppress(PermissionError):
            made.setsockopt(socket.SOL_SOCKET, option, buffer)
    made.setsockopt(SOL_NETLINK, _EXT_ACK, 1)
    made.bind((0, 0))
    return made


def _message(kind: int, flags: int, sequence: int, family: int, payload: bytes, resource: int) -> bytes:
    body = struct.pack("=BB", family, 0) + struct.pack(">H", resource) + payload
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def messages(blob: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (type, sequence, what follows the header) of the messages in `blob`."""
    view = memoryview(blob)
    at = 0
    while at + 16 <= len(view):
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", view, at)
        if length < 16:
            return
        yield kind, sequence, view[at + 16 : at + length]
        at += (length + 3) & ~3


def text_of(payload: memoryview, kind: int) -> str:
    """Return a string attribute of a message, empty where it is not there."""
    return next((bytes(value).rstrip(b"\0").decode() for found, value in attributes(payload[4:]) if found == kind), "")


def number_of(payload: memoryview, kind: int) -> int:
    """Return a number attribute of a message, 0 where it is not there."""
    return next((int.from_bytes(value, "big") for found, value in attributes(payload[4:]) if found == kind), 0)
