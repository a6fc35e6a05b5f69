"""Services and slices → iptables rules, against reviewed files (`make golden` writes them anew)."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from proxy.modes.iptables import layout
from proxy.plan import Family, LocalDetector, LocalKind, NodeSettings, Plan
from proxy.planning import build
from pynet.objects import Object
from support.objects import endpoint, piece, service

GOLDENS = Path(__file__).parent / "goldens"
PODS = NodeSettings("n1", LocalDetector(LocalKind.CIDR, ("10.244.0.0/16",)))
HERE, THERE = endpoint("10.244.1.2", "n1"), endpoint("10.244.2.2", "n2")
EVERYWHERE = {"externalIPs": ["203.0.113.1"], "ingress": [{"ip": "203.0.113.2"}], "type": "LoadBalancer"}
HTTP = {"name": "http", "port": 80, "nodePort": 30080}


def rules(plan: Plan) -> str:
    """Return both tables as one rule file."""
    trees = layout.directory(plan).chains()
    nat = layout.nat_chains(plan, trees)
    return layout.render("filter", layout.filter_chains(plan, drop_invalid=True)) + layout.render("nat", nat)


CASES: dict[str, tuple[list[Object], Family, NodeSettings]] = {
    "empty": ([], Family.V4, PODS),
    "every-frontend": (
        [service("web", "10.96.0.1", HTTP, **EVERYWHERE), piece("web", HERE, THERE)], Family.V4, PODS,
    ),
    "external-local-and-ranges": (
        [service("web", "10.96.0.1", HTTP, externalTrafficPolicy="Local", loadBalancerSourceRanges=["192.0.2.0/24"],
                 healthCheckNodePort=32000, **EVERYWHERE), piece("web", HERE, THERE)], Family.V4, PODS,
    ),
    "internal-local-without-endpoint": (
        [service("web", "10.96.0.1", internalTrafficPolicy="Local"), piece("web", THERE)], Family.V4, PODS,
    ),
    "no-endpoints": ([service("web", "10.96.0.1", HTTP)], Family.V4, PODS),
    "affinity-and-round-robin": (
        [service("sticky", "10.96.0.1", sessionAffinity="ClientIP"), piece("sticky", HERE, THERE),
         service("turn", "10.96.0.2", annotations={"pynet/scheduler": "rr", "pynet/weights": "n1=2"}),
         piece("turn", HERE, THERE)], Family.V4, PODS,
    ),
    "trees": (
        [each for n in range(40) for each in (
            service(f"s{n}", f"10.96.{n % 4}.{n}", {"name": "p", "port": 80, "nodePort": 30000 + 11 * n}),
            piece(f"s{n}", HERE, ports=(("p", "TCP", 8080),)))], Family.V4, PODS,
    ),
    "ipv6": (
        [service("web", "fd00:96::1", HTTP, sessionAffinity="ClientIP"),
         piece("web", endpoint("fd00:244:1::2", "n1"), kind="IPv6")], Family.V6,
        NodeSettings("n1", LocalDetector(LocalKind.CIDR, ("fd00:244::/48", "fd00:245::/48"))),
    ),
    "service-cidrs": (
        [service("web", "10.96.0.1"), piece("web", HERE)], Family.V4,
        replace(PODS, service_cidrs=("10.96.0.0/16", "192.0.2.0/24")),
    ),
    "other-settings": (
        [service("web", "10.96.0.1", HTTP), piece("web", HERE)], Family.V4,
        NodeSettings("n1", LocalDetector(LocalKind.PREFIX, interface="veth"), ("192.168.7.0/24",), False,
                     masquerade_all=True, masquerade_mark=1 << 31),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden(request: pytest.FixtureRequest, name: str) -> None:
    objects, family, settings = CASES[name]
    text = rules(build(objects, family, settings))
    path = GOLDENS / f"{name}.rules"
    if request.config.getoption("--update-goldens"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs: review, then `make golden`"
