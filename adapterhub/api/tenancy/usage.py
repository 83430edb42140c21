"""Who used how much: counts by day (UTC), owner, key and adapter, added to as they come and asked for in groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.api.tenancy.terms import Group
from adapterhub.swap.database import Database, Row

NONE = ""  # in place of a key or an adapter, where something belongs to none
migrations = Migrations("adapterhub.usage")


@migrations()
def create_usage(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table usage (
            owner text not null, day text not null, key text not null, adapter text not null,
            requests integer not null default 0, input_tokens integer not null default 0,
            output_tokens integer not null default 0, training_tokens integer not null default 0,
            cold_boots integer not null default 0, byte_hours real not null default 0,
            primary key (owner, day, key, adapter)) without rowid
    """)
    db.execute("create index usage_by_day on usage (day)")
    db.execute("create table storage_counted (until integer not null)")  # one row
    db.execute("""
        create table metered_jobs (
            job text primary key, owner text not null, key text not null, tokens integer not null default 0)
    """)


class Counts(NamedTuple):
    """`requests` are those that were answered, at least in part; `cold_boots` those of them whose adapter was not on
    the device; `byte_hours` what was kept, times how long."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    training_tokens: int = 0
    cold_boots: int = 0
    byte_hours: float = 0.0

    def plus(self, other: Counts) -> Counts:
        return Counts._make(a + b for a, b in zip(self, other, strict=True))


class Line(NamedTuple):
    """What is counted apart. `adapter`: its name; NONE for the base, and for files."""

    owner: str
    day: str
    key: str
    adapter: str


_COLUMNS = {
    Group.DAY: "u.day",
    Group.OWNER: "u.owner",
    Group.PROJECT: "coalesce(k.project, '')",
    Group.KEY: "u.key",
    Group.ADAPTER: "u.adapter",
}
_ADD = f"""
    insert into usage (owner, day, key, adapter, {", ".join(Counts._fields)})
    values ({", ".join("?" * (len(Line._fields) + len(Counts._fields)))})
    on conflict do update set {", ".join(f"{name} = {name} + excluded.{name}" for name in Counts._fields)}
"""
_STORAGE = """
    insert into usage (owner, day, key, adapter, byte_hours)
    select owner, :day, '', adapter, sum(bytes * (:until - max(:since, created_at))) / 3600.0
    from (select a.owner, a.name as adapter, v.nbytes as bytes, v.created_at
          from versions v join adapters a on a.id = v.adapter
          union all select owner, '', bytes, created_at from files)
    where created_at < :until group by owner, adapter
    on conflict do update set byte_hours = byte_hours + excluded.byte_hours
"""


@dataclass(frozen=True)
class Asked:
    """Which usage: from `first` to `last` day, both included, of one owner (None: of all), told apart by `by`."""

    first: date
    last: date
    owner: str | None = None
    by: Sequence[Group] = ()


class Usage:
    """Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database

    def add(self, counted: Mapping[Line, Counts]) -> None:
        with self._database.transaction() as db:
            db.conn.executemany(_ADD, [(*line, *counts) for line, counts in counted.items()])

    def report(self, asked: Asked, *, skip: int = 0, limit: int = -1) -> list[Row]:
        """A row of counts for each group that has any, in the groups' order; -1: all of them."""
        columns = [f"{_COLUMNS[group]} as {group}" for group in asked.by]
        sums = [f"coalesce(sum(u.{name}), 0) as {name}" for name in Counts._fields]
        names = ", ".join(str(at + 1) for at in range(len(columns)))
        grouped = f"group by {names} order by {names}" if names else ""
        return self._database.rows(
            f"""select {", ".join(columns + sums)} from usage u left join keys k on k.id = u.key
                where u.day between ? and ? and (? is null or u.owner = ?) {grouped} limit ? offset ?""",
            (asked.first.isoformat(), asked.last.isoformat(), asked.owner, asked.owner, limit, skip),
        )

    def count_storage(self, now: int) -> None:
        """Adds what has been kept since this was called last, the time when no server ran included."""
        with self._database.transaction() as db:
            [row] = self._database.rows("select max(until) as until from storage_counted")
            until = row["until"]
            for since, end, day in _days(now if until is None else until, now):
                db.execute(_STORAGE, {"since": since, "until": end, "day": day})
            db.execute("delete from storage_counted")
            db.table("storage_counted").insert({"until": now if until is None else max(until, now)})

    @property
    def storage_counted_until(self) -> int | None:
        """Seconds since the epoch; None: never counted yet."""
        [row] = self._database.rows("select max(until) as until from storage_counted")
        return row["until"]

    def follow_job(self, job: str, owner: str, key: str) -> None:
        """The tokens that a job trains are counted as the key's who created it."""
        self._database.insert("metered_jobs", {"job": job, "owner": owner, "key": key})

    def count_training(self, day: str) -> None:
        """Adds what jobs have trained since this was called last. A job that goes back and trains some steps again
        counts them once."""
        changed = """
            select m.job, m.owner, m.key, j.suffix, coalesce(j.trained_tokens, 0) as trained, m.tokens,
                   j.id is null or j.finished_at is not null as ended
            from metered_jobs m left join jobs j on j.id = m.job
            where j.id is null or j.finished_at is not null or j.trained_tokens > m.tokens
        """
        if not self._database.rows(changed):
            return
        with self._database.transaction() as db:
            for row in self._database.rows(changed):
                if (more := row["trained"] - row["tokens"]) > 0:
                    self.add({Line(row["owner"], day, row["key"], row["suffix"]): Counts(training_tokens=more)})
                    db.table("metered_jobs").update(row["job"], {"tokens": row["trained"]})
                if row["ended"]:
                    db.table("metered_jobs").delete(row["job"])

    def erase(self, owner: str) -> int:
        """Removes all that was counted of an owner; returns how many rows that were."""
        with self._database.freeing() as db:
            count = db.table("usage").count_where("owner = ?", [owner])
            db.execute("delete from usage where owner = ?", [owner])
            db.execute("delete from metered_jobs where owner = ?", [owner])
        return count


def day_of(seconds: float) -> str:
    """1760000000 -> "2025-10-09"."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _days(since: int, until: int) -> Iterator[tuple[int, int, str]]:
    """The pieces of the time from `since` to `until` that lie within one day each."""
    while since < until:
        day = datetime.fromtimestamp(since, UTC).date()
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC)
        end = min(until, int(midnight.timestamp()))
        yield since, end, day.isoformat()
        since = end
