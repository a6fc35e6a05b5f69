"""The allocator by property, and the store with a real file: no duplicate, no loss, round robin, damage, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import database
from cni.ipam import allocator, ranges
from cni.ipam.store import Owner, Store
from cni.spec import CniError


def conf(*subnets: str, network: str = "net", requested: tuple[str, ...] = ()) -> ranges.IpamConf:
    sets = [[{"subnet": subnet}] for subnet in subnets]
    parsed = ranges.parse({"name": network, "ipam": {"type": "x", "ranges": sets}}, {}, "1.1.0", "/s")
    return parsed._replace(requested=requested)


def owner(name: str, boot: str = "b1") -> Owner:
    return Owner(name, "eth0", boot, f"/netns/{name}", 4, 1)


def range_set(*spans: tuple[int, int]) -> ranges.RangeSet:
    return tuple(ranges.Range("10.0.0.0/8", 4, 8, first, last, first) for first, last in spans)


# --- the allocator


@st.composite
def pools(draw: st.DrawFn) -> tuple[ranges.RangeSet, set[int], int | None]:
    spans, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        first = at + draw(st.integers(0, 3))
        last = first + draw(st.integers(0, 12))
        spans.append((first, last))
        at = last + 1
    inside = [number for first, last in spans for number in range(first, last + 1)]
    used = draw(st.sets(st.sampled_from(inside)))
    return range_set(*spans), used, draw(st.none() | st.integers(0, at + 3))


def within(used: set[int]) -> Callable[[int, int], list[int]]:
    return lambda first, last: sorted(number for number in used if first <= number <= last)


@given(pools())
def test_free_addresses_are_all_of_them_once(pool: tuple[ranges.RangeSet, set[int], int | None]) -> None:
    span, used, last = pool
    gateways = {entry.gateway for entry in span}
    inside = {number for entry in span for number in range(entry.first, entry.last + 1)}
    found = list(allocator.free(span, last, within(used)))
    assert len(found) == len(set(found))
    assert set(found) == inside - used - gateways


@given(pools())
def test_the_search_begins_after_the_last_one(pool: tuple[ranges.RangeSet, set[int], int | None]) -> None:
    span, used, last = pool
    order = [number for entry in span for number in range(entry.first, entry.last + 1)]
    if last in order:
        at = order.index(last) + 1
        order = order[at:] + order[:at]
    gateways = {entry.gateway for entry in span}
    expected = [number for number in order if number not in used and number not in gateways]
    assert list(allocator.free(span, last, within(used))) == expected


@given(pools(), st.dictionaries(st.integers(0, 60), st.floats(0, 100)))
def test_rested_addresses_come_first(
    pool: tuple[ranges.RangeSet, set[int], int | None], resting: dict[int, float]
) -> None:
    span, used, last = pool
    free = list(allocator.free(span, last, within(used)))
    found = allocator.pick(span, last, within(used), resting.get)
    rested = [number for number in free if number not in resting]
    if rested:
        assert found == rested[0]
    elif free:
        assert resting[found or 0] == min(resting[number] for number in free)
    else:
        assert found is None


# --- the store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path), "net")


def take(store: Store, name: str, *subnets: str, now: float = 0.0, **options: object) -> list[str]:
    return [one.address for one in store.reserve(conf(*(subnets or ("10.0.0.0/29",))), owner(name), (), now, **options)]  # type: ignore[arg-type]


def test_round_robin_over_each_set(store: Store) -> None:
    assert take(store, "a", "10.0.0.0/29", "fd00::/64") == ["10.0.0.2", "fd00::2"]
    assert take(store, "b", "10.0.0.0/29", "fd00::/64") == ["10.0.0.3", "fd00::3"]
    store.release("a", "eth0", 1.0)
    assert take(store, "c", "10.0.0.0/29", "fd00::/64", now=2.0) == ["10.0.0.4", "fd00::4"]


def test_a_released_address_rests_and_the_oldest_comes_back_first(store: Store) -> None:
    for name in "abcd":
        take(store, name)
    store.release("c", "eth0", 10.0)
    store.release("a", "eth0", 20.0)
    assert take(store, "e", now=30.0) == ["10.0.0.6"]
    assert take(store, "f", now=31.0) == ["10.0.0.4"]
    assert take(store, "g", now=32.0) == ["10.0.0.2"]


def test_exhaustion_says_which_set_and_to_try_later(store: Store) -> None:
    for name in "abcde":
        take(store, name)
    with pytest.raises(CniError) as refused:
        take(store, "f")
    assert refused.value.code == 11
    assert "10.0.0.1-10.0.0.6" in refused.value.message
    assert len(store.all()) == 5


def test_what_fails_half_way_reserves_nothing(store: Store) -> None:
    for name in "abcde":
        take(store, name)
    with pytest.raises(CniError):
        take(store, "f", "10.1.0.0/24", "10.0.0.0/29")
    assert store.held("f", "eth0") == []


def test_the_dead_are_reclaimed_when_nothing_is_left(store: Store) -> None:
    for name in "abcde":
        take(store, name)
    assert take(store, "f", gone=lambda one: one.container == "c") == ["10.0.0.4"]
    assert store.held("c", "eth0") == []


def test_two_reservations_for_one_attachment_are_refused(store: Store) -> None:
    take(store, "a")
    with pytest.raises(CniError) as refused:
        take(store, "a")
    assert "duplicate allocation" in refused.value.message


def test_an_earlier_boots_reservation_gives_way(store: Store) -> None:
    store.reserve(conf("10.0.0.0/29"), owner("a", "boot0"), (), 0.0)
    assert take(store, "a") == ["10.0.0.3"]
    assert len(store.all()) == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [("10.0.0.1", "gateway"), ("10.0.0.2", "held by a/eth0"), ("10.9.9.9", "no range"), ("fd00::5", "no range")],
)
def test_requested_addresses_that_cannot_be(store: Store, asked: str, words: str) -> None:
    take(store, "a")
    with pytest.raises(CniError) as refused:
        store.reserve(conf("10.0.0.0/29"), owner("b"), (asked,), 0.0)
    assert words in refused.value.message
    assert len(store.all()) == 1


def test_a_requested_address_is_given(store: Store) -> None:
    found = store.reserve(conf("10.0.0.0/29", "fd00::/64"), owner("b"), ("fd00::77",), 0.0)
    assert [one.address for one in found] == ["10.0.0.2", "fd00::77"]


def test_counts_for_the_metrics(store: Store) -> None:
    take(store, "a")
    assert store.counts() == (1, 4)
    store.release("a", "eth0", 0.0)
    assert store.counts() == (0, 5)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "torn", "foreign", "empty"])
def test_a_damaged_file_is_told_and_rebuilt_from_survivors(store: Store, tmp_path: Path, damage: str) -> None:
    for name in "abc":
        take(store, name)
    store.close()
    path = tmp_path / "net.db"
    whole = path.read_bytes()
    if damage == "foreign":
        path.unlink()
        sqlite3.connect(path).executescript("CREATE TABLE mine (x); INSERT INTO mine VALUES (1);").close()
    else:
        torn = whole[:4096] + b"\0" * 9000
        left = {"garbage": os.urandom(5000), "truncated": whole[:3000], "torn": torn, "empty": b""}
        path.write_bytes(left[damage])
    survivors = [(owner("a"), [(4, int.from_bytes(bytes((10, 0, 0, 2)), "big"))]), (owner("c"), [(4, 0x0A000004)])]
    fresh = Store(str(tmp_path), "net", lambda: survivors)
    with pytest.raises(database.Damaged) as told:
        take(fresh, "d")
    assert "net.db" in str(told.value)
    fresh.rebuild()
    assert sorted(one.address for one in fresh.all()) == ["10.0.0.2", "10.0.0.4"]
    assert take(fresh, "d") == ["10.0.0.3"]
    assert (tmp_path / "net.db.damaged").exists()


def test_a_file_that_is_gone_is_filled_from_survivors(tmp_path: Path) -> None:
    """ "Empty /var/lib/cni/networks" is what operators are told: the pods that run meanwhile keep their addresses."""
    store = Store(str(tmp_path), "net", lambda: [(owner("a"), [(4, 0x0A000002)])])
    assert take(store, "b") == ["10.0.0.3"]
    (tmp_path / "net.db").unlink()
    assert take(store, "c") == ["10.0.0.3"]
    assert [one.owner.container for one in store.all()] == ["a", "c"]


def test_a_file_that_is_replaced_is_opened_anew(store: Store, tmp_path: Path) -> None:
    take(store, "a")
    (tmp_path / "net.db").unlink()
    assert not store.unchanged()
    assert take(store, "b") == ["10.0.0.2"]


def _work(folder: str, number: int, queue: multiprocessing.Queue[list[str]]) -> None:
    store = Store(folder, "net")
    mine = []
    for step in range(15):
        mine += take(store, f"p{number}-{step}", "10.0.0.0/16", "fd00::/64", now=float(step))
        if step % 5 == 4:
            store.release(f"p{number}-{step - 2}", "eth0", float(step))
    queue.put(mine)


def test_many_processes_at_once_share_no_address(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=_work, args=(str(tmp_path), number, queue)) for number in range(4)]
    for worker in workers:
        worker.start()
    given_out = [address for _ in workers for address in queue.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert len(given_out) == len(set(given_out)) == 4 * 15 * 2
    assert len(Store(str(tmp_path), "net").all()) == 4 * 12 * 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "del", "gc"]), st.integers(0, 7)), max_size=40))
def test_any_history_keeps_addresses_unique(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]]
) -> None:
    store = Store(str(tmp_path_factory.mktemp("ipam")), "net")
    held: dict[str, str] = {}
    for now, (what, number) in enumerate(history):
        name = f"c{number}"
        if what == "add":
            try:
                (address,) = take(store, name, now=float(now))
            except CniError as error:
                assert name in held or len(held) == 5, error  # noqa: PT017
                continue
            assert address not in held.values()
            held[name] = address
        elif what == "del":
            store.release(name, "eth0", float(now))
            held.pop(name, None)
        else:
            store.release_where(lambda one, name=name: one.container == name, float(now))  # type: ignore[misc]
            held.pop(name, None)
        assert {one.owner.container: one.address for one in store.all()} == held
    store.close()


def test_no_json_of_ours_is_needed_to_read_the_database(store: Store, tmp_path: Path) -> None:
    """An operator can ask with the sqlite3 program: the columns are plain."""
    take(store, "a")
    row = (
        sqlite3.connect(tmp_path / "net.db")
        .execute("SELECT hex(address), container, boot FROM reservations")
        .fetchone()
    )
    assert json.dumps(row) == '["0A000002", "a", "b1"]'
