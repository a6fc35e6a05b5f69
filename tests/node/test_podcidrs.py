"""The assignment of pod CIDRs: the same everywhere, stable through changes, without conflict."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.node.ledger import FILE, Ledger
from cni.node.nodes import claim_of
from cni.node.podcidrs import BadPool, Pool, assign, pools

DUAL = pools(("10.244.0.0/16", "fd00:244::/48"), {})
TINY = (Pool("10.0.0.0/29", 31),)  # four places
NAMES = st.sets(st.sampled_from([f"node-{number}" for number in range(8)]), max_size=4)


def held(record: dict[str, tuple[str, ...]]) -> list[str]:
    return [cidr for cidrs in record.values() for cidr in cidrs]


def overlapping(cidrs: list[str]) -> bool:
    claims = [claim_of(cidr) for cidr in cidrs]
    return any(a.first <= b.last and b.first <= a.last for a, b in itertools.combinations(claims, 2))


def test_every_node_gets_one_of_each_family() -> None:
    record = assign({f"n{number}" for number in range(200)}, (), {}, DUAL)
    assert all(len(cidrs) == 2 and cidrs[0].endswith("/24") and cidrs[1].endswith("/64") for cidrs in record.values())
    assert len(record) == 200
    assert not overlapping([cidrs[0] for cidrs in record.values()])
    assert len({cidrs[1] for cidrs in record.values()}) == 200


def test_the_whole_pool_is_used_before_it_is_full() -> None:
    names = {f"n{number}" for number in range(256)}
    record = assign(names, (), {}, pools(("10.244.0.0/16",), {}))
    assert sorted(held(record)) == sorted(f"10.244.{number}.0/24" for number in range(256))
    assert "late" not in assign(names | {"late"}, (), record, pools(("10.244.0.0/16",), {}))


def test_the_order_of_arrival_does_not_matter_where_names_do_not_collide() -> None:
    one = assign({"a"}, (), {}, DUAL)
    assert assign({"a", "b"}, (), {}, DUAL)["a"] == one["a"]


@settings(max_examples=200, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6))
def test_whoever_comes_and_goes_nobody_moves_and_none_overlap(story: list[set[str]]) -> None:
    record: dict[str, tuple[str, ...]] = {}
    for present in story:
        after = assign(present, (), record, TINY)
        assert not overlapping(held(after))
        assert all(after[name] == record[name] for name in present & record.keys())
        assert present <= after.keys(), "there is room for four, if those that are away make way"
        assert assign(present, (), after, TINY) == after, "a second look moves somebody"
        record = after


@settings(deadline=None)
@given(NAMES, st.sets(st.sampled_from(["10.0.0.0/31", "10.0.0.4/30", "10.0.0.3/32", "192.168.0.0/16", "junk"])))
def test_what_nodes_have_by_themselves_is_given_to_nobody(names: set[str], taken: set[str]) -> None:
    record = assign(names, taken, {}, TINY)
    assert not overlapping(held(record) + [cidr for cidr in taken if cidr != "junk" and not cidr.startswith("192")])


def test_one_that_is_away_keeps_its_own_until_it_is_needed() -> None:
    record = assign({"a", "b"}, (), {}, TINY)
    without = assign({"b"}, (), record, TINY)
    assert without == record
    full = assign({"b", "c", "d", "e"}, (), record, TINY)
    assert set(full) == {"b", "c", "d", "e"}


def test_a_record_of_another_cluster_cidr_is_kept_of_other_nodes_only() -> None:
    """Their agents may have been started with that other one, and move them themselves when they are not."""
    record = {"a": ("172.16.0.0/24",), "b": ("172.16.1.0/24",)}
    after = assign({"a", "b"}, (), record, DUAL, own="a")
    assert after["a"][0].startswith("10.244.")
    assert after["b"][0] == "172.16.1.0/24"


def test_agents_started_with_other_flags_do_not_undo_each_other() -> None:
    """As in a rolling change of flags; the second word of an agent is never another one."""
    flags = {
        "a": pools(("10.244.0.0/16",), {}),
        "b": pools(("10.244.0.0/16",), {4: 26}),
        "c": DUAL,
        "d": pools(("10.200.0.0/16",), {}),
    }
    record: dict[str, tuple[str, ...]] = {}
    for name in [*flags, *flags]:
        record = assign(flags.keys(), (), record, flags[name], own=name)
    for name in flags:
        assert assign(flags.keys(), (), record, flags[name], own=name) == record
    assert not overlapping(held(record))
    assert {name: len(cidrs) for name, cidrs in record.items()}["c"] == 2
    assert record["d"][0].startswith("10.200.")


def test_of_two_nodes_with_one_record_the_first_keeps_it() -> None:
    record = {"a": ("10.244.7.0/24",), "b": ("10.244.7.0/24",)}
    after = assign({"a", "b"}, (), record, pools(("10.244.0.0/16",), {}))
    assert after["a"] == ("10.244.7.0/24",)
    assert after["b"] != after["a"]


@pytest.mark.parametrize(
    ("cidrs", "sizes", "said"),
    [
        ((), {}, "needs --cluster-cidr"),
        (("10.0.0.0/16", "10.1.0.0/16"), {}, "a second one of IPv4"),
        (("10.0.0.0/16",), {4: 8}, "--node-cidr-mask-size 8"),
        (("10.0.0.0/16",), {4: 31}, "--node-cidr-mask-size 31"),
        (("fd00::/16",), {6: 112}, "more than 2**64"),
    ],
)
def test_flags_that_give_nothing_are_refused(cidrs: tuple[str, ...], sizes: dict[int, int], said: str) -> None:
    with pytest.raises(BadPool, match=said.replace("*", r"\*")):
        pools(cidrs, sizes)


def test_the_record_is_a_manifest_that_people_can_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.read() == {}
    ledger.update(lambda _: {"a": ("10.244.1.0/24", "fd00::/64")})
    content = json.loads((tmp_path / FILE).read_text())
    assert (content["kind"], content["apiVersion"]) == ("ConfigMap", "v1")
    assert content["data"] == {"a": "10.244.1.0/24,fd00::/64"}
    assert Ledger(tmp_path).read() == {"a": ("10.244.1.0/24", "fd00::/64")}


def test_a_broken_record_is_like_none(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"data": {"a": ')
    assert Ledger(tmp_path).read() == {}


def test_agents_that_assign_at_once_do_not_give_one_cidr_twice(tmp_path: Path) -> None:
    """Each sees other Nodes, as agents do while Nodes are added."""
    start = threading.Barrier(8)

    def one(number: int) -> None:
        ledger = Ledger(tmp_path)
        start.wait()
        for known in range(1, 9):
            names = {f"n{(number + each) % 8}" for each in range(known)}
            ledger.update(lambda record, names=names: assign(names, (), record, (Pool("10.0.0.0/24", 28),)))  # type: ignore[misc]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = Ledger(tmp_path).read()
    assert len(record) == 8
    assert not overlapping(held(record))
