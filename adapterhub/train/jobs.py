"""Fine-tuning jobs in the database: who owns them, which comes next, and how their states change.

Every change of a job's state goes through `JobStore`, which the API reads and the worker (`worker.py`) moves along. A
change says which state it starts from, and does not happen when another came first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.errors import BadRequest, HubError, KeyReused, NotFound
from adapterhub.swap.catalog import unknown_cursor
from adapterhub.swap.database import Database, new_id, now
from adapterhub.train.dataset import Kind
from adapterhub.train.events import Events
from adapterhub.train.job import Job, Note, Order, Priority, Status

_RETRY_SECONDS = 120  # an SDK's retry of a creation comes within that
_AWAITED = f"""
    e.owner = j.owner and e.owner || '/' || e.suffix = j.model and (e.created_at, e.rowid) < (j.created_at, j.rowid)
    and e.status not in ({", ".join(f"'{status}'" for status in Status if status.final)})
"""  # of two jobs: `j` goes on from an adapter by its bare name, and `e`, created before it, adds a version to that
migrations = Migrations("adapterhub.jobs")


@migrations()
def create_jobs(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table jobs (
            id text primary key, owner text not null, status text not null, model text not null,
            training_file text not null, suffix text not null, given_suffix text, seed integer not null,
            hyperparameters text not null, metadata text, fingerprint text not null, fine_tuned_model text,
            trained_tokens integer, error text, created_at integer not null, finished_at integer,
            estimated_finish integer)
    """)
    db.execute("create index jobs_by_owner on jobs (owner, created_at)")
    db.execute("create index jobs_by_status on jobs (status, created_at)")
    db.execute("""
        create table events (
            id text primary key, job text not null references jobs(id) on delete cascade, level text not null,
            type text not null, message text not null, data text, created_at integer not null)
    """)
    db.execute("create index events_by_job on events (job)")


