"""What every attachment has in the kernel, written before it is made: whoever is killed, the next DEL knows.

One SQLite file under the state folder: attachments, and the host ports they claim. A missing record is no error: links
and rules carry their owner, and are found the slow way then.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any, NamedTuple

from cni.database import Damaged, Database

_SCHEMA = """
CREATE TABLE attachments (container TEXT, ifname TEXT, network TEXT, record TEXT, PRIMARY KEY (container, ifname))
    WITHOUT ROWID;
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
    ready: bool = False
    bridge: str = ""
    made_bridge: bool = False
    gateways: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    """nftables elements, as `map { key }`."""
    iptables: bool = False
    spoof_check: bool = False
    ifb: str = ""
    udp_ports: tuple[int, ...] = ()

    @property
    def rules(self) -> bool:
        """Whether it has anything in our nftables table."""
        return bool(self.elements) or self.spoof_check


class Claim(NamedTuple):
    """One host port of one attachment; `address` is 0.0.0.0 or :: for all of a family."""

    protocol: str
    port: int
    address: str


class Journal:
    """The attachments of one node. Methods raise `CniError`."""

    def __init__(self, state_dir: str) -> None:
        self._db = Database(f"{state_dir}/attachments.db", _SCHEMA, 1)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def write(self, record: Record) -> None:
        """Write a record, new or in place of the attachment's earlier one."""
        try:
            self._write(record)
        except Damaged:
            self._db.rebuild(lambda _: None)
            self._write(record)

    def read(self, container: str, ifname: str) -> Record | None:
        """Return an attachment's record."""
        if not self._db.exists():
            return None
        found = self._select("WHERE container = ? AND ifname = ?", (container, ifname))
        return found[0] if found else None

    def all(self, network: str = "") -> list[Record]:
        """Return all records, or those of one network."""
        if not self._db.exists():
            return []
        return self._select("WHERE network = ?", (network,)) if network else self._select("", ())

    def forget(self, container: str, ifname: str) -> None:
        """Remove an attachment's record and claims."""
        if not self._db.exists():
            return
        try:
            with self._db.transaction() as db:
                for table in ("attachments", "ports"):
                    db.execute(f"DELETE FROM {table} WHERE container = ? AND ifname = ?", (container, ifname))
        except Damaged:
            self._db.rebuild(lambda _: None)

    def _write(self, record: Record) -> None:
        values = record._asdict()
        key = values.pop("container"), values.pop("ifname"), values.pop("network")
        with self._db.transaction() as db:
            db.execute("INSERT OR REPLACE INTO attachments VALUES (?, ?, ?, ?)", (*key, json.dumps(values)))

    def _select(self, where: str, values: tuple[object, ...]) -> list[Record]:
        try:
            with self._db.transaction() as db:
                return [_record(row) for row in db.execute(f"SELECT * FROM attachments {where}", values)]
        except Damaged:
            self._db.rebuild(lambda _: None)
            return []


def _record(row: sqlite3.Row | tuple[str, str, str, str]) -> Record:
    values: dict[str, Any] = json.loads(row[3])
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    known = {key: value for key, value in (values | lists).items() if key in Record._fields}
    return Record(row[0], row[1], row[2], **known)
