"""Erasures as the database has them: of whom, since when, and how much there was.

The row is written before anything is removed, in the transaction that takes the owner's keys away, and says whose data
are to go until all of them are gone; then it forgets the name, and only the counts stay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.api.tenancy.keys import KeyStore
from adapterhub.errors import NotFound
from adapterhub.swap.database import Database, Row, new_id, now

migrations = Migrations("adapterhub.erasures")
_COUNTS = {
    "keys": "select count(*) from keys where owner = ?1",
    "files": "select count(*) from files where owner = ?1",
    "uploads": "select count(*) from uploads where owner = ?1",
    "jobs": "select count(*) from jobs where owner = ?1",
    "events": "select count(*) from events e join jobs j on j.id = e.job where j.owner = ?1",
    "adapters": "select count(*) from adapters where owner = ?1",
    "versions": "select count(*) from versions v join adapters a on a.id = v.adapter where a.owner = ?1",
    "usage": "select count(*) from usage where owner = ?1",
    "quotas": "select count(*) from quotas where owner = ?1",
}
_LEFT = """
    select o.store, count(*) as blocks from erased_blocks e join objects o on o.digest = e.digest
    where e.erasure = ? and o.digest not in (select digest from versions) group by o.store order by o.store
"""


@migrations()
def create_erasures(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table erasures (
            id text primary key, owner text unique, removed text not null, counted integer not null default 0,
            begun_at integer not null, finished_at integer)
    """)
    db.execute("""
        create table erased_blocks (
            erasure text not null references erasures(id) on delete cascade, digest text not null,
            primary key (erasure, digest)) without rowid
    """)


@migrations()
def refuse_keys(db: sqlite_utils.Database) -> None:
    """Nobody comes back before they are gone, with a key from another process either."""
    db.execute("""
        create trigger keys_of_erased before insert on keys
        when exists (select 1 from erasures where owner = new.owner)
        begin select raise(abort, 'This user is being erased. Try again when that is done.'); end
    """)


@dataclass(frozen=True)
class Erasure:
    """`removed`: how many of each kind; `left`: blocks that object stores still hold, by the store's URL. `owner` is
    None once all is done."""

    id: str
    owner: str | None
    removed: dict[str, int]
    left: dict[str, int]
    begun_at: int
    finished_at: int | None


class Erasures:
    """Safe to use from any thread. The tables that it counts are other stores', which have to be there."""

    def __init__(self, database: Database, keys: KeyStore) -> None:
        database.migrate(migrations)
        self._database = database
        self._keys = keys

    def begin(self, owner: str) -> str:
        """From now on the owner has no key, and their data are to go. The id of the erasure, which is that of one that
        has not come to its end. Raises NotFound when there is nobody of that name, and nothing of theirs."""
        with self._database.freeing() as db:
            known = self._database.row("select 1 from owners where name = ?", (owner,))
            found = self._count(owner)
            keys = self._keys.erase(owner)
            if row := self._database.row("select id from erasures where owner = ?", (owner,)):
                self._add(row["id"], {"keys": keys})
                return str(row["id"])
            if known is None and not any(found.values()):
                raise NotFound(f"There is no user {owner[:80]!r}. `adapterhub keys list` shows whose keys there are.")
            identity = new_id("erasure")
            row = {"id": identity, "owner": owner, "removed": json.dumps({"keys": keys}), "begun_at": now()}
            db.table("erasures").insert(row)
        return identity

    def count(self, identity: str, owner: str) -> None:
        """Notes how much there is, when nothing more can come; what was noted before a kill counts."""
        with self._database.freeing() as db:
            [row] = self._database.rows("select counted from erasures where id = ?", (identity,))
            if row["counted"]:
                return
            found = self._count(owner)
            del found["keys"]
            self._add(identity, found)
            db.table("erasures").update(identity, {"counted": 1})
            db.execute(
                "insert or ignore into erased_blocks select ?, v.digest from versions v "
                "join adapters a on a.id = v.adapter where a.owner = ?",
                (identity, owner),
            )

    def add(self, identity: str, kind: str, count: int) -> None:
        """So many more of a kind that are in no table."""
        self._add(identity, {kind: count})

    def finish(self, identity: str) -> Erasure:
        """All is done but what the stores still hold."""
        with self._database.freeing() as db:
            db.table("erasures").update(identity, {"owner": None, "finished_at": now()})
            db.execute("delete from erased_blocks where digest not in (select digest from objects)")
        return self.get(identity)

    def get(self, identity: str) -> Erasure:
        """Raises NotFound."""
        row = self._database.row("select * from erasures where id = ?", (identity,))
        if row is None:
            raise NotFound(f"There is no erasure {identity[:80]!r}. `GET /admin/erasures` lists all.", param="id")
        return self._of(row)

    def all(self) -> list[Erasure]:
        """The newest first."""
        rows = self._database.rows("select * from erasures order by begun_at desc, rowid desc")
        return [self._of(row) for row in rows]

    def unfinished(self) -> list[str]:
        """The owners that are to be erased."""
        rows = self._database.rows("select owner from erasures where owner is not null order by begun_at, rowid")
        return [row["owner"] for row in rows]

    def _of(self, row: Row) -> Erasure:
        left = {r["store"]: r["blocks"] for r in self._database.rows(_LEFT, (row["id"],))}
        return Erasure(row["id"], row["owner"], json.loads(row["removed"]), left, row["begun_at"], row["finished_at"])

    def _count(self, owner: str) -> dict[str, int]:
        [row] = self._database.rows(
            "select " + ", ".join(f"({sql}) as {kind}" for kind, sql in _COUNTS.items()), (owner,)
        )
        return dict(row)

    def _add(self, identity: str, more: dict[str, int]) -> None:
        with self._database.freeing() as db:
            [row] = self._database.rows("select removed from erasures where id = ?", (identity,))
            removed = json.loads(row["removed"])
            for kind, count in more.items():
                removed[kind] = removed.get(kind, 0) + count
            db.table("erasures").update(identity, {"removed": json.dumps(removed)})
