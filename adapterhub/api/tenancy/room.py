"""Room for more of what is kept: how many adapters, bytes and jobs an owner has, and whether more may come.

What is on its way in counts from the moment it was let in, so that many at once do not get past a quota together.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from adapterhub.api.tenancy.quotas import Quotas
from adapterhub.config import format_bytes
from adapterhub.errors import QuotaExceeded
from adapterhub.swap.database import Database

_NAMES = """
    select name from adapters where owner = ?1
    union select suffix from jobs where owner = ?1 and finished_at is null
"""  # of the adapters that an owner has, or will have when their jobs have ended
_BYTES = """
    select (select coalesce(sum(v.nbytes), 0) from versions v join adapters a on a.id = v.adapter where a.owner = ?1)
         + (select coalesce(sum(bytes), 0) from files where owner = ?1)
         + (select coalesce(sum(bytes), 0) from uploads where owner = ?1 and status = 'pending') as n
"""
_JOBS = "select count(*) as n from jobs where owner = ?1 and finished_at is null"


class Kept(NamedTuple):
    """What an owner has; `adapters` with those that their jobs will make."""

    adapters: int
    bytes: int
    jobs: int


class Room:
    """Safe to use from any thread."""

    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas
        self._lock = threading.Lock()
        self._names: Counter[tuple[str, str]] = Counter()  # adapters on their way in, by owner and name
        self._bytes: Counter[str] = Counter()

    def kept(self, owner: str) -> Kept:
        return Kept(len(self._names_of(owner)), self._count(_BYTES, owner), self._count(_JOBS, owner))

    @contextmanager
    def taken(self, owner: str, nbytes: int, *, adapter: str | None = None) -> Iterator[None]:
        """While so many bytes come in, as a version of `adapter` if it is one. Raises QuotaExceeded."""
        with self._lock:
            if adapter is not None:
                self._check_adapter(owner, adapter)
            self._check_bytes(owner, nbytes)
            self._bytes[owner] += nbytes
            self._names[owner, adapter or ""] += 1
        try:
            yield
        finally:
            with self._lock:
                self._bytes -= Counter({owner: nbytes})
                self._names -= Counter({(owner, adapter or ""): 1})

    def check_job(self, owner: str, adapter: str | None) -> None:
        """Whether a job may be created that makes `adapter`, None: one that has no name yet. Raises QuotaExceeded.

        To be asked in the transaction that creates it.
        """
        with self._lock:
            jobs, limit = self._count(_JOBS, owner), self._quotas.of(owner).jobs
            if limit is not None and jobs >= limit:
                raise QuotaExceeded(
                    f"You have {jobs} of at most {limit} fine-tuning jobs under way. Wait until one has ended, or "
                    "cancel one."
                )
            self._check_adapter(owner, adapter)
            self._check_bytes(owner, 0)

    def _check_adapter(self, owner: str, adapter: str | None) -> None:
        if (limit := self._quotas.of(owner).adapters) is None:
            return
        names = self._names_of(owner)
        if adapter not in names and len(names) >= limit:
            raise QuotaExceeded(
                f"You have {len(names)} of at most {limit} adapters, with those that are being made. Delete one, or "
                "make a new version of one."
            )

    def _check_bytes(self, owner: str, more: int) -> None:
        if (limit := self._quotas.of(owner).bytes) is None:
            return
        there = self._count(_BYTES, owner) + self._bytes[owner]
        if there + more > limit or there == limit:
            raise QuotaExceeded(
                f"You keep {format_bytes(there)} of files and adapters, and may keep {format_bytes(limit)}; this is "
                f"{format_bytes(more)} more. Delete something first."
            )

    def _names_of(self, owner: str) -> set[str]:
        coming = {name for whose, name in self._names if whose == owner and name}
        return coming | {row["name"] for row in self._database.rows(_NAMES, (owner,))}

    def _count(self, sql: str, owner: str) -> int:
        [row] = self._database.rows(sql, (owner,))
        return int(row["n"])