@migrations()
def create_requests(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table requests (
            job text primary key references jobs(id) on delete cascade, owner text not null, digest text not null,
            key text, created_at integer not null, unique (owner, key))
    """)
    db.execute("create index requests_by_digest on requests (owner, digest, created_at)")


@migrations()
def add_methods_and_states(db: sqlite_utils.Database) -> None:
    for column in (
        "validation_file text",
        "input_bytes integer not null default 0",
        f"method text not null default '{Kind.SUPERVISED}'",
        f"priority integer not null default {Priority.NORMAL}",
        "initial text",
        "report text",
        "estimate text",
        "saved_step integer",
        "proof text",
        "result_file text",
    ):
        db.execute(f"alter table jobs add column {column}")
    # what was under way had nothing prepared on disk
    db.execute("update jobs set status = ? where status in (?, ?)", (Status.VALIDATING, Status.QUEUED, Status.RUNNING))


@migrations()
def drop_saved_step(db: sqlite_utils.Database) -> None:
    db.execute("alter table jobs drop column saved_step")  # nobody read it: a saved state says so itself


class JobStore:
    """Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database
        self.events = Events(database)

    def create(
        self, order: Order, *, retry: bool, check: Callable[[str, str | None], None] = lambda *_: None
    ) -> tuple[Job, bool]:
        """Takes in a job for validation, unless a request with the same key or, with `retry`, an equal and recent one
        has made one. Raises KeyReused for a key that came with another request; `check` raises when the owner may have
        no more that make an adapter of that suffix.

        Returns the job, and whether it is new.
        """
        with self._database.transaction() as db:
            if (made := self._made(order, retry)) is not None:
                return made, False
            check(order.owner, order.suffix)
            identity = new_id("ftjob")
            db.table("jobs").insert(
                {
                    "id": identity,
                    "owner": order.owner,
                    "status": Status.VALIDATING,
                    "model": order.model,
                    "training_file": order.training_file,
                    "validation_file": order.validation_file,
                    "input_bytes": order.input_bytes,
                    "suffix": order.suffix or identity.removeprefix("ftjob-")[:8],
                    "given_suffix": order.suffix,
                    "seed": order.seed,
                    "method": order.method,
                    "hyperparameters": json.dumps(order.hyperparameters),
                    "priority": order.priority,
                    "initial": order.initial,
                    "metadata": json.dumps(order.metadata) if order.metadata else None,
                    "fingerprint": order.fingerprint,
                    "created_at": now(),
                }
            )
            request = {"job": identity, "owner": order.owner, "digest": order.digest, "key": order.key}
            db.table("requests").insert({**request, "created_at": now()})
            self.events.add(identity, f"Created fine-tuning job: {identity}")
            self.events.add(identity, f"Validating training file: {order.training_file}")
            if order.validation_file is not None:
                self.events.add(identity, f"Validating validation file: {order.validation_file}")
        return self.get(order.owner, identity), True

    # -- looking

    def get(self, owner: str | None, identity: str) -> Job:
        """Raises NotFound, also for another owner's job. Any owner's with `owner` None."""
        row = self._database.row(
            "select * from jobs where id = ? and (? is null or owner = ?)", (identity, owner, owner)
        )
        if row is None:
            raise NotFound(f"You have no fine-tuning job {identity[:80]!r}.", param="id")
        return Job.of(row)

    def page(
        self, owner: str, after: str | None, limit: int, *, metadata: Mapping[str, str] | None
    ) -> tuple[list[Job], bool]:
        """The `limit` jobs of `owner`'s made before the one with the id `after`, the newest first, and whether there
        are more. `metadata`: those alone that have all of these pairs; None: those that have none at all. Raises
        BadRequest for an unknown cursor."""
        conditions: list[str] = ["owner = ?"]
        args: list[Any] = [owner]
        if metadata is None:
            conditions.append("metadata is null")
        for key, value in (metadata or {}).items():
            conditions.append("exists (select 1 from json_each(metadata) where key = ? and value = ?)")
            args += [key, value]
        if after is not None:
            place = self._database.row(
                "select created_at, rowid as place from jobs where id = ? and owner = ?", (after, owner)
            )
            if place is None:
                raise unknown_cursor(after)
            conditions.append("(created_at, rowid) < (?, ?)")
            args += place.values()
        rows = self._database.rows(
            f"select * from jobs where {' and '.join(conditions)} order by created_at desc, rowid desc limit ?",
            [*args, limit + 1],
        )
        return [Job.of(row) for row in rows[:limit]], len(rows) > limit

    def under_way(self) -> list[Job]:
        """Those of all owners that have not ended, the oldest first."""
        return self.in_status(*(status for status in Status if not status.final))

    def in_status(self, *statuses: Status) -> list[Job]:
        """Those of all owners, the oldest first."""
        rows = self._database.rows(
            "select * from jobs where status in (select value from json_each(?)) order by created_at, rowid",
            (json.dumps(statuses),),
        )
        return [Job.of(row) for row in rows]

    def next_to_validate(self, most_bytes: int | None, but: Collection[str]) -> Job | None:
        """With files of at most so many bytes, of the owner with the fewest jobs that are validated and under way; then
        by priority, then by age. None of `but`, by their ids."""
        condition = "(? is null or j.input_bytes <= ?)"
        return self._next(Status.VALIDATING, (Status.QUEUED, Status.RUNNING), condition, most_bytes, but)

    def next_to_run(self, most: int, but: Collection[str]) -> Job | None:
        """Of the owner with the fewest jobs that run, fewer than `most`; then by priority, then by age. None of `but`,
        by their ids, and none that waits for another (`awaited`)."""
        condition = f"(? is null or coalesce(b.n, 0) < ?) and not exists (select 1 from jobs e where {_AWAITED})"
        return self._next(Status.QUEUED, (Status.RUNNING,), condition, most, but)

    def awaited(self, job: Job) -> list[str]:
        """The ids of the jobs that must have ended before this one starts, the oldest first: it goes on from an adapter
        by its bare name, and they were created before it and make versions of that adapter."""
        rows = self._database.rows(
            f"select e.id from jobs j join jobs e on {_AWAITED} where j.id = ? order by e.created_at, e.rowid",
            (job.id,),
        )
        return [row["id"] for row in rows]

    def _next(
        self, status: Status, busy: Collection[Status], condition: str, most: int | None, but: Collection[str]
    ) -> Job | None:
        """`condition`, which takes `most` twice, may speak of a job `j` and of how many its owner has `busy`, `b.n`."""
        row = self._database.row(
            f"""with busy as (
                   select owner, count(*) as n from jobs where status in (select value from json_each(?)) group by owner
               )
               select j.* from jobs j left join busy b on b.owner = j.owner
               where j.status = ? and {condition} and j.id not in (select value from json_each(?))
               order by coalesce(b.n, 0), j.priority desc, j.created_at, j.rowid limit 1""",
            (json.dumps(list(busy)), status, most, most, json.dumps(list(but))),
        )
        return Job.of(row) if row else None

    # -- changing

    def move(self, job: Job, to: Status, message: str, *, level: str = "info", **changes: Any) -> bool:
        """From the state that `job` was seen in to another, with an event that says so. False, and nothing changed,
        when it is in that state no longer."""
        with self._database.transaction() as db:
            if self.get(None, job.id).status is not job.status:
                return False
            if to is not Status.RUNNING:
                changes["estimated_finish"] = None
            if to.final:
                changes["finished_at"] = now()
            db.table("jobs").update(job.id, {"status": to, **changes})
            self.events.add(job.id, message, level=level)
        return True

    def update(self, job: str, **changes: Any) -> None:
        """Fields other than the status."""
        self._database.update("jobs", job, **changes)

    def note(self, notes: Sequence[Note]) -> None:
        """All in one transaction; nothing of jobs that have ended meanwhile."""
        if not notes:
            return
        with self._database.transaction() as db:
            status = {job.id: job.status for job in self.under_way()}
            for note in notes:
                if note.job in status:
                    self.events.add(note.job, note.message, data=note.data)
            for job, note in {note.job: note for note in notes}.items():
                if job in status:
                    finish = note.estimated_finish if status[job] is Status.RUNNING else None
                    changes = {"trained_tokens": note.trained_tokens, "estimated_finish": finish}
                    db.table("jobs").update(job, changes)

    def fail(self, job: Job, error: HubError) -> bool:
        """False when the job is no longer in the state it was seen in."""
        shown = {"code": error.code, "message": error.message, "param": error.param}
        return self.move(job, Status.FAILED, error.message, level="error", error=json.dumps(shown))

    def cancel(self, owner: str, identity: str) -> Job:
        """Raises BadRequest when the job has ended already."""
        with self._database.freeing():
            job = self.get(owner, identity)
            if job.status.final:
                raise _has_already(job, "cancelled")
            self.move(job, Status.CANCELLED, "The job was cancelled")
            return self.get(owner, identity)

    def pause(self, owner: str, identity: str) -> Job:
        """It keeps what it has done and its place by age. Raises BadRequest when it has ended, or is paused already."""
        with self._database.transaction():
            job = self.get(owner, identity)
            if job.status.final or job.status is Status.PAUSED:
                raise _has_already(job, "paused")
            self.move(job, Status.PAUSED, "The job was paused")
            return self.get(owner, identity)

    def resume(self, owner: str, identity: str) -> Job:
        """To where it was: to the queue, or to validation. Raises BadRequest when it is not paused."""
        with self._database.transaction():
            job = self.get(owner, identity)
            if job.status is not Status.PAUSED:
                message = f"Job {identity} is not paused; its status is {job.status}."
                raise BadRequest(message, code="invalid_status")
            to = Status.VALIDATING if job.report is None else Status.QUEUED
            self.move(job, to, "The job was resumed")
            return self.get(owner, identity)

    def _made(self, order: Order, retry: bool) -> Job | None:
        row = self._database.row(
            """select job, key, digest from requests
               where owner = ? and (key = ? or (? and digest = ? and created_at >= ?))
               order by created_at desc, rowid desc limit 1""",
            (order.owner, order.key, retry, order.digest, now() - _RETRY_SECONDS),
        )
        if row is not None and row["digest"] != order.digest:
            raise KeyReused(row["key"])
        return self.get(order.owner, row["job"]) if row else None


def _has_already(job: Job, what: str) -> BadRequest:
    been = {Status.PAUSED: "is already paused", Status.CANCELLED: "was already cancelled"}.get(
        job.status, f"has already {job.status}"
    )
    return BadRequest(f"Job {job.id} {been}; it cannot be {what}.", code="invalid_status")
