"""What every attachment has in the kernel, written before it is made: whoever is killed, the next DEL knows.

One SQLite file under the state folder: attachments, and the host ports they claim. A missing record is no error: links
and rules carry their owner, and are found the slow way then.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from cni import hostport
from cni.database import Damaged, Database

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE attachments (container TEXT, ifname TEXT, network TEXT, rules INTEGER, record TEXT,
    PRIMARY KEY (container, ifname)) WITHOUT ROWID;
CREATE TABLE ports (protocol TEXT, port INTEGER, address TEXT, container TEXT, ifname TEXT,
    PRIMARY KEY (protocol, port, address)) WITHOUT ROWID;
CREATE INDEX port_owners ON ports (container, ifname);
"""


class Record(NamedTuple):
    """What one attachment has, or was about to get."""

    container: str
    ifname: str
    network: str
    netns: str = ""
    device: int = 0
    inode: int = 0
    bridge: str = ""
    made_bridge: bool = False
    """Whether its ADD made the bridge, and has not come to its end."""
    addresses: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    """nftables elements, as they are named for removal."""
    iptables: bool = False
    ifb: bool = False
    udp_ports: tuple[tuple[int, int], ...] = ()
    """UDP host ports with their family, 4 or 6."""


class Claim(NamedTuple):
    """One host port; `address` is 0.0.0.0 or :: for all of a family."""

    protocol: str
    port: int
    address: str


class PortTaken(Exception):
    """A host port is claimed by another attachment, whose record is `holder`."""

    def __init__(self, claim: Claim, holder: Record) -> None:
        super().__init__(f"{claim.protocol} port {claim.port} of {claim.address}")
        self.claim = claim
        self.holder = holder


class Attached(Exception):
    """The same container and interface are attached to another network; `holder` is that record."""

    def __init__(self, holder: Record) -> None:
        super().__init__(f"{holder.container}/{holder.ifname} is attached to network {holder.network}")
        self.holder = holder


class Journal:
    """The attachments of one node. Methods raise `CniError`."""

    def __init__(self, state_dir: str) -> None:
        self._db = Database(f"{state_dir}/attachments.db", _SCHEMA, 1)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def write(self, record: Record, claims: tuple[Claim, ...] = ()) -> bool:
        """Write a record, in place of the attachment's earlier one, with its claims; all or nothing.

        Return whether it is the only one that has nftables elements. Raise `PortTaken`, `Attached`.
        """
        values = record._asdict()
        key = values.pop("container"), values.pop("ifname"), values.pop("network")

        def work(db: sqlite3.Connection) -> bool:
            for other in _select(db, "WHERE container = ? AND ifname = ? AND network != ?", key):
                raise Attached(other)
            for claim in claims:
                _claim(db, claim, record)
            row = (*key, int(bool(record.elements)), json.dumps(values))
            db.execute("INSERT OR REPLACE INTO attachments VALUES (?, ?, ?, ?, ?)", row)
            return bool(db.execute("SELECT count(*) FROM attachments WHERE rules = 1").fetchone()[0] == 1)

        return self._do(work)

    def read(self, container: str, ifname: str) -> Record | None:
        """Return an attachment's record."""
        if not self._db.exists():
            return None
        found = self._do(lambda db: _select(db, "WHERE container = ? AND ifname = ?", (container, ifname)))
        return found[0] if found else None

    def all(self, network: str = "") -> list[Record]:
        """Return all records, or those of one network."""
        if not self._db.exists():
            return []
        where: tuple[str, tuple[object, ...]] = ("WHERE network = ?", (network,)) if network else ("", ())
        return self._do(lambda db: _select(db, *where))

    def forget(self, container: str, ifname: str, last: Callable[[], None]) -> None:
        """Remove an attachment's record and claims; `last` is called when no record with elements is left.

        Nobody can write a record meanwhile, and every ADD writes its own before its elements.
        """
        if not self._db.exists():
            return

        def work(db: sqlite3.Connection) -> None:
            key = (container, ifname)
            had = db.execute("SELECT rules FROM attachments WHERE container = ? AND ifname = ?", key).fetchone()
            for table in ("attachments", "ports"):
                db.execute(f"DELETE FROM {table} WHERE container = ? AND ifname = ?", key)
            if had and had[0] and not db.execute("SELECT 1 FROM attachments WHERE rules = 1 LIMIT 1").fetchone():
                last()

        self._do(work)

    def when_unused(self, last: Callable[[], None]) -> None:
        """Call `last` if no record has elements; nobody can write one meanwhile."""

        def work(db: sqlite3.Connection) -> None:
            if not db.execute("SELECT 1 FROM attachments WHERE rules = 1 LIMIT 1").fetchone():
                last()

        self._do(work)

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in a transaction; a damaged file is begun anew: links and elements tell their owners."""
        try:
            with self._db.transaction() as db:
                return work(db)
        except Damaged:
            self._db.rebuild()
            with self._db.transaction() as db:
                return work(db)


def _claim(db: sqlite3.Connection, claim: Claim, record: Record) -> None:
    rows = db.execute(
        "SELECT address, container, ifname FROM ports WHERE protocol = ? AND port = ?", (claim.protocol, claim.port)
    ).fetchall()
    for address, container, ifname in rows:
        if (container, ifname) != (record.container, record.ifname) and hostport.overlap(address, claim.address):
            holder = _select(db, "WHERE container = ? AND ifname = ?", (container, ifname))
            raise PortTaken(claim, holder[0] if holder else Record(container, ifname, ""))
    row = (claim.protocol, claim.port, claim.address, record.container, record.ifname)
    db.execute("INSERT OR REPLACE INTO ports VALUES (?, ?, ?, ?, ?)", row)


def _select(db: sqlite3.Connection, where: str, values: tuple[object, ...]) -> list[Record]:
    query = "SELECT container, ifname, network, record FROM attachments " + where
    return [_record(row) for row in db.execute(query, values)]


def _record(row: tuple[str, str, str, str]) -> Record:
    values: dict[str, Any] = json.loads(row[3])
    known = {key: _frozen(value) for key, value in values.items() if key in Record._fields}
    return Record(row[0], row[1], row[2], **known)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
