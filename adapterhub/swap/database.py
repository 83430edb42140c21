"""The server's SQLite database: one connection that writes, under a lock, and as many that read as do so at once; each
layer brings its own migrations.

Write-ahead logging with full sync: once a transaction has returned it survives a `kill -9` and a loss of power. A
reader waits for no writer's sync and for no other reader, so that looking up a key or a model does not hold up the
server's event loop, whatever report is being made.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.errors import StorageFull
from adapterhub.swap.ballast import Ballast
from adapterhub.swap.files import has_room

Row = dict[str, Any]
_PROBE = 64 * 1024  # bytes; a transaction that failed on a full disk needed a page at least
_BUSY_SECONDS = 30  # another process, such as `adapterhub keys create`, may hold the write lock for a moment


def new_id(prefix: str) -> str:
    """`prefix-` and 96 random bits: unguessable, so that ids say nothing about other owners."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since the epoch, as OpenAI's objects give times."""
    return int(time.time())


class Database:
    """Safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        self.ballast = Ballast(path.parent)
        with self.ballast.lent():  # even to open a database takes some room
            self._writer = _connect(path)
            path.chmod(0o600)
        self._write_lock = threading.RLock()
        self._readers: list[sqlite_utils.Database] = []  # those that nobody reads with
        self._read_lock = threading.Lock()  # guards the list, and whether it is closed
        self._closed = False
        self._writing = threading.local()  # whether this thread is in a transaction, whose rows it must see

    def migrate(self, migrations: Migrations) -> None:
        with self._write_lock:
            migrations.apply(self._writer)

    @contextmanager
    def transaction(self) -> Iterator[sqlite_utils.Database]:
        """All or nothing; nested ones become savepoints. Raises StorageFull when the disk is full."""
        with self._write_lock:
            connection = self._writer.conn
            outermost = not connection.in_transaction
            try:
                if outermost:  # take the write lock now: a read that becomes a write may find it was overtaken
                    connection.execute("BEGIN IMMEDIATE")
                    self._writing.now = True
                with self._writer.atomic():
                    yield self._writer
                if outermost:
                    connection.commit()
            except BaseException as error:
                if outermost:
                    connection.rollback()
                if isinstance(error, sqlite3.OperationalError) and self._full(error):
                    raise StorageFull("The server's disk is full; nothing was stored. Ask the operator.") from error
                raise
            finally:
                if outermost:
                    self._writing.now = False

    @contextmanager
    def freeing(self) -> Iterator[sqlite_utils.Database]:
        """A transaction that takes away: when the disk is full it has the room that is kept for that."""
        with self.ballast.lent(), self.transaction() as db:
            yield db

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        with self.transaction() as db:
            db.table(table).insert(row)

    def update(self, table: str, key: str, **changes: Any) -> None:
        with self.transaction() as db:
            db.table(table).update(key, changes)

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        if getattr(self._writing, "now", False):
            return list(self._writer.query(sql, args))
        with self._reader() as reader:
            return list(reader.query(sql, args))

    def row(self, sql: str, args: Sequence[Any] = ()) -> Row | None:
        found = self.rows(sql, args)
        return found[0] if found else None

    def scrub(self) -> None:
        """What was deleted until now is in the files no more, the log of what was written included."""
        with self._write_lock:  # and once nobody reads any more what was before, which SQLite waits for
            self._writer.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Who still reads does so to the end."""
        with self._write_lock, self._read_lock:
            self._closed = True
            self._writer.close()
            for reader in self._readers:
                reader.close()

    @contextmanager
    def _reader(self) -> Iterator[sqlite_utils.Database]:
        with self._read_lock:
            if self._closed:
                raise sqlite3.ProgrammingError("The database is closed.")
            reader = self._readers.pop() if self._readers else None
        if reader is None:
            reader = _connect(self._path)
            reader.conn.execute("PRAGMA query_only = ON")
        try:
            yield reader
        finally:
            with self._read_lock:
                if self._closed:
                    reader.close()
                else:
                    self._readers.append(reader)

    def _full(self, error: sqlite3.OperationalError) -> bool:
        """Whether it is for want of room: SQLite tells quotas and limits of file sizes from a broken disk no more."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code & 0xFF != sqlite3.SQLITE_IOERR:
            return code == sqlite3.SQLITE_FULL
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        end = max(file.stat().st_size if file.exists() else 0 for file in files)
        return not has_room(self._path.parent, _PROBE, end)


def _connect(path: Path) -> sqlite_utils.Database:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=_BUSY_SECONDS)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
    return sqlite_utils.Database(connection)
