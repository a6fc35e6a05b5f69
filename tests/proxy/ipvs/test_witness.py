"""What our encoder wrote to IPVS, as pyroute2 reads it, which shares no code with ours: added, changed, removed."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from pynet.ipvs import SCHED_FALLBACK, DestinationId, Service, ServiceId
from pynet.kernel.ipvs import Ipvs
from support import witness
from support.netns import Names
from support.servicenet import inside

pytestmark = [pytest.mark.vm, pytest.mark.root]

PERSISTENT, HASHED = 0x1, 0x2  # HASHED: the kernel's own, of every server that it has in its table
MASQUERADED = 0  # IP_VS_CONN_F_MASQ: destinations are reached by NAT
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
FULL = {4: "255.255.255.255", 6: "128.0.0.0"}  # a length in IPv6: 128 in the CPU's order, read as an address

WEB, DNS = ServiceId(4, "10.96.0.1", 80, "TCP"), ServiceId(6, "fd00:96::1", 53, "UDP")
SCTP = ServiceId(4, "10.96.0.9", 9999, "SCTP")
MARK, MARK6 = ServiceId(4, mark=0x8001), ServiceId(6, mark=0x8002)
NEAR, FAR = DestinationId("10.244.1.2", 8080), DestinationId("10.244.2.2", 8081)
NEAR6 = DestinationId("fd00:244:1::2", 8080)

Wanted = dict[ServiceId, tuple[Service, dict[DestinationId, int]]]
FIRST: Wanted = {
    WEB: (Service("wrr", persistence=60), {NEAR: 3, FAR: 0}),
    DNS: (Service("rr"), {NEAR6: 1}),
    SCTP: (Service("lc"), {}),
    MARK: (Service("mh", flags=SCHED_FALLBACK), {NEAR: 1, FAR: 65535}),
    MARK6: (Service("rr"), {NEAR6: 7}),
}


def told(wanted: Wanted) -> list[dict[str, Any]]:
    """Return virtual servers as the witness tells them."""
    found = []
    for name, (settings, destinations) in wanted.items():
        family = socket.AF_INET6 if name.version == 6 else socket.AF_INET
        named = {"address": name.address, "port": name.port, "protocol": PROTOCOLS.get(name.protocol)}
        found.append(
            {
                "af": int(family),
                **({"mark": name.mark} if name.mark else named),
                "scheduler": settings.scheduler,
                "flags": settings.flags | HASHED | (PERSISTENT if settings.persistence else 0),
                "timeout": settings.persistence,
                "netmask": FULL[name.version],
                "destinations": [
                    {"address": each.address, "port": each.port, "weight": weight, "method": MASQUERADED,
                     "af": int(family)}
                    for each, weight in destinations.items()
                ],
            }
        )  # fmt: skip
    return ordered(found)


def ordered(servers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return servers and their destinations in an order of ours: the kernel's is that of its hash."""
    for each in servers:
        each["destinations"].sort(key=lambda destination: destination["address"])
    return sorted(servers, key=lambda each: (each.get("address", ""), each.get("mark", 0)))


def test_virtual_servers_as_pyroute2_reads_them(netns: Names) -> None:
    node = netns("node")
    assert witness.virtual_servers(node) == []
    with inside(node):
        kernel = Ipvs()
    messages = []
    for name, (settings, destinations) in FIRST.items():
        messages.append(kernel.add_service(name, settings))
        messages += [kernel.add_destination(name, each, weight) for each, weight in destinations.items()]
    assert not any(kernel.send(messages))
    assert ordered(witness.virtual_servers(node)) == told(FIRST)

    second: Wanted = {
        WEB: (Service("rr"), {NEAR: 1}),
        DNS: (Service("sh", flags=SCHED_FALLBACK), {NEAR6: 0}),
        MARK6: FIRST[MARK6],
    }
    changes = [
        kernel.set_service(WEB, second[WEB][0]),
        kernel.set_destination(WEB, NEAR, 1),
        kernel.delete_destination(WEB, FAR),
        kernel.set_service(DNS, second[DNS][0]),
        kernel.set_destination(DNS, NEAR6, 0),
        kernel.delete_service(MARK),
        kernel.delete_service(SCTP),
    ]
    assert not any(kernel.send(changes))
    assert ordered(witness.virtual_servers(node)) == told(second)
    kernel.close()
