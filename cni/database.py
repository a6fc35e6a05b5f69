"""One SQLite file that survives concurrent processes, kills and being replaced; it knows no table's meaning.

A file lock is taken around every transaction: SQLite's own waiting polls, `flock` wakes.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from cni import spec


class Damaged(Exception):
    """The file is no database of ours any more; the message names it."""


Fill = Callable[[sqlite3.Connection], None]


class Database:
    """A file with a schema. One instance serves many threads, one transaction at a time.

    `fill` puts into a new file what is known from elsewhere: the old one may have been removed while pods run.
    """

    def __init__(self, path: str, schema: str, version: int, fill: Fill = lambda _: None) -> None:
        self.path = path
        self._schema = schema
        self._version = version
        self._fill = fill
        self._lock = threading.Lock()
        self._lock_fd = -1
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)

    def close(self) -> None:
        """Close file and lock."""
        with self._lock:
            self._disconnect()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

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

    def rebuild(self) -> None:
        """Put a damaged file aside (as `….damaged`) and make one anew; an intact file stays."""
        with self._locked():
            self._disconnect()
            try:
                if self._open().execute("PRAGMA quick_check").fetchone() == ("ok",):
                    return  # another process was faster
            except (Damaged, sqlite3.DatabaseError):
                pass
            self._disconnect()
            with suppress(FileNotFoundError):
                os.replace(self.path, f"{self.path}.damaged")
            self._open()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            if self._lock_fd < 0:
                os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
                self._lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def _open(self) -> sqlite3.Connection:
        if not self.exists():
            self._create()
        db = sqlite3.connect(self.path, timeout=20, isolation_level=None, check_same_thread=False)
        self._connection = db
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                raise Damaged(f"database {self.path} is empty, or holds another program's tables")
            if version != self._version:
                raise spec.CniError(
                    spec.IO_FAILURE, f"database {self.path} is of version {version}, this program knows {self._version}"
                )
            db.execute("PRAGMA journal_mode = TRUNCATE")
            # a kill loses nothing without fsync; a power cut may, and then no pod is left that the loss could hurt
            db.execute("PRAGMA synchronous = OFF")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise Damaged(f"database {self.path}: {error}") from None
        self._identity = _identity(self.path)
        return db

    def _create(self) -> None:
        """Make the file under another name, so that one without its tables is always a damaged one."""
        draft = f"{self.path}.new"
        for left in (draft, f"{draft}-journal", f"{self.path}-journal"):  # the old file's would be played into ours
            with suppress(FileNotFoundError):
                os.unlink(left)
        with closing(sqlite3.connect(draft, isolation_level=None)) as db:
            os.chmod(draft, 0o600)
            db.execute("PRAGMA synchronous = OFF")
            db.executescript(f"BEGIN IMMEDIATE; {self._schema} PRAGMA user_version = {self._version};")
            self._fill(db)
            db.execute("COMMIT")
        os.replace(draft, self.path)

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
