"""Files of users: a row in the database, the bytes under `uploads/` by the file's id. Every look-up is by owner."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.catalog import unknown_cursor
from adapterhub.swap.database import Database, new_id, now
from adapterhub.swap.files import remove_unnamed, stream_durably, sync_directory

PURPOSES = ("fine-tune", "assistants", "batch", "user_data", "vision", "evals")  # of uploads
RESULTS = "fine-tune-results"
_KEPT = "(expires_at is null or expires_at > ?)"  # at that time
migrations = Migrations("adapterhub.files")


@migrations()
def create_files(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table files (
            id text primary key, owner text not null, filename text not null, purpose text not null,
            bytes integer not null, created_at integer not null)
    """)
    db.execute("create index files_by_owner on files (owner, created_at)")


@migrations()
def create_uploads(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table uploads (
            id text primary key, owner text not null, filename text not null, purpose text not null,
            bytes integer not null, status text not null, file text, created_at integer not null,
            expires_at integer not null)
    """)
    db.execute("create index uploads_by_owner on uploads (owner)")
    db.execute("create index uploads_by_expiry on uploads (expires_at)")
    db.execute("""
        create table parts (
            id text primary key, upload text not null references uploads(id) on delete cascade, bytes integer not null,
            created_at integer not null)
    """)
    db.execute("create index parts_by_upload on parts (upload)")


@migrations()
def let_files_expire(db: sqlite_utils.Database) -> None:
    db.execute("alter table files add column expires_at integer")
    db.execute("create index files_by_expiry on files (expires_at) where expires_at is not null")
    db.execute("alter table uploads add column file_seconds integer")


@dataclass(frozen=True)
class StoredFile:
    """`expires_at`: None for one that stays until it is deleted."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None


class FileStore:
    """Safe to use from any thread."""

    def __init__(self, database: Database, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        database.migrate(migrations)
        self._database = database
        self._directory = directory

    def upload(
        self, owner: str, filename: str, purpose: str, chunks: Iterable[bytes], seconds: int | None = None
    ) -> StoredFile:
        """Stores an upload; when it returns, the file survives a crash. Raises BadRequest or StorageFull."""
        check_purpose(purpose)
        stored = self.write(owner, plain_name(filename), purpose, chunks, seconds)
        try:
            if stored.bytes == 0:
                raise BadRequest("The uploaded file is empty.", param="file", code="empty_file")
            self.add(stored)
        except BaseException:
            self.discard(stored)
            raise
        return stored

    def write(
        self, owner: str, filename: str, purpose: str, chunks: Iterable[bytes], seconds: int | None = None
    ) -> StoredFile:
        """Writes a file's bytes, synced, for a row that `add` makes later: until then nobody sees the file, and a start
        removes it. `seconds`: for how long it is kept; None: until it is deleted. Raises StorageFull."""
        identity = new_id("file")
        size = stream_durably(self.path(identity), chunks)
        made = now()
        return StoredFile(identity, owner, filename, purpose, size, made, None if seconds is None else made + seconds)

    def add(self, written: StoredFile) -> None:
        """Its owner has the file from now on. Raises StorageFull."""
        self._database.insert("files", vars(written))

    def discard(self, written: StoredFile) -> None:
        """Removes the bytes of a file that has no row."""
        self._remove(written.id)

    def get(self, owner: str, identity: str) -> StoredFile:
        """Raises NotFound, also for another owner's file."""
        row = self._database.row(
            f"select * from files where id = ? and owner = ? and {_KEPT}", (identity, owner, now())
        )
        if row is None:
            raise NotFound(f"You have no file {identity[:80]!r}. `GET /v1/files` lists yours.", param="id")
        return StoredFile(**row)

    def page(
        self, owner: str, after: str | None, limit: int, *, purpose: str | None = None, ascending: bool = False
    ) -> tuple[list[StoredFile], bool]:
        """The `limit` files of `owner`'s that follow the one with the id `after`, the newest first unless `ascending`,
        and whether there are more. Raises BadRequest for an unknown cursor."""
        condition, args = f"owner = ? and (? is null or purpose = ?) and {_KEPT}", [owner, purpose, purpose, now()]
        if after is not None:
            place = self._database.row(
                "select created_at, rowid as place from files where id = ? and owner = ?", (after, owner)
            )
            if place is None:
                raise unknown_cursor(after)
            condition += f" and (created_at, rowid) {'>' if ascending else '<'} (?, ?)"
            args += place.values()
        order = "asc" if ascending else "desc"
        rows = self._database.rows(
            f"select * from files where {condition} order by created_at {order}, rowid {order} limit ?",
            [*args, limit + 1],
        )
        return [StoredFile(**row) for row in rows[:limit]], len(rows) > limit

    def delete(self, owner: str, identity: str) -> None:
        self.get(owner, identity)
        with self._database.freeing() as db:
            db.table("files").delete(identity)
        self._remove(identity)

    def expire(self) -> list[StoredFile]:
        """Removes the files that have expired, and returns them."""
        gone = [StoredFile(**row) for row in self._database.rows(f"select * from files where not {_KEPT}", (now(),))]
        for file in gone:
            with self._database.transaction() as db:
                db.execute("delete from files where id = ?", [file.id])
            self._remove(file.id)
        return gone

    def erase(self, owner: str) -> int:
        """Removes all files of an owner, the bytes first, so that it can go on where it was killed; returns how many
        that were."""
        count = 0
        while rows := self._database.rows("select id from files where owner = ? limit 1000", (owner,)):
            for row in rows:
                self.path(row["id"]).unlink(missing_ok=True)
            sync_directory(self._directory)
            with self._database.freeing() as db:
                for row in rows:
                    db.table("files").delete(row["id"])
            count += len(rows)
        return count

    def path(self, identity: str) -> Path:
        """Where the bytes of a file lie; `identity` is one that this store made, never a caller's text."""
        return self._directory / identity

    def clean_up(self) -> int:
        """Removes bytes that no row names, as a kill may have left them; returns how many files that were."""
        named = {row["id"] for row in self._database.rows("select id from files")}
        return remove_unnamed(self._directory, named)

    def _remove(self, identity: str) -> None:
        self.path(identity).unlink(missing_ok=True)
        sync_directory(self._directory)


def check_purpose(purpose: str) -> None:
    """Raises BadRequest."""
    if purpose not in PURPOSES:
        raise BadRequest(f"purpose is {purpose[:80]!r}; use one of {', '.join(PURPOSES)}.", param="purpose")


def plain_name(filename: str) -> str:
    """What is shown of a name that a client gave: its last part, without what a terminal or a database may not take."""
    text = filename.replace("\\", "/").rpartition("/")[2].encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", "", text)[:255] or "file"
