"""The tables of adapters and their versions, as they came to be."""

from __future__ import annotations

import sqlite_utils
from sqlite_utils import Migrations

migrations = Migrations("adapterhub.swap")


@migrations()
def create_adapters(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table adapters (
            id text primary key, owner text not null, name text not null, current text, created_at integer not null,
            unique (owner, name))
    """)
    db.execute("""
        create table versions (
            id text primary key, adapter text not null references adapters(id) on delete cascade,
            number integer not null, digest text not null, nbytes integer not null, rank integer not null,
            fingerprint text not null, base text not null, origin text not null, created_at integer not null,
            unique (adapter, number))
    """)
    db.execute("create index versions_by_digest on versions (digest)")


@migrations()
def add_pins(db: sqlite_utils.Database) -> None:
    db.execute("alter table adapters add column pinned text")


@migrations()
def add_kinds(db: sqlite_utils.Database) -> None:
    """What there was before are releases, each of which has been current in its turn."""
    db.execute("""
        create table kinds (
            id text primary key, adapter text not null references adapters(id) on delete cascade,
            number integer, kind text not null default 'release', step integer, metrics text,
            digest text not null, nbytes integer not null, rank integer not null,
            fingerprint text not null, base text not null, origin text not null, created_at integer not null,
            unique (adapter, number))
    """)
    columns = "id, adapter, number, digest, nbytes, rank, fingerprint, base, origin, created_at"
    db.execute(f"insert into kinds ({columns}) select {columns} from versions order by created_at, number")
    db.execute("drop table versions")
    db.execute("alter table kinds rename to versions")
    db.execute("create index versions_by_digest on versions (digest)")
    db.execute("create index versions_by_origin on versions (origin)")
    db.execute("""
        create table history (
            id integer primary key autoincrement, adapter text not null references adapters(id) on delete cascade,
            version text not null references versions(id) on delete cascade, since integer not null)
    """)
    db.execute("create index history_by_adapter on history (adapter, version)")
    db.execute("create index history_by_version on history (version)")
    db.execute("""
        insert into history (adapter, version, since)
        select adapter, id, created_at from versions order by adapter, number
    """)
    db.execute("alter table adapters add column split text")
    db.execute("alter table adapters add column last_number integer not null default 0")  # no number is given twice
    db.execute("""
        update adapters set last_number = (select coalesce(max(number), 0) from versions where adapter = adapters.id)
    """)
