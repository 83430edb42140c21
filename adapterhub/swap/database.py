"""The server's SQLite database: one connection, shared under a lock; each layer brings its own migrations.

Write-ahead logging with full sync: once a transaction has returned it survives a `kill -9` and a loss of power.
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
        connection = sqlite3.connect(path, check_same_thread=False, timeout=_BUSY_SECONDS)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        path.chmod(0o600)
        self._db = sqlite_utils.Database(connection)
        self._lock = threading.RLock()

    def migrate(self, migrations: Migrations) -> None:
        with self._lock:
            migrations.apply(self._db)

    @contextmanager
    def transaction(self) -> Iterator[sqlite_utils.Database]:
        """All or nothing; nested ones become savepoints. Raises StorageFull when the disk is full."""
        with self._lock:
            connection = self._db.conn
            outermost = not connection.in_transaction
            try:
                if outermost:  # take the write lock now: a read that becomes a write may find it was overtaken
                    connection.execute("BEGIN IMMEDIATE")
                with self._db.atomic():
                    yield self._db
                if outermost:
                    connection.commit()
            except BaseException as error:
                if outermost:
                    connection.rollback()
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise StorageFull("The server's disk is full; nothing was stored. Ask the operator.") from error
                raise

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        with self.transaction() as db:
            db.table(table).insert(row)

    def update(self, table: str, key: str, **changes: Any) -> None:
        with self.transaction() as db:
            db.table(table).update(key, changes)

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        with self._lock:
            return list(self._db.query(sql, args))

    def row(self, sql: str, args: Sequence[Any] = ()) -> Row | None:
        found = self.rows(sql, args)
        return found[0] if found else None

    def close(self) -> None:
        with self._lock:
            self._db.close()
