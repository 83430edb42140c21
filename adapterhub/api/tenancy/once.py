"""Requests that make something and say, by an `Idempotency-Key`, that they may come twice: the second one gets what the
first has made.

What a key has made is known for a day. A job's creation has its own memory, as its SDKs send no key (`train/jobs.py`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.config import MIB
from adapterhub.errors import KeyReused, NotFound
from adapterhub.swap.database import Database, now

_KNOWN_SECONDS = 86400
migrations = Migrations("adapterhub.once")


class Made(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Made)


class Asked(NamedTuple):
    """`kind`: of what is to be made; of each, an owner's keys are their own. `key` None: it may be made again."""

    owner: str
    kind: str
    key: str | None


@migrations()
def create_once(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table once (
            owner text not null, kind text not null, key text not null, digest text not null, made text not null,
            created_at integer not null, primary key (owner, kind, key))
    """)
    db.execute("create index once_by_time on once (created_at)")


def digest_of(fields: Any, *files: BinaryIO) -> str:
    """Of a request with these fields, which JSON can write, and files, which are read and set back to their start."""
    digest = hashlib.sha256(json.dumps(fields).encode())
    for file in files:
        part = hashlib.sha256()
        while chunk := file.read(MIB):
            part.update(chunk)
        file.seek(0)
        digest.update(part.digest())
    return digest.hexdigest()


class Once:
    """Safe to use from any thread. Of several at once with one key the first makes it, and the others wait."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database
        self._changed = threading.Condition()
        self._making: set[Asked] = set()

    def made(self, asked: Asked, digest: Callable[[], str], find: Callable[[str], T], make: Callable[[], T]) -> T:
        """What the key has made, by `find`, which raises NotFound for what is there no more; else what `make` makes.

        `digest` tells requests apart. Raises KeyReused for a key that came with another one.
        """
        if asked.key is None:
            return make()
        with self._alone(asked):
            said = digest()
            row = self._database.row(
                "select digest, made from once where owner = ? and kind = ? and key = ? and created_at > ?",
                (*asked, now() - _KNOWN_SECONDS),
            )
            if row is not None and row["digest"] != said:
                raise KeyReused(asked.key)
            if row is not None:
                with suppress(NotFound):
                    return find(row["made"])
            result = make()
            noted = {**asked._asdict(), "digest": said, "made": result.id, "created_at": now()}
            with self._database.transaction() as db:
                db.table("once").insert(noted, pk=("owner", "kind", "key"), replace=True)
            return result

    def expire(self) -> None:
        old = now() - _KNOWN_SECONDS
        if self._database.row("select 1 from once where created_at <= ? limit 1", (old,)) is not None:
            with self._database.transaction() as db:
                db.execute("delete from once where created_at <= ?", [old])

    def erase(self, owner: str) -> None:
        with self._database.transaction() as db:
            db.execute("delete from once where owner = ?", [owner])

    @contextmanager
    def _alone(self, asked: Asked) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: asked not in self._making)
            self._making.add(asked)
        try:
            yield
        finally:
            with self._changed:
                self._making.discard(asked)
                self._changed.notify_all()
