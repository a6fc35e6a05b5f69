"""Whose turn it is, who stays with whom; which doors a Service port has. No sockets."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from proxy.modes.userspace import balancer
from proxy.modes.userspace.balancer import Balancer
from proxy.modes.userspace.doors import DoorKey, doors_of
from proxy.plan import Action, Endpoint, Frontend, FrontendKind, ServerKey, Verdict, VirtualServer

A, B, C = (Endpoint(f"10.0.0.{n}", 80) for n in (1, 2, 3))
HEAVY = Endpoint("10.0.0.9", 80, weight=3)
KEY = ServerKey("default/web", "", "TCP")


def firsts(one: Balancer, count: int, client: str = "c") -> list[Endpoint]:
    return [one.order(client, 0)[0] for _ in range(count)]


def test_turns_go_round_and_the_order_names_all() -> None:
    one = Balancer((A, B, C))
    assert firsts(one, 6) == [A, B, C] * 2
    assert one.order("c", 0) == [A, B, C] and one.order("c", 0) == [B, C, A]


def test_weights_are_exact_and_mixed() -> None:
    turns = firsts(Balancer((A, HEAVY)), 8)
    assert Counter(turns) == {A: 2, HEAVY: 6}
    assert turns[:4].count(A) == 1


def test_a_client_stays_until_its_time_is_over_or_its_endpoint_fails() -> None:
    one = Balancer((A, B, C), affinity_seconds=10)
    first = one.order("c", 0)[0]
    one.connected("c", first, 0)
    assert {one.order("c", 9)[0] for _ in range(5)} == {first}
    one.connected("c", first, 9)
    assert one.order("c", 18)[0] == first
    assert {one.order("c", 30)[0] for _ in range(3)} == {A, B, C}
    one.connected("c", B, 40)
    one.failed("c", B)
    assert len({one.order("c", 41)[0] for _ in range(3)}) == 3


def test_a_change_keeps_those_who_can_stay() -> None:
    one = Balancer((A, B), affinity_seconds=10)
    one.connected("a", A, 0)
    one.connected("b", B, 0)
    one.change((B, C), 10)
    assert one.order("b", 1)[0] == B
    assert A not in one.order("a", 1)
    one.change((), 10)
    assert one.order("b", 1) == []


def test_an_endpoint_of_another_weight_is_the_same_endpoint() -> None:
    one = Balancer((A, B), affinity_seconds=10)
    one.connected("b", B, 0)
    heavier = msgspec.structs.replace(B, weight=5)
    one.change((A, heavier), 10)
    assert {one.order("b", 1)[0] for _ in range(4)} == {heavier}


def test_nobody_stays_with_an_endpoint_that_went_while_it_was_dialed() -> None:
    one = Balancer((A, B), affinity_seconds=10)
    one.change((C,), 10)
    one.connected("c", A, 0)
    assert one.order("c", 1) == [C]


def test_clients_are_not_remembered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "MAX_CLIENTS", 8)
    one = Balancer((A, B), affinity_seconds=1000)
    for number in range(50):
        one.connected(f"c{number}", A, 0)
    assert len(one._stays) <= 8 and one.order("c49", 1)[0] == A


CLUSTER, LOCAL, DROP = (Verdict(action) for action in (Action.CLUSTER, Action.LOCAL, Action.DROP))


@pytest.mark.parametrize(
    ("verdicts", "near", "actions"),
    [
        ((CLUSTER, CLUSTER, CLUSTER), (), ["cluster"]),
        ((CLUSTER, CLUSTER, LOCAL), (A,), ["cluster", "local"]),
        ((CLUSTER, CLUSTER, LOCAL), (), ["cluster"]),
        ((CLUSTER, CLUSTER, DROP), (), ["cluster"]),
        ((DROP, DROP, DROP), (), []),
    ],
)
def test_a_door_an_action(verdicts: tuple[Verdict, ...], near: tuple[Endpoint, ...], actions: list[str]) -> None:
    frontend = Frontend(FrontendKind.NODE_PORT, "", 30000, *verdicts)
    server = VirtualServer(KEY, (frontend,), (A, B), near)
    assert [door.key for door in doors_of(server)] == [DoorKey(KEY, "", 30000, action) for action in actions]
    assert [door.key.action for door in doors_of(server, listen_only=True)] == ([""] if actions else [])


def test_sctp_has_no_doors() -> None:
    frontend = Frontend(FrontendKind.CLUSTER_IP, "10.96.0.1", 80, CLUSTER, CLUSTER, CLUSTER)
    assert doors_of(VirtualServer(ServerKey("d/w", "", "SCTP"), (frontend,), (A,), ())) == []
