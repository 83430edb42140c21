"""API keys: whose they are, what they may do, and until when. Only their hashes are stored.

A key has 256 random bits, so a plain SHA-256 cannot be searched, and looking it up by hash leaks nothing by its timing.
Whether a key is good is asked of the database each time, by one indexed query: what another process changes there, such
as `adapterhub keys revoke` beside a running server, counts at once.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.api.tenancy.terms import EVERYDAY, PROJECT, Scope
from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.database import Database, Row, new_id, now
from adapterhub.swap.names import check_name

PREFIX = "sk-ah-"
_PAUSE_SECONDS = 60  # between two uses of a key
migrations = Migrations("adapterhub.keys")


@migrations()
def create_keys(db: sqlite_utils.Database) -> None:
    db.execute("create table owners (name text primary key, created_at integer not null)")
    db.execute("""
        create table keys (
            hash text primary key, owner text not null references owners(name) on delete cascade,
            admin integer not null, created_at integer not null)
    """)


@migrations()
def add_scopes(db: sqlite_utils.Database) -> None:
    """What there was before may do what it could."""
    db.execute("""
        create table scoped (
            id text primary key, hash text not null unique,
            owner text not null references owners(name) on delete cascade, project text not null, scopes text not null,
            hint text, created_at integer not null, expires_at integer, revoked_at integer, last_used_at integer)
    """)
    for row in list(db.query("select * from keys")):
        scopes = frozenset(Scope) if row.pop("admin") else EVERYDAY
        db.table("scoped").insert({**row, "id": new_id("key"), "project": PROJECT, "scopes": " ".join(sorted(scopes))})
    db.execute("drop table keys")
    db.execute("alter table scoped rename to keys")
    db.execute("create index keys_by_owner on keys (owner, project)")


class State(StrEnum):
    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True)
class ApiKey:
    """A key, without its secret; `hint` is how that begins and ends, None of keys from before there were hints. Times
    are seconds since the epoch."""

    id: str
    owner: str
    project: str
    scopes: frozenset[Scope]
    hint: str | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None

    @classmethod
    def of(cls, row: Row) -> ApiKey:
        kept = {name: value for name, value in row.items() if name != "hash"}
        return cls(**{**kept, "scopes": frozenset(map(Scope, row["scopes"].split()))})

    @property
    def state(self) -> State:
        if self.revoked_at is not None:
            return State.REVOKED
        return State.EXPIRED if self.expires_at is not None and self.expires_at <= now() else State.ACTIVE


class NewKey(NamedTuple):
    """`secret` is what a client sends. It is stored nowhere."""

    secret: str
    key: ApiKey


class KeyStore:
    """Safe to use from any thread, and from another process beside a running server."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database
        self._used: dict[str, int] = {}  # when, by key; not saved yet
        self._using = threading.Lock()

    def create(self, owner: str, *, admin: bool = False) -> str:
        """The secret of a new key of `owner`'s, for everyday use, or for everything. Raises BadRequest."""
        return self.make(owner, frozenset(Scope) if admin else EVERYDAY).secret

    def make(
        self, owner: str, scopes: Collection[Scope], *, project: str = PROJECT, expires_at: int | None = None
    ) -> NewKey:
        """A new key of `owner`'s, who is created if need be. Its secret is shown this once. Raises BadRequest."""
        check_name(owner, "owner")
        check_name(project, "project")
        if not scopes:
            raise BadRequest(f"A key needs a scope: some of {', '.join(Scope)}.", param="scopes")
        if expires_at is not None and expires_at <= now():
            raise BadRequest("A key cannot expire before it is used: give a time to come.", param="expires_at")
        secret = PREFIX + secrets.token_urlsafe(32)
        identity = new_id("key")
        row = {
            "id": identity,
            "hash": _hash(secret),
            "owner": owner,
            "project": project,
            "scopes": " ".join(sorted(scopes)),
            "hint": f"{secret[: len(PREFIX) + 2]}...{secret[-4:]}",
            "created_at": now(),
            "expires_at": expires_at,
        }
        with self._database.transaction() as db:
            db.table("owners").insert({"name": owner, "created_at": now()}, ignore=True)
            try:
                db.table("keys").insert(row)
            except sqlite3.IntegrityError as error:  # what `erasures` has against it
                raise BadRequest(str(error), param="owner") from error
            return NewKey(secret, self.get(identity))

    def find(self, secret: str) -> ApiKey | None:
        """The key of that secret, in whatever state."""
        row = self._database.row("select * from keys where hash = ?", (_hash(secret),))
        return ApiKey.of(row) if row else None

    def get(self, identity: str) -> ApiKey:
        """By its id. Raises NotFound."""
        row = self._database.row("select * from keys where id = ?", (identity,))
        if row is None:
            raise NotFound(f"There is no key {identity[:80]!r}. `adapterhub keys list` shows all.", param="id")
        return ApiKey.of(row)

    def list(self, owner: str | None = None, project: str | None = None) -> Sequence[ApiKey]:
        """The newest first; None: of whatever owner or project."""
        rows = self._database.rows(
            """select * from keys where (? is null or owner = ?) and (? is null or project = ?)
               order by created_at desc, rowid desc""",
            (owner, owner, project, project),
        )
        return [ApiKey.of(row) for row in rows]

    def revoke(self, identity: str) -> ApiKey:
        """From now on the key is good for nothing. Raises NotFound."""
        with self._database.freeing() as db:
            if self.get(identity).revoked_at is None:
                db.table("keys").update(identity, {"revoked_at": now()})
            return self.get(identity)

    def rotate(self, identity: str, grace_seconds: int) -> NewKey:
        """A new key that may do what the old one may, which is good for `grace_seconds` more, if it does not expire
        before. Raises NotFound, and BadRequest when the old one is good no more."""
        with self._database.transaction() as db:
            old = self.get(identity)
            if old.state is not State.ACTIVE:
                raise BadRequest(f"Key {identity} is {old.state}; only an active key can be rotated.", param="id")
            made = self.make(old.owner, old.scopes, project=old.project, expires_at=old.expires_at)
            ends = min(now() + grace_seconds, old.expires_at or now() + grace_seconds)
            db.table("keys").update(identity, {"expires_at": ends})
            return made

    def ended(self, identities: Iterable[str]) -> dict[str, State]:
        """Those that are good for nothing any more, and why; what is there no more was revoked."""
        asked = sorted(set(identities))
        rows = self._database.rows(
            "select * from keys where id in (select value from json_each(?))", (json.dumps(asked),)
        )
        states = dict.fromkeys(asked, State.REVOKED) | {row["id"]: ApiKey.of(row).state for row in rows}
        return {identity: state for identity, state in states.items() if state is not State.ACTIVE}

    def note_use(self, key: ApiKey) -> bool:
        """That a key was used now: a note in memory, until `save_uses` writes all of them down. Whether there was a
        pause before."""
        at = now()
        with self._using:
            before = self._used.get(key.id, key.last_used_at)
            self._used[key.id] = at
        return before is None or at - before >= _PAUSE_SECONDS

    def save_uses(self) -> None:
        with self._using:
            used, self._used = self._used, {}
        if used:
            with self._database.transaction() as db:
                db.conn.executemany(
                    "update keys set last_used_at = ? where id = ?", [(at, key) for key, at in used.items()]
                )

    def erase(self, owner: str) -> int:
        """Removes all keys of an owner, and the owner; returns how many keys that were."""
        with self._database.freeing() as db:
            count = db.table("keys").count_where("owner = ?", [owner])
            db.execute("delete from keys where owner = ?", [owner])
            db.execute("delete from owners where name = ?", [owner])
        return count


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
