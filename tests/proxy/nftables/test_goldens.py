"""nftables mode's text against reviewed files; `make golden` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from proxy.modes.nftables.names import WORDS
from proxy.modes.nftables.script import render
from proxy.modes.nftables.table import Table
from proxy.plan import Endpoint, Family, LocalDetector, LocalKind, NodeSettings, Plan
from support.plans import CLUSTER, CLUSTER_MASQ, DROP, LOCAL, cluster_ip, load_balancer, node_port, plan, server

GOLDENS = Path(__file__).parent / "goldens"
POD, POD2, FAR = Endpoint("10.244.1.2", 8080, True), Endpoint("10.244.1.3", 8080, True), Endpoint("10.244.2.2", 9090)
WEB = server(
    "shop/web", cluster_ip("10.96.0.1", 80), node_port(30080, CLUSTER, CLUSTER_MASQ, LOCAL),
    load_balancer("203.0.113.1", 80, CLUSTER, CLUSTER_MASQ, LOCAL, ranges=("198.51.100.0/24", "198.51.100.128/25")),
    cluster=(POD, POD2, FAR), local=(POD, POD2),
)  # fmt: skip
NARROW = NodeSettings("node", LocalDetector(LocalKind.PREFIX, interface="veth"), ("192.168.77.0/24",), False)
SIX = (Endpoint("fd00:244:1::2", 8080, True), Endpoint("fd00:244:2::2", 8080))
CASES: dict[str, Plan] = {
    "empty": plan(),
    "every-kind-of-frontend": plan(WEB),
    "refused-and-dropped": plan(
        server("shop/none", cluster_ip("10.96.0.2", 80)),
        server("shop/held", cluster_ip("10.96.0.3", 80, DROP, DROP, DROP), cluster=(FAR,)),
    ),
    "affinity": plan(server("shop/cart", cluster_ip("10.96.0.4", 80), cluster=(POD, FAR), affinity=10800)),
    "round-robin": plan(
        server("shop/turn", cluster_ip("10.96.0.5", 53), cluster=(POD, FAR), scheduler="rr", protocol="UDP")
    ),
    "weights": plan(
        server("shop/most", cluster_ip("10.96.0.6", 80), cluster=(POD, Endpoint("10.244.2.2", 8080, weight=3)))
    ),
    "other-settings": plan(WEB, settings=NARROW),
    "service-cidrs": plan(WEB, settings=replace(plan().settings, service_cidrs=("10.96.0.0/16", "192.0.2.0/24"))),
    "ipv6": plan(
        server("shop/six", cluster_ip("fd00:96::1", 80), node_port(30080), cluster=SIX, protocol="SCTP", affinity=60),
        family=Family.V6,
    ),
}
CHANGES: dict[str, tuple[Plan, Plan]] = {
    "endpoint-replaced": (
        plan(WEB),
        plan(server("shop/web", *WEB.frontends, cluster=(POD, POD2, Endpoint("10.244.2.9", 9090)), local=WEB.local)),
    ),
    "endpoint-removed": (
        plan(WEB), plan(server("shop/web", *WEB.frontends, cluster=(POD, FAR), local=(POD,))),
    ),
    "service-removed": (plan(WEB), plan()),
    "turn-grows": (
        CASES["round-robin"],
        plan(
            server("shop/turn", cluster_ip("10.96.0.5", 53), cluster=(POD, POD2, FAR), scheduler="rr", protocol="UDP")
        ),
    ),
}  # fmt: skip


def golden(request: pytest.FixtureRequest, name: str, text: str) -> None:
    path = GOLDENS / f"{name}.nft"
    if request.config.getoption("--update-goldens"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs: review, then `make golden`"


def filled(wanted: Plan) -> tuple[Table, str]:
    table = Table(wanted.family, wanted.settings)
    step = table.start(wanted)
    table.commit(step)
    return table, render([(WORDS[wanted.family].ip, step.change)], fresh=True).text


@pytest.mark.parametrize("name", CASES)
def test_layout(request: pytest.FixtureRequest, name: str) -> None:
    golden(request, name, filled(CASES[name])[1])


@pytest.mark.parametrize("name", CHANGES)
def test_change(request: pytest.FixtureRequest, name: str) -> None:
    old, new = CHANGES[name]
    table, _ = filled(old)
    step = table.step({key: new.servers.get(key) for key in {**old.servers, **new.servers}})
    golden(request, f"change-{name}", render([(WORDS[old.family].ip, step.change)]).text)
