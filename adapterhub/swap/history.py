"""What each adapter's name points at: its current version, which ones were current before, and how requests are split.

A split lasts until another version becomes current, or one that it names is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from adapterhub.errors import BadRequest
from adapterhub.swap.database import Database, now
from adapterhub.swap.versions import PREVIOUS, Kind, Share, Version


class Was(NamedTuple):
    """A version that is, or was, current; `since` in seconds since the epoch."""

    version: str
    since: int


def shares_of(current: Version, given: Sequence[tuple[Version, int]]) -> list[Share]:
    """The split that gives versions so many percent, and the current one the rest. Raises BadRequest.

    The current one comes last, so that a share that grows keeps the users that it has.
    """
    percent: dict[str, int] = {}
    for version, share in given:
        if version.id in percent:
            raise BadRequest(f"{version.label} of {version.alias} is named twice. Name it once.", param="percent")
        if not 1 <= share <= 100:
            raise BadRequest(f"{version.label} of {version.alias}: {share}%; give 1 to 100.", param="percent")
        if version.fingerprint != current.fingerprint:
            raise BadRequest(
                f"{version.label} of {version.alias} was made for another base than the current {current.label}: one "
                "server cannot answer with both. Train it again.",
                param="percent",
            )
        percent[version.id] = share
    all_others = sum(percent.values()) - percent.get(current.id, 0)
    if all_others > 100 or (current.id in percent and all_others + percent[current.id] != 100):
        raise BadRequest(
            f"The shares sum to {sum(percent.values())}%. Give 100 in all, or less without the current "
            f"{current.label}, which gets the rest.",
            param="percent",
        )
    others = [Share(version, share) for version, share in percent.items() if version != current.id]
    return [*others, Share(current.id, 100 - all_others)] if others else []


class History:
    """Its changes are parts of the registry's transactions. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, adapter: str) -> list[Was]:
        """The current version first, then what each rollback would go to; less what rollbacks have left behind."""
        sql = "select version, since from history where adapter = ? order by id"
        rows = self._database.rows(sql, (adapter,))
        alike = groupby(rows, key=lambda row: row["version"])  # when what came between two times was deleted
        return [Was(version, next(times)["since"]) for version, times in alike][::-1]

    def point(self, adapter: str, version: str) -> None:
        """Makes a version current."""
        with self._database.transaction() as db:
            if self._current(adapter) != version:
                db.table("history").insert({"adapter": adapter, "version": version, "since": now()})
            db.table("adapters").update(adapter, {"current": version, "split": None})

    def back(self, adapter: str) -> str | None:
        """Makes current what was so before, and returns its id; None, and no change, if there is nothing left."""
        sql = f"select {PREVIOUS} as version from adapters a where a.id = ?"
        with self._database.transaction() as db:
            row = self._database.row(sql, (adapter,))
            if row is None or row["version"] is None:
                return None
            db.execute(
                "delete from history where adapter = ? and id > "
                "(select max(id) from history where adapter = ? and version = ?)",
                (adapter, adapter, row["version"]),
            )
            self._return(adapter, row["version"])
            return str(row["version"])

    def split(self, adapter: str, shares: Iterable[Share]) -> None:
        """Of an adapter that has a current version. No shares: the current version gets all requests."""
        written = json.dumps(list(shares))
        self._database.update("adapters", adapter, split=written if written != "[]" else None)

    def mend(self, adapter: str) -> None:
        """After the current version was deleted: makes current what was so before, else the newest release left, if
        there is one. What a rollback has left behind does not come back while there is anything else."""
        last = "select version from history where adapter = ? order by id desc limit 1"
        newest = "select id from versions where adapter = ? and kind = ? order by number desc limit 1"
        with self._database.transaction() as db:
            if row := self._database.row(last, (adapter,)):
                self._return(adapter, row["version"])
                return
            db.table("adapters").update(adapter, {"current": None, "split": None})
            if row := self._database.row(newest, (adapter, Kind.RELEASE)):
                self.point(adapter, row["id"])

    def _return(self, adapter: str, version: str) -> None:
        """Makes current what the history ends with."""
        last = "(select max(id) from history where adapter = ?)"
        with self._database.transaction() as db:
            db.execute(f"update history set since = ? where id = {last}", (now(), adapter))
            db.table("adapters").update(adapter, {"current": version, "split": None})

    def _current(self, adapter: str) -> str | None:
        row = self._database.row("select current from adapters where id = ?", (adapter,))
        return row["current"] if row else None
