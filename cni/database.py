"""One SQLite file that survives concurrent processes, kills and being replaced; it knows no table's meaning.

A file lock is taken around every transaction: SQLite's own waiting polls, `flock` wakes.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cni import spec


class Damaged(Exception):
    """The file is no database of ours any more; the message names it."""


class Database:
    """A file with a schema. One instance serves many threads, one transaction at a time."""

    def __init__(self, path: str, schema: str, version: int) -> None:
        self.path = path
        self._schema = schema
        self._version = version
        self._lock = threading.Lock()
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._lock_fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)

    def close(self) -> None:
        """Close file and lock."""
        with self._lock:
            self._disconnect()
            os.close(self._lock_fd)

    def exists(self) -> bool:
        """Say whether there is a file; a reader need not make one."""
        return os.path.exists(self.path)

    def unchanged(self) -> bool:
        """Say whether the file is still the one last used: a repair puts a new one in its place."""
        return _identity(self.path) == self._identity

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the connection inside a transaction that no other process runs beside. Raise `CniError`, `Damaged`."""
        with self._locked():
            try:
                db = self._connection
                if db is None or not self.unchanged():
                    self._disconnect()
                    db = self._open()
                try:
                    db.execute("BEGIN IMMEDIATE")
                    yield db
                    db.commit()
                except BaseException:
                    with suppress(sqlite3.Error):
                        db.rollback()
                    raise
            except sqlite3.OperationalError as error:
                if "disk image" in str(error) or "no such" in str(error):
                    raise Damaged(f"database {self.path}: {error}") from None
                raise spec.CniError(spec.IO_FAILURE, f"database {self.path}: {error}") from None
            except sqlite3.DatabaseError as error:
                raise Damaged(f"database {self.path}: {error}") from None

    def rebuild(self, fill: Callable[[sqlite3.Connection], None]) -> None:
        """Put a damaged file aside (as `….damaged`) and make one that `fill` fills; an intact file stays."""
        with self._locked():
            self._disconnect()
            try:
                if self._open().execute("PRAGMA quick_check").fetchone() == ("ok",):
                    return  # another process was faster
            except (Damaged, sqlite3.DatabaseError):
                pass
            self._disconnect()
            with suppress(FileNotFoundError):
                os.unlink(f"{self.path}-journal")
            with suppress(FileNotFoundError):
                os.replace(self.path, f"{self.path}.damaged")
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            fill(db)
            db.commit()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=20, isolation_level=None, check_same_thread=False)
        self._connection = db
        try:
            os.chmod(self.path, 0o600)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, self._version):
                raise spec.CniError(
                    spec.IO_FAILURE, f"database {self.path} is of version {version}, this program knows {self._version}"
                )
            db.execute("PRAGMA journal_mode = TRUNCATE")
            # a kill loses nothing without fsync; a power cut may, and then no pod is left that the loss could hurt
            db.execute("PRAGMA synchronous = OFF")
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise Damaged(f"database {self.path} holds another program's tables")
                db.executescript(f"BEGIN IMMEDIATE; {self._schema} PRAGMA user_version = {self._version}; COMMIT;")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise Damaged(f"database {self.path}: {error}") from None
        self._identity = _identity(self.path)
        return db

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino
