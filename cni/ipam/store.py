"""Who holds which address: one SQLite file a network, safe under concurrent processes and a kill at any moment.

It knows reservations, the round robin's place and what rests after release; which address to hand out is the
allocator's business.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from cni import spec
from cni.database import Database
from cni.ipam import allocator
from cni.ipam.ranges import IpamConf, Range, RangeSet, packed, shown

_SCHEMA = """
CREATE TABLE IF NOT EXISTS reservations (
    family INTEGER, address BLOB, container TEXT, ifname TEXT, boot TEXT,
    netns TEXT, device INTEGER, inode INTEGER, at REAL, PRIMARY KEY (family, address)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS owners ON reservations (container, ifname);
CREATE TABLE IF NOT EXISTS resting (family INTEGER, address BLOB, at REAL, PRIMARY KEY (family, address)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rested ON resting (at);
CREATE TABLE IF NOT EXISTS cursors (range_set TEXT PRIMARY KEY, address BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS capacity (id INTEGER PRIMARY KEY CHECK (id = 0), addresses INTEGER);
"""
_VERSION = 1


class Owner(NamedTuple):
    """Who holds an address: container and interface, and by what it can be told that they are gone.

    Of a pod that was found running, `netns` is the name of its host link; one that another made may have no container.
    """

    container: str
    ifname: str
    boot: str = ""
    netns: str = ""
    device: int = 0
    inode: int = 0
    at: float = 0.0


class Allotment(NamedTuple):
    """One address that a pod got, and the range it is from."""

    range: Range
    number: int

    @property
    def address(self) -> str:
        """The address as text, without prefix length."""
        return shown(self.number, self.range.family)


class Held(NamedTuple):
    """One reservation."""

    family: int
    number: int
    owner: Owner

    @property
    def address(self) -> str:
        """The address as text."""
        return shown(self.number, self.family)


Gone = Callable[[Owner], bool]
Survivors = Callable[[], Iterable[tuple[Owner, list[tuple[int, int]]]]]
"""Who has an address without any file's knowing: owners and their addresses as (family, number)."""


def never(_: Owner) -> bool:
    """Say that no owner is gone."""
    return False


def nobody() -> tuple[()]:
    """Return no survivors."""
    return ()


class Store:
    """The reservations of one network. One instance serves many threads. Methods raise `CniError` and `Damaged`."""

    def __init__(self, data_dir: str, network: str, survivors: Survivors = nobody) -> None:
        self.path = f"{data_dir}/{network}.db"

        def fill(db: sqlite3.Connection) -> None:
            for owner, addresses in survivors():
                for family, number in addresses:
                    with suppress(sqlite3.IntegrityError):
                        _insert(db, family, number, owner, owner.at)

        self._db = Database(self.path, _SCHEMA, _VERSION, fill)

    def close(self) -> None:
        """Close file and lock."""
        self._db.close()

    def reserve(
        self, conf: IpamConf, owner: Owner, requested: Iterable[str], now: float, gone: Gone = never
    ) -> list[Allotment]:
        """Reserve one address of every range set for `owner`, all of them or none. Raise `CniError`."""
        wanted = list(dict.fromkeys(requested))
        with self._db.transaction() as db:
            self._forget_earlier(db, owner, now, gone)
            db.execute("DELETE FROM resting WHERE at < ?", (now - allocator.REST_SECONDS,))
            allotments = []
            for number, ranges in enumerate(conf.sets):
                one = _requested_of(db, ranges, wanted) or _next_of(db, number, ranges, now, gone)
                _insert(db, one.range.family, one.number, owner, now)
                allotments.append(one)
            if wanted:
                raise spec.CniError(
                    spec.BAD_CONFIG, f"requested IPs {', '.join(wanted)} are in no range of the network"
                )
            total = sum(allocator.capacity(ranges) for ranges in conf.sets)
            if db.execute("SELECT addresses FROM capacity").fetchone() != (total,):
                db.execute("INSERT OR REPLACE INTO capacity VALUES (0, ?)", (min(total, 1 << 62),))
            return allotments

    def release(self, container: str, ifname: str, now: float) -> list[Held]:
        """Release what one attachment holds; return it, nothing when it holds nothing."""
        if not self._db.exists():
            return []
        with self._db.transaction() as db:
            return _release(db, _held(db, "WHERE container = ? AND ifname = ?", (container, ifname)), now)

    def release_where(self, gone: Gone, now: float) -> list[Held]:
        """Release what the owners hold that `gone` says are no more; return it."""
        if not self._db.exists():
            return []
        with self._db.transaction() as db:
            return _release(db, [held for held in _held(db) if gone(held.owner)], now)

    def held(self, container: str, ifname: str) -> list[Held]:
        """Return what one attachment holds."""
        if not self._db.exists():
            return []
        with self._db.transaction() as db:
            return _held(db, "WHERE container = ? AND ifname = ?", (container, ifname))

    def all(self) -> list[Held]:
        """Return all reservations."""
        if not self._db.exists():
            return []
        with self._db.transaction() as db:
            return _held(db)

    def free(self, ranges: RangeSet) -> int:
        """Return how many addresses of a range set are free."""
        if not self._db.exists():
            return allocator.capacity(ranges)
        used = 0
        with self._db.transaction() as db:
            for entry in ranges:
                gateway = packed(entry.gateway, entry.family)
                used += db.execute(
                    "SELECT count(*) FROM reservations"
                    " WHERE family = ? AND address BETWEEN ? AND ? AND address != ?",
                    (entry.family, packed(entry.first, entry.family), packed(entry.last, entry.family), gateway),
                ).fetchone()[0]  # fmt: skip
        return allocator.capacity(ranges) - used

    def counts(self) -> tuple[int, int]:
        """Return how many addresses are used and how many free, by the configuration last seen."""
        if not self._db.exists():
            return 0, 0
        with self._db.transaction() as db:
            used = db.execute("SELECT count(*) FROM reservations").fetchone()[0]
            total = db.execute("SELECT addresses FROM capacity").fetchone() or (0,)
            return used, max(0, total[0] - used)

    def unchanged(self) -> bool:
        """Say whether the file is still the one that this store wrote to."""
        return self._db.unchanged()

    def of_earlier_boot(self) -> bool:
        """Say whether the file was last written before the machine started."""
        return os.path.getmtime(self.path) < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def rebuild(self) -> None:
        """Put the damaged file aside and make one that knows the survivors."""
        self._db.rebuild()

    def _forget_earlier(self, db: sqlite3.Connection, owner: Owner, now: float, gone: Gone) -> None:
        """Release what the same attachment held before, if that is over; refuse if it is not. Raise `CniError`."""
        earlier = _held(db, "WHERE container = ? AND ifname = ?", (owner.container, owner.ifname))
        for held in earlier:
            if held.owner.boot == owner.boot and not gone(held.owner):
                raise spec.CniError(
                    spec.FAILED,
                    f"{held.address} has been allocated to {owner.container}/{owner.ifname}, duplicate allocation is "
                    "not allowed: call DEL first",
                )
        _release(db, earlier, now)


def networks(data_dir: str) -> list[str]:
    """Return the networks that have a database in `data_dir`."""
    try:
        names = os.listdir(data_dir)
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(".db") for name in names if name.endswith(".db"))


def _requested_of(db: sqlite3.Connection, ranges: RangeSet, wanted: list[str]) -> Allotment | None:
    """Return the allotment of the first requested address that is in this set, and take it off the list."""
    import ipaddress

    for text in wanted:
        number, family = int(ipaddress.ip_address(text)), ipaddress.ip_address(text).version
        entry = next((e for e in ranges if e.family == family and e.first <= number <= e.last), None)
        if entry is None:
            continue
        if number in {other.gateway for other in ranges}:
            raise spec.CniError(spec.BAD_CONFIG, f"requested IP {text} is the gateway of {entry.subnet}")
        holder = _held(db, "WHERE family = ? AND address = ?", (family, packed(number, family)))
        if holder:
            owner = holder[0].owner
            raise spec.CniError(
                spec.FAILED, f"requested IP {text} is not available: held by {owner.container}/{owner.ifname}"
            )
        wanted.remove(text)
        return Allotment(entry, number)
    return None


def _next_of(db: sqlite3.Connection, set_number: int, ranges: RangeSet, now: float, gone: Gone) -> Allotment:
    family = ranges[0].family

    def taken(first: int, last: int) -> Iterator[int]:
        rows = db.execute(
            "SELECT address FROM reservations WHERE family = ? AND address BETWEEN ? AND ? ORDER BY address",
            (family, packed(first, family), packed(last, family)),
        )
        return (int.from_bytes(row[0], "big") for row in rows)

    def resting(number: int) -> float | None:
        row = db.execute(
            "SELECT at FROM resting WHERE family = ? AND address = ?", (family, packed(number, family))
        ).fetchone()
        return row[0] if row else None

    key = f"{set_number}"
    row = db.execute("SELECT address FROM cursors WHERE range_set = ?", (key,)).fetchone()
    last = int.from_bytes(row[0], "big") if row and len(row[0]) == (4 if family == 4 else 16) else None
    number = allocator.pick(ranges, last, taken, resting)
    if number is None and _release(db, [held for held in _held(db) if gone(held.owner)], now):
        number = allocator.pick(ranges, last, taken, resting)
    if number is None:
        spans = ", ".join(f"{shown(e.first, e.family)}-{shown(e.last, e.family)}" for e in ranges)
        raise spec.CniError(
            spec.TRY_LATER, f"no IP addresses available in range set: {spans}", "an address is free after the next DEL"
        )
    db.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?)", (key, packed(number, family)))
    entry = next(e for e in ranges if e.first <= number <= e.last)
    return Allotment(entry, number)


def _insert(db: sqlite3.Connection, family: int, number: int, owner: Owner, now: float) -> None:
    address = packed(number, family)
    db.execute("INSERT INTO reservations VALUES (?,?,?,?,?,?,?,?,?)", (family, address, *owner[:6], now))
    db.execute("DELETE FROM resting WHERE family = ? AND address = ?", (family, address))


def _held(db: sqlite3.Connection, where: str = "", values: tuple[object, ...] = ()) -> list[Held]:
    rows = db.execute(
        "SELECT family, address, container, ifname, boot, netns, device, inode, at FROM reservations " + where, values
    )
    return [Held(row[0], int.from_bytes(row[1], "big"), Owner(*row[2:])) for row in rows]


def _release(db: sqlite3.Connection, held: list[Held], now: float) -> list[Held]:
    for one in held:
        key = one.family, packed(one.number, one.family)
        db.execute("DELETE FROM reservations WHERE family = ? AND address = ?", key)
        db.execute("INSERT OR REPLACE INTO resting VALUES (?, ?, ?)", (*key, now))
    return held
