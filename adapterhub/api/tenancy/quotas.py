"""What each owner may have and use: the defaults of the configuration, what the operator has set for all, and for one.

What is set is kept in the database and counts at once. The server alone changes it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.api.tenancy.terms import EVERYBODY
from adapterhub.errors import BadRequest
from adapterhub.swap.database import Database
from adapterhub.swap.names import check_name

migrations = Migrations("adapterhub.quotas")


@migrations()
def create_quotas(db: sqlite_utils.Database) -> None:
    db.execute("create table quotas (owner text primary key, limits text not null)")


@dataclass(frozen=True)
class Limits:
    """Of one owner. None: no limit. `jobs` are those that have not ended; `bytes` are files and versions together."""

    adapters: int | None = None
    bytes: int | None = None
    jobs: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def rates(self) -> bool:
        """Whether there is any limit per minute."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


KINDS = tuple(field.name for field in fields(Limits))
Given = Mapping[str, int | None]  # some of the fields of `Limits`


class Quotas:
    """Safe to use from any thread."""

    def __init__(self, database: Database, defaults: Limits) -> None:
        database.migrate(migrations)
        self._database = database
        self._defaults = defaults
        self._changing = threading.Lock()
        rows = database.rows("select owner, limits from quotas")
        self._set: dict[str, Given] = {row["owner"]: json.loads(row["limits"]) for row in rows}

    def of(self, owner: str) -> Limits:
        """What counts for an owner; for `EVERYBODY`, what counts for those who have nothing of their own."""
        return replace(self._defaults, **{**self._set.get(EVERYBODY, {}), **self._set.get(owner, {})})

    def given(self) -> dict[str, Given]:
        """What has been set, by owner."""
        return dict(sorted(self._set.items()))

    def change(self, owner: str, limits: Given) -> None:
        """Sets the limits that are given, and leaves the others as they are. Raises BadRequest."""
        if owner != EVERYBODY:
            check_name(owner, "owner")
        if unknown := limits.keys() - set(KINDS):
            raise BadRequest(f"{min(unknown)[:80]!r} is no quota; there are {', '.join(KINDS)}.")
        with self._changing:
            kept = {**self._set.get(owner, {}), **limits}
            with self._database.transaction() as db:
                db.table("quotas").upsert({"owner": owner, "limits": json.dumps(kept)}, pk="owner")
            self._set[owner] = kept

    def forget(self, owner: str) -> int:
        """What has been set for an owner counts no more; returns how many limits that were."""
        with self._changing:
            gone = len(self._set.get(owner, {}))
            with self._database.freeing() as db:
                db.execute("delete from quotas where owner = ?", [owner])
            self._set.pop(owner, None)
        return gone
