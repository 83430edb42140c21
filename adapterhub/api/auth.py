"""API keys: who a caller is. A key belongs to an owner; only its hash is stored.

A key has 256 random bits, so a plain SHA-256 cannot be searched, and looking it up by hash leaks nothing by its timing.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Annotated

import sqlite_utils
from fastapi import Depends, Request
from sqlite_utils import Migrations

from adapterhub.errors import Forbidden, Unauthorized
from adapterhub.swap.database import Database, now
from adapterhub.swap.names import check_name

PREFIX = "sk-ah-"
migrations = Migrations("adapterhub.keys")


@migrations()
def create_keys(db: sqlite_utils.Database) -> None:
    db.execute("create table owners (name text primary key, created_at integer not null)")
    db.execute("""
        create table keys (
            hash text primary key, owner text not null references owners(name) on delete cascade,
            admin integer not null, created_at integer not null)
    """)


@dataclass(frozen=True)
class Principal:
    """On whose behalf a request is made."""

    owner: str
    admin: bool


class KeyStore:
    """Safe to use from any thread, and from another process beside a running server."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database

    def create(self, owner: str, *, admin: bool = False) -> str:
        """A new key of `owner`'s, who is created if need be. It is shown this once. Raises BadRequest."""
        check_name(owner, "owner")
        key = PREFIX + secrets.token_urlsafe(32)
        with self._database.transaction() as db:
            db.table("owners").insert({"name": owner, "created_at": now()}, ignore=True)
            db.table("keys").insert({"hash": _hash(key), "owner": owner, "admin": int(admin), "created_at": now()})
        return key

    def find(self, key: str) -> Principal | None:
        row = self._database.row("select owner, admin from keys where hash = ?", (_hash(key),))
        return Principal(row["owner"], bool(row["admin"])) if row else None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def principal(request: Request) -> Principal:
    """The caller. Raises Unauthorized, saying how to send a key."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized(
            "No API key was sent. Send one as 'Authorization: Bearer KEY'; the operator makes one with "
            "`adapterhub keys create OWNER`.",
            code="missing_api_key",
        )
    found = request.app.state.hub.keys.find(key.strip())
    if found is None:
        raise Unauthorized("This API key is not valid. Ask the operator for a new one.")
    return found


def admin(caller: Annotated[Principal, Depends(principal)]) -> Principal:
    if not caller.admin:
        raise Forbidden("This needs an admin key (`adapterhub keys create OWNER --admin`).")
    return caller


Caller = Annotated[Principal, Depends(principal)]
Admin = Annotated[Principal, Depends(admin)]
