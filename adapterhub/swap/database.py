"""The server's SQLite database: one connection that writes and one that reads, each under a lock; each layer brings its
own migrations.

Write-ahead logging with full sync: once a transaction has returned it survives a `kill -9` and a loss of power. A
reader never waits for a writer's sync, so that looking up a key or a model does not hold up the server's event loop.
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

Row = dict[str, Any]
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
        self._writer = _connect(path)
        self._write_lock = threading.RLock()
        path.chmod(0o600)
        self._reader = _connect(path)
        self._reader.conn.execute("PRAGMA query_only = ON")
        self._read_lock = threading.Lock()
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
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise StorageFull("The server's disk is full; nothing was stored. Ask the operator.") from error
                raise
            finally:
                if outermost:
                    self._writing.now = False

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        with self.transaction() as db:
            db.table(table).insert(row)

    def update(self, table: str, key: str, **changes: Any) -> None:
        with self.transaction() as db:
            db.table(table).update(key, changes)

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        if getattr(self._writing, "now", False):
            return list(self._writer.query(sql, args))
        with self._read_lock:
            return list(self._reader.query(sql, args))

    def row(self, sql: str, args: Sequence[Any] = ()) -> Row | None:
        found = self.rows(sql, args)
        return found[0] if found else None

    def scrub(self) -> None:
        """What was deleted until now is in the files no more, the log of what was written included."""
        with self._write_lock, self._read_lock:
            self._writer.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()


def _connect(path: Path) -> sqlite_utils.Database:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=_BUSY_SECONDS)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
    return sqlite_utils.Database(connection)
