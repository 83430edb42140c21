"""What a job's events say, in the order they were written: messages for people, metrics for curves. Paged in SQL, as a
job can have tens of thousands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.swap.catalog import unknown_cursor
from adapterhub.swap.database import Database, Row, new_id, now


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


class Events:
    """Safe to use from any thread. The table belongs to `JobStore`, and goes with a job's row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, job: str, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
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

    def page(self, job: str, after: str | None, limit: int) -> tuple[list[Event], bool]:
        """The `limit` events before the one with the id `after`, the newest first, and whether there are more. Raises
        BadRequest for an unknown one."""
        place = None
        if after is not None:
            found = self._database.row("select rowid as place from events where id = ? and job = ?", (after, job))
            if found is None:
                raise unknown_cursor(after)
            place = found["place"]
        rows = self._database.rows(
            "select * from events where job = ? and (? is null or rowid < ?) order by rowid desc limit ?",
            (job, place, place, limit + 1),
        )
        return [Event.of(row) for row in rows[:limit]], len(rows) > limit

    def metrics(self, job: str) -> list[dict[str, Any]]:
        """The metrics of each step, by step. Where a step was made twice, as after a kill, the last ones."""
        rows = self._database.rows(
            """select data, max(rowid) from events where job = ? and type = 'metrics'
               group by json_extract(data, '$.step') order by json_extract(data, '$.step')""",
            (job,),
        )
        return [json.loads(row["data"]) for row in rows]
