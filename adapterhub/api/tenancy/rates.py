"""Requests and tokens per minute: who may ask now, and when again.

A request is let in with its prompt and a usual answer set aside; what it took is known when it ends. An answer that was
longer is owed, and an owner who owes waits until it has been paid back, so that in the long run nobody gets more than
their limit. What is owed is saved every second and outlives a restart: none begins with a full minute, or an empty one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.api.tenancy.buckets import SECOND, Bucket
from adapterhub.api.tenancy.quotas import Limits, Quotas
from adapterhub.errors import RateLimited
from adapterhub.swap.database import Database

USUAL_ANSWER = 256  # tokens that are set aside for an answer, if it may become as long
migrations = Migrations("adapterhub.rates")


@migrations()
def create_owed(db: sqlite_utils.Database) -> None:
    # what is owed is text: it may be larger than SQLite's integers
    db.execute("""
        create table owed (
            owner text primary key, requests text not null, tokens text not null, saved_at integer not null)
    """)


@dataclass
class _Account:
    requests: Bucket
    tokens: Bucket


@dataclass(frozen=True)
class Admission:
    """A request that was let in, and the tokens that are set aside for it."""

    owner: str
    tokens: int


class Rates:
    """Safe to use from any thread. `clock` counts nanoseconds and never goes back."""

    def __init__(self, database: Database, quotas: Quotas, clock: Callable[[], int] = time.monotonic_ns) -> None:
        database.migrate(migrations)
        self._database = database
        self._quotas = quotas
        self._clock = clock
        self._lock = threading.Lock()
        self._saving = threading.Lock()  # what is being written down is not erased before
        self._changed: set[str] = set()
        self._accounts: dict[str, _Account] = {}
        for row in database.rows("select * from owed"):
            at = clock() - max(0, time.time_ns() - row["saved_at"])
            self._accounts[row["owner"]] = _Account(Bucket(at, int(row["requests"])), Bucket(at, int(row["tokens"])))

    def admit(self, owner: str, tokens: int) -> Admission:
        """Lets a request in that sets `tokens` aside. Raises RateLimited, which says when to come back; nothing has
        been taken then."""
        limits = self._quotas.of(owner)
        if not limits.rates:
            return Admission(owner, 0)
        with self._lock:
            account, now = self._account(owner), self._clock()  # in this order: a bucket's time must not go back
            asked = (
                ("requests", 1, account.requests, limits.requests_per_minute),
                ("tokens", tokens, account.tokens, limits.tokens_per_minute),
            )
            limited = [(what, amount, bucket, limit) for what, amount, bucket, limit in asked if limit is not None]
            for what, amount, _, limit in limited:
                if amount > limit:
                    raise RateLimited(
                        f"This request is for {amount} {what}, with what is set aside for its answers; you may use "
                        f"{limit} per minute. Ask for less at once.",
                        retry_after=60,
                        headers={**self._headers(account, limits, now), "x-should-retry": "false"},
                    )
            waits = [(bucket.wait(amount, limit, now), what, limit) for what, amount, bucket, limit in limited]
            wait, what, limit = max(waits, default=(0, "", 0))
            if wait:
                seconds = math.ceil(wait / SECOND)
                raise RateLimited(
                    f"You have used up your {limit} {what} per minute. Try again in {seconds} s.",
                    retry_after=seconds,
                    headers=self._headers(account, limits, now),
                )
            self._take(account, limits, 1, tokens, now)
            self._changed.add(owner)
        return Admission(owner, 0 if limits.tokens_per_minute is None else tokens)

    def settle(self, admission: Admission, tokens: int) -> None:
        """A request has ended, and took so many tokens."""
        limits = self._quotas.of(admission.owner)
        if not limits.rates:
            return
        with self._lock:
            if (account := self._accounts.get(admission.owner)) is None:  # erased meanwhile
                return
            self._take(account, limits, 0, tokens - admission.tokens, self._clock())
            self._changed.add(admission.owner)

    def headers(self, owner: str) -> dict[str, str]:
        """What there is of each limit, as OpenAI's servers say it; nothing of what has none."""
        limits = self._quotas.of(owner)
        if not limits.rates:
            return {}
        with self._lock:
            return self._headers(self._account(owner), limits, self._clock())

    def save(self) -> None:
        """Writes down what is owed where that has changed since the last time."""
        with self._saving:
            self._save()

    def _save(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, set()
            rows = [self._row(owner) for owner in changed]
        if rows:
            try:
                with self._database.transaction() as db:
                    db.table("owed").upsert_all(rows, pk="owner")
            except BaseException:
                with self._lock:
                    self._changed |= changed
                raise

    def erase(self, owner: str) -> None:
        with self._lock:
            self._accounts.pop(owner, None)
            self._changed.discard(owner)
        with self._saving, self._database.freeing() as db:
            db.execute("delete from owed where owner = ?", [owner])

    def _account(self, owner: str) -> _Account:
        now = self._clock()
        return self._accounts.setdefault(owner, _Account(Bucket(now), Bucket(now)))

    def _row(self, owner: str) -> dict[str, object]:
        account = self._account(owner)
        self._take(account, self._quotas.of(owner), 0, 0, self._clock())  # as it is now, that being when it is saved
        owed = {"requests": str(account.requests.owed), "tokens": str(account.tokens.owed)}
        return {"owner": owner, **owed, "saved_at": time.time_ns()}

    @staticmethod
    def _take(account: _Account, limits: Limits, requests: int, tokens: int, now: int) -> None:
        if limits.requests_per_minute is not None:
            account.requests.take(requests, limits.requests_per_minute, now)
        if limits.tokens_per_minute is not None:
            account.tokens.take(tokens, limits.tokens_per_minute, now)

    @staticmethod
    def _headers(account: _Account, limits: Limits, now: int) -> dict[str, str]:
        found = {}
        for what, bucket, limit in (
            ("requests", account.requests, limits.requests_per_minute),
            ("tokens", account.tokens, limits.tokens_per_minute),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{what}"] = str(limit)
                found[f"x-ratelimit-remaining-{what}"] = str(bucket.left(limit, now))
                found[f"x-ratelimit-reset-{what}"] = _duration(bucket.until_full(limit, now))
        return found


def _duration(nanoseconds: int) -> str:
    """As OpenAI's headers have it: "820ms", "6.5s", "1m30s", "1h0m0s"."""
    if nanoseconds < SECOND:
        return f"{math.ceil(nanoseconds / 10**6)}ms"
    if nanoseconds < 60 * SECOND:
        return f"{math.ceil(nanoseconds / 10**8) / 10:g}s"
    minutes, seconds = divmod(math.ceil(nanoseconds / SECOND), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"
