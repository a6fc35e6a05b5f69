"""Elements of our sets and maps: text as in rules ↔ bytes as in netlink. Pure.

A key or value is one field, or several joined by " . ", each padded to four bytes in the kernel. What a set is made of
follows from its name.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache

from proxy.modes.nftables.names import PROTOCOLS, Words
from pynet.kernel.nfnetlink import Element

_PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOL_NUMBERS.items()}
_INDEX = struct.Struct("=I")  # numgen's results are in the machine's own byte order
_PORT = struct.Struct(">Hxx")
Fields = tuple[str, ...]


def fields_of(name: str) -> tuple[Fields, Fields | None]:
    """Return the fields of a set's key and of its value: empty in a set; None: a verdict, goto a chain.

    Fields: address, protocol, port, index, network (an interval of addresses).
    """
    if name in ("pod-networks", "node-port-addresses", "service-cidrs"):
        return ("network",), ()
    if name == "cluster-ips":
        return ("address",), ()
    if name == "hairpin":
        return ("address", "address"), ()
    if name.startswith("sticky-"):
        return ("address",), ("address",)
    if name.startswith("turn-"):
        return ("index",), ("address", "port")
    if name == "unallocated-counts":
        return ("protocol",), ()
    if name.endswith("-counts"):
        return ("address", "protocol", "port"), ()
    of_node_ports = name.startswith("node-port")
    start = () if of_node_ports else ("address",)
    if name.endswith("-source-ranges"):
        return (*start, "protocol", "port", "network"), ()
    if name.endswith(tuple(f"-endpoints-{protocol}" for protocol in PROTOCOLS)):
        return (*start, "port", "index"), ("address", "port")
    return (*start, "protocol", "port"), None


def encode(name: str, key: str, value: str = "") -> Element:
    """Return the element that `key : value` is in a set."""
    keys, values = fields_of(name)
    if keys[-1] == "network":
        *words, network = key.split(" . ")
        start = _joined(keys[:-1], words)
        bounds = ipaddress.ip_network(network)
        return Element(
            start + _padded(bounds.network_address.packed), end=start + _padded(bounds.broadcast_address.packed)
        )
    if values is None:
        return Element(_joined(keys, key.split(" . ")), chain=value.removeprefix("goto "))
    return Element(_joined(keys, key.split(" . ")), _joined(values, value.split(" . ")) if value else b"")


def decode(words: Words, name: str, elements: Iterable[Element]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of the elements of a set, as text."""
    keys, values = fields_of(name)
    if keys == ("network",):
        for network in _intervals(words, elements):
            yield network, ""
        return
    ranged = keys[-1] == "network"
    for element in elements:
        if ranged:
            key = _ranged(words, keys, element)
        else:
            key = _split(words, keys, element.key)
        if values is None:
            yield key, f"goto {element.chain}"
        else:
            yield key, _split(words, values, element.data) if values else ""


def _joined(fields: Fields, words: list[str]) -> bytes:
    return b"".join(_packed(field, word) for field, word in zip(fields, words, strict=True))


def _packed(field: str, word: str) -> bytes:
    if field == "address":
        return socket.inet_pton(socket.AF_INET6 if ":" in word else socket.AF_INET, word)
    if field == "port":
        return _PORT.pack(int(word))
    if field == "index":
        return _INDEX.pack(int(word))
    return bytes((_PROTOCOL_NUMBERS[word], 0, 0, 0))


@lru_cache(maxsize=65536)
def _address(blob: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(blob) == 4 else socket.AF_INET6, blob)


def _split(words: Words, fields: Fields, blob: bytes) -> str:
    found = []
    at = 0
    for field in fields:
        if field == "address":
            size = 4 if words.ip == "ip" else 16
            found.append(_address(blob[at : at + size]))
        elif field == "port":
            size = 4
            found.append(str(blob[at] << 8 | blob[at + 1]))
        elif field == "index":
            size = 4
            found.append(str(int.from_bytes(blob[at : at + 4], sys.byteorder)))
        else:
            size = 4
            found.append(_PROTOCOL_NAMES.get(blob[at], str(blob[at])))
        at += size
    return " . ".join(found)


def _ranged(words: Words, fields: Fields, element: Element) -> str:
    size = 4 if words.ip == "ip" else 16
    first, last = element.key[-size:], (element.end or element.key)[-size:]
    return " . ".join((_split(words, fields[:-1], element.key[:-size]), _network(first, last)))


def _network(first: bytes, last: bytes) -> str:
    networks = list(ipaddress.summarize_address_range(ipaddress.ip_address(first), ipaddress.ip_address(last)))
    return ", ".join(map(str, networks))


def _intervals(words: Words, elements: Iterable[Element]) -> Iterator[str]:
    """Yield the networks of a plain set of intervals, which the kernel keeps as starts and ends (exclusive)."""
    size = 4 if words.ip == "ip" else 16
    start: bytes | None = None
    for element in sorted(elements, key=lambda element: (element.key, not element.is_end)):
        if element.is_end:
            if start is not None:
                last = (int.from_bytes(element.key, "big") - 1).to_bytes(size, "big")
                yield _network(start, last)
            start = None
        else:
            start = element.key
    if start is not None:
        yield _network(start, b"\xff" * size)


def _padded(blob: bytes) -> bytes:
    return blob + bytes(-len(blob) % 4)
