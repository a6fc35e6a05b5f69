"""What a path should come to, and what is wrong with what came back."""

from __future__ import annotations

import pytest

from netnslab.agents import Answer
from netnslab.paths import Expect, Path, Place, Target, Wanted, describe_seen, describe_wanted, expectation, judge, seen

NODES = {"node1": "172.31.0.11", "node2": "172.31.0.12"}
ONE = Place("one", "node1", "10.244.1.2", "10.244.1.1")
TWO = Place("two", "node2", "10.244.2.2", "10.244.2.1")
CLIENT = Place("client", "", "172.31.0.200")
NODE1 = Place("node1", "node1", "172.31.0.11")


def leaving(via, to):
    return NODES[via]


def path(target, source="own"):
    return Path("x", "one", target, Expect(("one", "two"), source))


@pytest.mark.parametrize(
    ("what", "origin", "target", "source", "backend", "sees"),
    [
        ("pod to pod keeps its address", ONE, Target("tcp:80", pod="two"), "own", TWO, "10.244.1.2"),
        ("pod to outside", ONE, Target("tcp:80", machine="client"), "node", CLIENT, "172.31.0.11"),
        ("pod to itself through a Service", ONE, Target("http", service="s"), "node", ONE, "10.244.1.1"),
        ("node to its own pod", NODE1, Target("http", service="s"), "node", ONE, "10.244.1.1"),
        ("node to another node's pod", NODE1, Target("http", service="s"), "node", TWO, "172.31.0.11"),
        ("client by the first node", CLIENT, Target("http", service="s", node="node1"), "node", TWO, "172.31.0.11"),
        ("client by the backend's node", CLIENT, Target("http", service="s", node="node2"), "node", TWO, "10.244.2.1"),
        ("policy Local", CLIENT, Target("http", service="s", node="node2"), "own", TWO, "172.31.0.200"),
        ("any", ONE, Target("http", service="s"), "any", TWO, None),
    ],
)
def test_which_source_a_backend_sees(what, origin, target, source, backend, sees):
    via = target.node or origin.node
    assert expectation(path(target, source), origin, [backend], leaving, via=via).sources == {backend.name: sees}, what


def test_a_mode_that_opens_its_own_connections_keeps_no_source_but_only_through_services():
    through = expectation(path(Target("http", service="s")), ONE, [TWO], leaving, via="node1", keeps_source=False)
    direct = expectation(path(Target("tcp:80", pod="two")), ONE, [TWO], leaving, via="node1", keeps_source=False)
    assert through.sources == {"two": "172.31.0.11"}
    assert direct.sources == {"two": "10.244.1.2"}


def answers(*pods, source="10.0.0.1", outcome="ok", milliseconds=1.0):
    return [Answer(outcome, pod, f"{source}:999" if pod else "", milliseconds) for pod in pods]


BOTH = Wanted("ok", {"one": "10.0.0.1", "two": "10.0.0.1"})


@pytest.mark.parametrize(
    ("wanted", "came", "wrong"),
    [
        (BOTH, answers("one", "two"), ""),
        (BOTH, answers("one", "one"), "two never answered"),
        (BOTH, answers("one", "two", "three"), "three should not have answered"),
        (BOTH, [*answers("one"), *answers("two", source="10.0.0.2")], "two saw 10.0.0.2, expected 10.0.0.1"),
        (BOTH, [*answers("one", "two"), *answers("", outcome="timeout")], "expected ok, got ok ×2, timeout"),
        (Wanted("ok", {"one": None}), answers("one", source="1.1.1.1"), ""),
        (Wanted("refused", {}), answers("", outcome="refused"), ""),
        (Wanted("refused", {}), answers("", outcome="refused", milliseconds=900.0), "refused only after 900 ms"),
        (Wanted("refused", {}), answers("one"), "expected refused, got ok"),
        (Wanted("lost", {}), [*answers("", outcome="timeout"), *answers("", outcome="unreachable")], ""),
        (Wanted("lost", {}), answers("", outcome="refused"), "expected lost, got refused"),
        (Wanted("unreachable", {}), answers("", outcome="unreachable"), ""),
        (Wanted("unreachable", {}), answers("", outcome="timeout"), "expected unreachable, got timeout"),
        (Wanted("ok", {"one": None, "two": None}, one=True), answers("two", "two"), ""),
        (Wanted("ok", {"one": None, "two": None}, one=True), answers("one", "two"), "expected one and the same"),
        (Wanted("ok", {"one": None, "two": None}, even=True), answers(*["one"] * 300, *["two"] * 300), ""),
        (Wanted("ok", {"one": None, "two": None}, even=True), answers(*["one"] * 340, *["two"] * 260), ""),
        (Wanted("ok", {"one": None, "two": None}, even=True), answers(*["one"] * 390, *["two"] * 210), "one got 390"),
        (Wanted("ok", {"one": None}), [], "expected ok, got"),
    ],
)
def test_what_is_wrong(wanted, came, wrong):
    found = judge(wanted, seen(came))
    assert found.startswith(wrong)
    assert bool(found) == bool(wrong)


def test_words_for_the_table():
    assert describe_wanted(BOTH) == "one, two sees 10.0.0.1"
    assert describe_wanted(Wanted("refused", {})) == "refused at once"
    assert describe_wanted(Wanted("lost", {})) == "no answer"
    assert describe_seen(seen(answers("one", "two", "one"))) == "one ×2, two saw 10.0.0.1"
    assert describe_seen(seen(answers("", outcome="refused", milliseconds=2.0))) == "refused (2 ms)"


def test_an_ipv6_source_is_read_without_its_port():
    assert Answer("ok", "one", "[fd00::1]:4000", 1.0).source_address == "fd00::1"
