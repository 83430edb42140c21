"""What lies in the object store, as far as this server knows: written down before anything is done there.

A block is `uploading` before its upload begins, `stored` in the transaction that names it, and `deleting` in the
transaction that takes its last name away. So after a kill it is known what is left to do, without a look at the store,
and nothing is ever deleted there that this database did not put there and give up again.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from enum import StrEnum

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.swap.database import Database

migrations = Migrations("adapterhub.objects")


class State(StrEnum):
    UPLOADING = "uploading"
    STORED = "stored"
    DELETING = "deleting"


@migrations()
def create_objects(db: sqlite_utils.Database) -> None:
    db.execute("create table server (id text primary key)")
    db.table("server").insert({"id": secrets.token_hex(6)})
    db.execute("""
        create table objects (
            store text not null, digest text not null, state text not null, primary key (digest, store)) without rowid
    """)
    db.execute("create index objects_to_do on objects (state) where state != 'stored'")


def server_id(database: Database) -> str:
    """Names this data directory's objects in a store that others use, too."""
    database.migrate(migrations)
    [row] = database.rows("select id from server")
    return row["id"]


class Objects:
    """`store` is the URL of the store that is in use; None without one. Safe to use from any thread."""

    def __init__(self, database: Database, store: str | None) -> None:
        database.migrate(migrations)
        self._database = database
        self.store = store
        self.to_do = threading.Event()  # set when there is something to delete or to upload

    def set(self, digest: str, state: State) -> None:
        """Within a transaction, part of it."""
        with self._database.transaction() as db:
            db.execute("insert or replace into objects values (?, ?, ?)", (self.store, digest, state.value))

    def give_up(self, digests: Iterable[str]) -> None:
        """Those of `digests` that no row names any more are to be deleted, in every store that has them."""
        with self._database.transaction() as db:
            for digest in digests:
                db.execute(
                    "update objects set state = 'deleting' where digest = ? and digest not in "
                    "(select digest from versions where digest = ?)",
                    (digest, digest),
                )
        self.to_do.set()

    def deleted(self, digest: str) -> None:
        with self._database.freeing() as db:
            db.execute("delete from objects where digest = ? and store = ?", (digest, self.store))

    def unnamed(self) -> list[str]:
        """What is to be deleted from the store: given up, or uploaded for a row that was never written."""
        sql = (
            "select digest from objects where store = ? and state != 'stored' and digest not in "
            "(select digest from versions)"
        )
        return [row["digest"] for row in self._database.rows(sql, (self.store,))]

    def unsafe(self) -> list[tuple[str, str]]:
        """Digest and owner of blocks that rows name, but that are not known to lie in the store."""
        sql = (
            "select v.digest, min(a.owner) as owner from versions v join adapters a on a.id = v.adapter "
            "left join objects o on o.digest = v.digest and o.store = ? "
            "where o.state is null or o.state != 'stored' group by v.digest"
        )
        return [(row["digest"], row["owner"]) for row in self._database.rows(sql, (self.store,))]

    def any(self) -> bool:
        """Whether anything was ever put into the store, and is not known to be deleted there."""
        return self._database.row("select 1 from objects where store = ? limit 1", (self.store,)) is not None

    def elsewhere(self) -> dict[str, str]:
        """Digests of all blocks that some store is known to hold, and one such store's URL."""
        rows = self._database.rows("select digest, store from objects where state = 'stored'")
        return {row["digest"]: row["store"] for row in rows}
