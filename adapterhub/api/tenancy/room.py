"""Room for more of what is kept: how many adapters, bytes and jobs an owner has, and whether more may come.

What is on its way in counts from the moment it was let in, so that many at once do not get past a quota together.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from adapterhub.api.tenancy.quotas import Quotas
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import QuotaExceeded, TooManyRequests
from adapterhub.swap.database import Database

MAX_BODIES = 32  # of one owner's uploads that come in at once
_FORM_BYTES = MIB  # of their bodies, at most, that are not what is uploaded

_NAMES = """
    select name from adapters where owner = ?1
    union select suffix from jobs where owner = ?1 and finished_at is null
"""  # of the adapters that an owner has, or will have when their jobs have ended
_BYTES = """
    select (select coalesce(sum(v.nbytes), 0) from versions v join adapters a on a.id = v.adapter where a.owner = ?1)
         + (select coalesce(sum(bytes), 0) from files where owner = ?1)
         + (select coalesce(sum(bytes), 0) from uploads where owner = ?1 and status = 'pending')
         + (select coalesce(sum(json_extract(estimate, '$.bytes')), 0) from jobs
            where owner = ?1 and finished_at is null and id <> ?2) as n
"""  # of which a job's model is known when its files are validated
_JOBS = "select count(*) as n from jobs where owner = ?1 and finished_at is null"


class Kept(NamedTuple):
    """What an owner has; `adapters` and `bytes` with those that their jobs will make."""

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
        self._bodies: Counter[str] = Counter()  # of uploads that come in
        self._arriving: Counter[str] = Counter()  # their bytes

    def kept(self, owner: str) -> Kept:
        return Kept(len(self._names_of(owner)), self._count(_BYTES, owner, ""), self._count(_JOBS, owner))

    @contextmanager
    def taken(self, owner: str, nbytes: int, *, adapter: str | None = None, job: str | None = None) -> Iterator[None]:
        """While so many bytes come in, as a version of `adapter` if it is one; as what the `job` will make, and counts
        already, if one is named. Raises QuotaExceeded."""
        with self._lock:
            if adapter is not None:
                self._check_adapter(owner, adapter)
            self._check_bytes(owner, nbytes, job or "")
            self._bytes[owner] += nbytes
            self._names[owner, adapter or ""] += 1
        try:
            yield
        finally:
            with self._lock:
                self._bytes -= Counter({owner: nbytes})
                self._names -= Counter({(owner, adapter or ""): 1})

    @contextmanager
    def arriving(self, owner: str) -> Iterator[Callable[[int], None]]:
        """While the body of an upload comes in, which is not seen before it is whole, and lies in a temporary file: as
        much at once as may be kept. To be told of each byte, announced or come; raises QuotaExceeded then, and
        TooManyRequests before."""
        told = 0

        def more(nbytes: int) -> None:
            nonlocal told
            with self._lock:
                there, limit = self._arriving[owner], self._quotas.of(owner).bytes
                if limit is not None and there + nbytes > limit + _FORM_BYTES:
                    raise QuotaExceeded(
                        f"You send {format_bytes(there + nbytes)} at once, and may keep {format_bytes(limit)}. Send "
                        "less, or one after another.",
                        headers=_headers("bytes", limit, there),
                    )
                self._arriving[owner] += nbytes
                told += nbytes

        with self._lock:
            if self._bodies[owner] >= MAX_BODIES:
                raise TooManyRequests(f"{MAX_BODIES} of your uploads are under way. Try again in a second.")
            self._bodies[owner] += 1
        try:
            yield more
        finally:
            with self._lock:
                self._bodies -= Counter({owner: 1})
                self._arriving -= Counter({owner: told})

    def check_job(self, owner: str, adapter: str | None) -> None:
        """Whether a job may be created that makes `adapter`, None: one that has no name yet. Raises QuotaExceeded.

        To be asked in the transaction that creates it.
        """
        with self._lock:
            jobs, limit = self._count(_JOBS, owner), self._quotas.of(owner).jobs
            if limit is not None and jobs >= limit:
                raise QuotaExceeded(
                    f"You have {jobs} of at most {limit} fine-tuning jobs under way. Wait until one has ended, or "
                    "cancel one.",
                    headers=_headers("jobs", limit, jobs),
                )
            self._check_adapter(owner, adapter)
            self._check_bytes(owner, 0)

    def check_bytes(self, owner: str, nbytes: int, *, job: str) -> None:
        """Whether so many may come of the `job`, whatever it has been counted with. Raises QuotaExceeded.

        To be asked in the transaction that says that they will.
        """
        with self._lock:
            self._check_bytes(owner, nbytes, job)

    def _check_adapter(self, owner: str, adapter: str | None) -> None:
        if (limit := self._quotas.of(owner).adapters) is None:
            return
        names = self._names_of(owner)
        if adapter not in names and len(names) >= limit:
            raise QuotaExceeded(
                f"You have {len(names)} of at most {limit} adapters, with those that are being made. Delete one, or "
                "make a new version of one.",
                headers=_headers("adapters", limit, len(names)),
            )

    def _check_bytes(self, owner: str, more: int, job: str = "") -> None:
        if (limit := self._quotas.of(owner).bytes) is None:
            return
        there = self._count(_BYTES, owner, job) + self._bytes[owner]
        if there + more > limit or there == limit:
            raise QuotaExceeded(
                f"You keep {format_bytes(there)} of files and adapters, with what your jobs will make, and may keep "
                f"{format_bytes(limit)}; this is {format_bytes(more)} more. Delete something first.",
                headers=_headers("bytes", limit, there),
            )

    def _names_of(self, owner: str) -> set[str]:
        coming = {name for whose, name in self._names if whose == owner and name}
        return coming | {row["name"] for row in self._database.rows(_NAMES, (owner,))}

    def _count(self, sql: str, *args: str) -> int:
        [row] = self._database.rows(sql, args)
        return int(row["n"])


def _headers(what: str, limit: int, there: int) -> dict[str, str]:
    """As those of limits per minute; when there is room again, nobody knows."""
    return {f"x-ratelimit-limit-{what}": str(limit), f"x-ratelimit-remaining-{what}": str(max(0, limit - there))}
