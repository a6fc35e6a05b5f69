"""What nftables mode's text is made of: constant objects, slots, elements on the wire; and what hosts it needs."""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.modes.nftables.layout import slots_of
from proxy.modes.nftables.mode import unsupported
from proxy.modes.nftables.names import WORDS
from proxy.modes.nftables.script import render
from proxy.modes.nftables.table import Table
from proxy.modes.nftables.wire import decode, encode
from proxy.plan import Endpoint, Family, NodeSettings, Plan
from support.plans import World, cluster_ip, plan, server, servers_of

POD, FAR = Endpoint("10.244.1.2", 8080, True), Endpoint("10.244.2.2", 9090)


def text_of(wanted: Plan) -> str:
    step = Table(wanted.family, wanted.settings).start(wanted)
    return render([(WORDS[wanted.family].ip, step.change)], fresh=True).text


def test_objects_do_not_grow_with_services() -> None:
    def of(count: int) -> tuple[int, int]:
        servers = [
            server(f"a/{n}", cluster_ip(f"10.96.{n // 256}.{n % 256}", 80), cluster=(POD, FAR)) for n in range(count)
        ]
        text = text_of(plan(*servers))
        return text.count("add chain"), sum(text.count(f"add {word} ip") for word in ("map", "set"))

    assert of(3) == of(300)


def test_names_of_services_are_in_no_rule() -> None:
    evil = server('x" ; flush ruleset ; /y', cluster_ip("10.96.0.1", 80), cluster=(POD,), affinity=5, port_name="\n}")
    assert "flush ruleset" not in text_of(plan(evil))


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
