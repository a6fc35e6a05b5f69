"""nftables mode's text against reviewed files (`--update-goldens` writes them anew), and what it is made of."""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.modes.nftables.layout import slots_of
from proxy.modes.nftables.mode import unsupported
from proxy.modes.nftables.names import WORDS
from proxy.modes.nftables.script import render
from proxy.modes.nftables.table import Table
from proxy.modes.nftables.wire import decode, encode
from proxy.plan import Endpoint, Family, LocalDetector, LocalKind, NodeSettings, Plan
from support.plans import (
    CLUSTER,
    CLUSTER_MASQ,
    DROP,
    LOCAL,
    World,
    cluster_ip,
    load_balancer,
    node_port,
    plan,
    server,
    servers_of,
)

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


def test_objects_do_not_grow_with_services() -> None:
    def of(count: int) -> tuple[int, int]:
        servers = [
            server(f"a/{n}", cluster_ip(f"10.96.{n // 256}.{n % 256}", 80), cluster=(POD, FAR)) for n in range(count)
        ]
        text = filled(plan(*servers))[1]
        return text.count("add chain"), sum(text.count(f"add {word} ip") for word in ("map", "set"))

    assert of(3) == of(300)


def test_names_of_services_are_in_no_rule() -> None:
    evil = server('x" ; flush ruleset ; /y', cluster_ip("10.96.0.1", 80), cluster=(POD,), affinity=5, port_name="\n}")
    assert "flush ruleset" not in filled(plan(evil))[1]


@pytest.mark.parametrize("family", list(Family))
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_what_is_encoded_is_decoded(family: Family, data: st.DataObject) -> None:
    words = WORDS[family]
    table = Table(family, NodeSettings())
    for each in data.draw(servers_of(World(family))):
        for name, elements in table.part(each).elements.items():
            for key, value in elements.items():
                assert list(decode(words, name, [encode(name, key, value)])) == [(key, value)]


@pytest.mark.parametrize(
    "weights", [(1, 1), (3, 1), (1, 2, 3), (5, 0, 5), (100, 1), (10, 20), (7,), (0, 0), (90000, 10000)]
)
def test_slots_are_as_many_as_weights_say_and_well_mixed(weights: tuple[int, ...]) -> None:
    endpoints = [Endpoint(f"10.0.0.{n}", 80, weight=weight) for n, weight in enumerate(weights)]
    slots = slots_of(endpoints)
    total = sum(weights)
    for each in endpoints:
        share = Fraction(slots.count(each), len(slots))
        wanted = Fraction(each.weight, total) if total else Fraction(1, len(weights))
        assert abs(share - wanted) < Fraction(1, 1000)
    if weights == (3, 1):
        assert max(len(list(run)) for _, run in groupby(slots)) <= 3


@pytest.mark.parametrize(
    ("kernel", "nft", "word"),
    [
        ("5.13.0", (1, 0, 1), ""),
        ("6.1.0-18-amd64", (1, 0, 6), ""),
        ("6.18.44", (1, 1), ""),
        ("5.12.19", (1, 0, 6), "needs Linux 5.13"),
        ("4.19.0", (1, 0, 6), "needs Linux 5.13"),
        ("6.1.0", (0, 9, 8), "needs nft 1.0.1"),
    ],
)
def test_too_old_a_host_is_told_what_it_lacks(kernel: str, nft: tuple[int, ...], word: str) -> None:
    assert unsupported(kernel, nft).startswith(word)
    assert bool(unsupported(kernel, nft)) == bool(word)
