"""Erases an owner while the server runs: keys first, then what they are doing, then everything that is kept of them.

Each step removes all there is of one kind, and finds nothing when it is done again. So an erase that was killed, or met
a full disk, is simply done again: at the next start, or when it is asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from adapterhub.api.tenancy.erasures import Erasure
from adapterhub.errors import BadRequest, HubError, Unauthorized, Unavailable
from adapterhub.train.erase import erase_jobs

if TYPE_CHECKING:  # which has an eraser
    from adapterhub.api.hub import Hub

log = logging.getLogger(__name__)
_WAIT_SECONDS = 60  # for what an owner's requests and jobs are writing at the moment
_LOOK_SECONDS = 0.02
_ERASED = "This user was erased while the request ran."


class Step(NamedTuple):
    """`erase` returns how many there were of a kind that no table counts, or None."""

    name: str
    erase: Callable[[str], int | None]


class Eraser:
    """Safe to use from any thread but the event loop's; one erasure at a time."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._erasing = threading.Lock()
        self._keys: set[str] = set()  # that were erased, by their ids
        self.steps = [
            Step("jobs", self._jobs),
            Step("adapters", self._adapters),
            Step("files", self._files),
            Step("uploads", self._uploads),
            Step("kv_blocks", lambda owner: hub.engine.erase(owner).result()),
            Step("grammars", hub.grammars.erase),
            Step("uses", hub.trace.erase),
            Step("once", hub.once.erase),
            Step("usage", self._usage),
            Step("rules", self._rules),
        ]

    def erase(self, owner: str) -> Erasure:
        """Removes all of an owner; what the object store holds is left to the mirror.

        Raises NotFound for nobody; Unavailable when something of the owner's does not end, and StorageFull: then the
        owner has no key any more, and the erasure goes on when it is asked for again, or at the next start.
        """
        with self._erasing:
            keys = [key.id for key in self._hub.keys.list(owner)]
            identity = self._hub.erasures.begin(owner)
            self._keys.update(keys)
            self._hub.erasures.add(identity, "requests", self._end_requests(keys))
            self._end_jobs(owner)
            self._wait(owner)
            return self._remove(identity, owner)

    def go_on(self) -> None:
        """At a start, when nothing of an owner runs yet: takes what is to be erased to its end."""
        for owner in self._hub.erasures.unfinished():
            try:
                self._end_jobs(owner)
                erasure = self._remove(self._hub.erasures.begin(owner), owner)
                log.info("the erasure %s, which was interrupted, is done: %s", erasure.id, erasure.removed)
            except HubError as error:
                log.error("a user is not erased yet: %s", error)
        self._hub.database.scrub()  # which may be all that was left to do

    def _remove(self, identity: str, owner: str) -> Erasure:
        erasures = self._hub.erasures
        erasures.count(identity, owner)
        for step in self.steps:
            count = step.erase(owner)
            if count is not None:
                erasures.add(identity, step.name, count)
        done = erasures.finish(identity)
        self._hub.database.scrub()
        return done

    # -- what an owner is doing

    def _end_requests(self, keys: list[str]) -> int:
        reason = Unauthorized(_ERASED, code="user_erased")
        return self._hub.on_loop(lambda: self._hub.underway.erase(keys, reason))

    def _end_jobs(self, owner: str) -> None:
        sql = "select id from jobs where owner = ? and finished_at is null"
        for row in self._hub.database.rows(sql, (owner,)):
            try:
                self._hub.jobs.cancel(owner, row["id"])
            except BadRequest as error:
                log.info("a job ended before it was erased: %s", error)
        self._hub.worker.wake()

    def _wait(self, owner: str) -> None:
        """Until nobody writes anything for the owner any more."""
        rows = self._hub.database.rows("select id from jobs where owner = ?", (owner,))
        jobs = [row["id"] for row in rows]
        deadline = time.monotonic() + _WAIT_SECONDS
        while self._hub.on_loop(lambda: owner in self._hub.changes) or self._hub.worker.busy(jobs):
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"A request or a job of {owner!r} is still being written after {_WAIT_SECONDS} s. Their keys are "
                    "gone. Erase again to go on; the next start of the server does, too."
                )
            time.sleep(_LOOK_SECONDS)

    # -- what there is of an owner

    def _jobs(self, owner: str) -> None:
        erase_jobs(self._hub.database, self._hub.config.jobs_dir, owner)

    def _adapters(self, owner: str) -> None:
        gone = self._hub.registry.erase(owner)
        for asked in [self._hub.engine.evict(version.digest) for version in gone]:
            asked.result()
        self._hub.uses.forget(owner, {version.id for version in gone})

    def _files(self, owner: str) -> None:
        self._hub.files.erase(owner)

    def _uploads(self, owner: str) -> None:
        self._hub.uploads.erase(owner)

    def _usage(self, owner: str) -> None:
        self._hub.meter.erase(owner, self._keys)

    def _rules(self, owner: str) -> None:
        """What the operator has set for the owner, and what they owe of a minute."""
        hub = self._hub
        hub.rates.erase(owner)
        hub.quotas.forget(owner)
        named = [tier for tier, rules in hub.steering.rules.json.items() if owner in rules["owners"]]
        if named:
            hub.steering.set_rules(lambda rules: rules.patched({tier: {"owners": {owner: None}} for tier in named}))
