"""Fine-tuning jobs as the database has them: their states, their events, and who owns them.

Every change of a job's state goes through `JobStore`, which the API reads and the worker (`worker.py`) moves along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.errors import BadRequest, HubError, NotFound
from adapterhub.swap.database import Database, Row, new_id, now

_RETRY_SECONDS = 120  # an SDK's retry of a creation comes within that
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


class Status(StrEnum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True)
class Job:
    """`hyperparameters` are those asked for until the file is validated, then those that the training uses."""

    id: str
    owner: str
    status: Status
    model: str
    training_file: str
    suffix: str
    given_suffix: str | None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    fingerprint: str
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: dict[str, Any] | None
    created_at: int
    finished_at: int | None
    estimated_finish: int | None

    @classmethod
    def of(cls, row: Row) -> Job:
        parsed = {k: json.loads(row[k]) if row[k] else None for k in ("hyperparameters", "metadata", "error")}
        return cls(**{**row, **parsed, "status": Status(row["status"])})


@dataclass(frozen=True)
class Event:
    id: str
    job: str
    level: str  # info, warn or error
    type: str  # message or metrics
    message: str
    data: dict[str, Any] | None
    created_at: int

    @classmethod
    def of(cls, row: Row) -> Event:
        return cls(**{**row, "data": json.loads(row["data"]) if row["data"] else None})


@dataclass(frozen=True)
class Order:
    """What a caller asked for, checked."""

    owner: str
    model: str
    training_file: str
    suffix: str | None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    fingerprint: str
    digest: str  # of the request as it came
    key: str | None  # the caller's `Idempotency-Key`, if there was one


class JobStore:
    """Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database

    def create(self, order: Order, *, retry: bool) -> tuple[Job, bool]:
        """Queues a job for validation, unless a request with the same key or, with `retry`, an equal and recent one has
        made one.

        Returns the job, and whether it is new.
        """
        with self._database.transaction() as db:
            if (made := self._made(order, retry)) is not None:
                return made, False
            identity = new_id("ftjob")
            suffix = order.suffix or identity.removeprefix("ftjob-")[:8]
            db.table("jobs").insert(
                {
                    "id": identity,
                    "owner": order.owner,
                    "status": Status.VALIDATING,
                    "model": order.model,
                    "training_file": order.training_file,
                    "suffix": suffix,
                    "given_suffix": order.suffix,
                    "seed": order.seed,
                    "hyperparameters": json.dumps(order.hyperparameters),
                    "metadata": json.dumps(order.metadata) if order.metadata else None,
                    "fingerprint": order.fingerprint,
                    "fine_tuned_model": None,
                    "trained_tokens": None,
                    "error": None,
                    "created_at": now(),
                    "finished_at": None,
                    "estimated_finish": None,
                }
            )
            request = {"job": identity, "owner": order.owner, "digest": order.digest, "key": order.key}
            db.table("requests").insert({**request, "created_at": now()})
            self.event(identity, f"Created fine-tuning job: {identity}")
            self.event(identity, f"Validating training file: {order.training_file}")
        return self.get(order.owner, identity), True

    def get(self, owner: str | None, identity: str) -> Job:
        """Raises NotFound, also for another owner's job. Any owner's with `owner` None."""
        row = self._database.row(
            "select * from jobs where id = ? and (? is null or owner = ?)", (identity, owner, owner)
        )
        if row is None:
            raise NotFound(f"You have no fine-tuning job {identity[:80]!r}.", param="id")
        return Job.of(row)

    def list(self, owner: str | None) -> Sequence[Job]:
        """The newest first; of all owners with `owner` None."""
        rows = self._database.rows(
            "select * from jobs where ? is null or owner = ? order by created_at desc, rowid desc", (owner, owner)
        )
        return [Job.of(row) for row in rows]

    def events(self, job: str) -> Sequence[Event]:
        """The newest first."""
        return [
            Event.of(r) for r in self._database.rows("select * from events where job = ? order by rowid desc", (job,))
        ]

    def next(self, status: Status) -> Job | None:
        """The job that has been in `status` the longest."""
        row = self._database.row("select * from jobs where status = ? order by created_at, rowid limit 1", (status,))
        return Job.of(row) if row else None

    def event(self, job: str, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
        self._database.insert(
            "events",
            {
                "id": new_id("ftevent"),
                "job": job,
                "level": level,
                "type": "metrics" if data else "message",
                "message": message,
                "data": json.dumps(data) if data else None,
                "created_at": now(),
            },
        )

    def move(self, job: Job, to: Status, message: str, *, level: str = "info", **changes: Any) -> bool:
        """Changes the status with an event that says so. False, nothing changed, when the job has ended already."""
        with self._database.transaction() as db:
            if self.get(None, job.id).status.final:
                return False
            if to.final:
                changes |= {"finished_at": now(), "estimated_finish": None}
            db.table("jobs").update(job.id, {"status": to, **changes})
            self.event(job.id, message, level=level)
        return True

    def note(self, job: Job, message: str, data: Mapping[str, Any], **changes: Any) -> None:
        """Progress: an event with metrics, and changes to the job; nothing when the job has ended meanwhile."""
        with self._database.transaction() as db:
            if not self.get(None, job.id).status.final:
                self.event(job.id, message, data=data)
                db.table("jobs").update(job.id, changes)

    def fail(self, job: Job, error: HubError) -> None:
        shown = {"code": error.code, "message": error.message, "param": error.param}
        self.move(job, Status.FAILED, error.message, level="error", error=json.dumps(shown))

    def cancel(self, owner: str, identity: str) -> Job:
        """Raises BadRequest when the job has ended already."""
        moved = self.move(self.get(owner, identity), Status.CANCELLED, "The job was cancelled")
        job = self.get(owner, identity)
        if not moved:
            raise BadRequest(f"Job {identity} has already {job.status}; it cannot be cancelled.", code="invalid_status")
        return job

    def _made(self, order: Order, retry: bool) -> Job | None:
        row = self._database.row(
            """select job from requests where owner = ? and (key = ? or (? and digest = ? and created_at >= ?))
               order by created_at desc, rowid desc limit 1""",
            (order.owner, order.key, retry, order.digest, now() - _RETRY_SECONDS),
        )
        return self.get(order.owner, row["job"]) if row else None
