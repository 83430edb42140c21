"""The registry: which adapters there are, whose they are, and which immutable version each name points at.

A block is on the disk, and in the store where there is one, before a row names it, and its row goes before it does, so
that a kill at any moment leaves at most blocks that no row names. At the next start `clean_up` removes those from the
disk, and `Mirror` from the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from adapterhub.errors import BadRequest
from adapterhub.swap.blobs import Named
from adapterhub.swap.block import Block
from adapterhub.swap.database import Database, Row, new_id, now
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.history import History, shares_of
from adapterhub.swap.names import check_name
from adapterhub.swap.objects import Objects, State
from adapterhub.swap.pins import Pins
from adapterhub.swap.tables import migrations
from adapterhub.swap.versions import Kind, Version, Versions, current_of

log = logging.getLogger(__name__)
_CHECKPOINT = "a.owner = ? and a.name = ? and v.origin = ? and v.step = ?"


class Registry(Versions):
    """The versions that there are, and what changes them. Safe to use from any thread."""

    def __init__(
        self, database: Database, disk: DiskTier, keep_in_memory: Callable[[str, bool], None] = lambda *_: None
    ) -> None:
        """`keep_in_memory` is told the digest of a block that stays there from now on, as it is pinned, or may go."""
        database.migrate(migrations)
        super().__init__(database)
        self._disk = disk
        self.history = History(database)
        self.objects = Objects(database, disk.store.url if disk.store else None)

        def keep(digest: str, pinned: bool) -> None:
            disk.pin(digest, pinned)
            keep_in_memory(digest, pinned)

        self.pins = Pins(database, keep)

    def publish(
        self,
        owner: str,
        name: str,
        block: Block,
        base: str,
        origin: str,
        *,
        kind: Kind = Kind.RELEASE,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Version:
        """Stores `block`, as `owner`'s, as a new version of their adapter `name`; the name then points at it if it is a
        release, and stays as it was otherwise.

        `step` is a checkpoint's, and of no other kind. A job publishes its checkpoint of a step once: the second time
        it is the first one, so that a job that goes on after a kill does not leave two. `metrics` is JSON, with finite
        numbers alone.

        Raises StorageFull when the disk, its budget or the store is full, and Unavailable when the store does not
        answer; nothing has changed then.
        """
        assert (step is not None) == (kind is Kind.CHECKPOINT)
        check_name(name, "name")
        block = block.of_owner(owner)
        if step is not None and (there := self._one(_CHECKPOINT, (owner, name, origin, step))):
            return there
        row = {
            "id": new_id("v").removeprefix("v-")[:12],
            "kind": kind,
            "step": step,
            "metrics": None if metrics is None else json.dumps(metrics, allow_nan=False),
            "digest": block.digest,
            "nbytes": block.meta.nbytes,
            "rank": block.meta.rank,
            "fingerprint": block.meta.fingerprint,
            "base": base,
            "origin": origin,
            "created_at": now(),
        }
        with self._disk.holding(block.digest):
            try:
                return self._publish(owner, name, block, row)
            except BaseException:
                self._remove_unnamed(block.digest)
                self.objects.to_do.set()
                raise

    def _publish(self, owner: str, name: str, block: Block, row: Row) -> Version:
        in_store = self._disk.store is not None
        if in_store:
            self.objects.set(block.digest, State.UPLOADING)
        self._disk.write(block, owner)
        if in_store:
            self._disk.upload(block.digest)
        with self._database.transaction() as db:
            adapter = self._adapter(owner, name)
            before = self._current(adapter)
            number = None if row["kind"] is Kind.CHECKPOINT else self._next_number(adapter)
            db.table("versions").insert({**row, "adapter": adapter, "number": number})
            if row["kind"] is Kind.RELEASE:
                self.history.point(adapter, row["id"])
            if in_store:
                self.objects.set(block.digest, State.STORED)
            published = self.version(owner, row["id"])
        self._disk.files.settle([Named(block.digest, owner, safe=in_store)])
        self._move_pin(before, published)
        return published

    def promote(self, owner: str | None, adapter: str, which: str) -> Version:
        """Makes a version, as `find` takes it, the adapter's current one, and a release if it was none; anybody's with
        `owner` None. Raises NotFound."""
        with self._database.transaction() as db:
            chosen = self.find(owner, adapter, which)
            before = self._current(adapter)
            number = self._next_number(adapter) if chosen.number is None else chosen.number
            db.table("versions").update(chosen.id, {"kind": Kind.RELEASE, "number": number})
            self.history.point(adapter, chosen.id)
            promoted = self.version(chosen.owner, chosen.id)
        self._move_pin(before, promoted)
        return promoted

    def rollback(self, owner: str | None, adapter: str) -> Version:
        """Makes current what was so before; the next rollback goes further back. Raises NotFound, and BadRequest when
        there is nothing to go back to."""
        with self._database.transaction():
            before = current_of(self.adapter(owner, adapter))
            version = self.history.back(adapter)
            if version is None:
                raise BadRequest(
                    f"Nothing was current before {before.label} of {before.alias}. `adapterhub adapters promote "
                    f"{before.alias} VERSION` makes any version current.",
                    param="id",
                )
            after = self.version(before.owner, version)
        self._move_pin(before, after)
        return after

    def split(self, owner: str | None, adapter: str, percent: Mapping[str, int]) -> list[Version]:
        """Sends so much of the requests for the adapter's name to those versions, each as `find` takes it, and the rest
        to the current one; with none given, all. Returns the adapter's versions. Raises NotFound and BadRequest."""
        with self._database.transaction():
            current = current_of(self.adapter(owner, adapter))
            given = [(self.find(owner, adapter, which), share) for which, share in percent.items()]
            self.history.split(adapter, shares_of(current, given))
            return self.adapter(owner, adapter)

    def block(self, version: Version) -> Block:
        """The version's block, whole and checked. Raises BlockDamaged; Unavailable when the store does not answer."""
        return self._disk.block(version.ref)

    def delete_adapter(self, owner: str | None, adapter: str) -> list[Version]:
        """Removes an adapter with all its versions, anybody's with `owner` None; returns what they were.

        Raises NotFound.
        """
        with self._database.freeing() as db:
            gone = self.adapter(owner, adapter)
            db.table("adapters").delete(adapter)
            self.objects.give_up(v.digest for v in gone)
        self._move_pin(*gone)
        self._remove_given_up(gone)
        return gone

    def delete_version(self, owner: str, version: str) -> Version:
        """Removes one version; an adapter goes with its last. The name of a current one then points at what it pointed
        at before, else at the newest release left, if any. Raises NotFound."""
        with self._database.freeing():
            gone = self.version(owner, version)
            self._drop(gone)
            after = self._current(gone.adapter)
        self._move_pin(gone, after)
        self._remove_given_up([gone])
        return gone

    def erase(self, owner: str) -> list[Version]:
        """Removes all adapters of an owner, one by one; returns the versions that there were."""
        gone: list[Version] = []
        with_versions = "select distinct adapter from versions v join adapters a on a.id = v.adapter where a.owner = ?"
        for row in self._database.rows(with_versions, (owner,)):
            gone += self.delete_adapter(owner, row["adapter"])
        return gone

    def prune_checkpoints(self, owner: str, job: str, keep: int) -> list[Version]:
        """Removes a job's checkpoints but for the last `keep`, those that have been promoted, and those that a split
        sends requests to; returns what they were."""
        with self._database.freeing():
            left = [v for v in self.checkpoints(owner, job) if v.kind is Kind.CHECKPOINT]
            gone = [v for v in left[keep:] if v.percent == 0]
            for version in gone:
                self._drop(version)
        self._remove_given_up(gone)
        return gone

    def disk_used(self) -> int:
        """Bytes of the block files, each once however many versions name it."""
        return self._disk.files.used_bytes

    def clean_up(self) -> int:
        """At a start, before anything is published: removes files that no row names, as a kill may have left them, and
        tells the disk whose the others are; returns how many it removed."""
        sql = """
            select v.digest, min(a.owner) as owner, max(a.pinned is not null and a.current = v.id) as pinned,
                   max(o.state = 'stored') as stored
            from versions v join adapters a on a.id = v.adapter
            left join objects o on o.digest = v.digest and o.store = ? group by v.digest
        """
        rows = self._database.rows(sql, (self.objects.store,))
        removed = self._disk.files.clean_up({row["digest"] for row in rows})
        in_store = self._disk.store is not None
        self._disk.files.settle(
            Named(row["digest"], row["owner"], bool(row["pinned"]), in_store and bool(row["stored"])) for row in rows
        )
        if not in_store:
            self._warn_of_missing({row["digest"] for row in rows})
        return removed

    def _warn_of_missing(self, named: set[str]) -> None:
        missing = [digest for digest in named if digest not in self._disk.files]
        elsewhere = self.objects.elsewhere() if missing else {}
        stores = ", ".join(sorted({elsewhere[digest] for digest in missing if digest in elsewhere}))
        if stores:
            log.warning("%d blocks are not on this disk; start the server with --store %s", len(missing), stores)
        elif missing:
            log.error("%d blocks are not on this disk; `adapterhub doctor` says whose they are", len(missing))

    def _adapter(self, owner: str, name: str) -> str:
        """The id of an adapter, which is made if need be."""
        row = self._database.row("select id from adapters where owner = ? and name = ?", (owner, name))
        if row:
            return str(row["id"])
        made = new_id("adapter")
        self._database.insert("adapters", {"id": made, "owner": owner, "name": name, "created_at": now()})
        return made

    def _current(self, adapter: str) -> Version | None:
        return self._one("a.id = ? and v.id = a.current", (adapter,))

    def _next_number(self, adapter: str) -> int:
        """No number is given twice, so that `owner/name@3` never means another version."""
        with self._database.transaction() as db:
            db.execute("update adapters set last_number = last_number + 1 where id = ?", (adapter,))
            [row] = db.query("select last_number from adapters where id = ?", (adapter,))
            return int(row["last_number"])

    def _drop(self, version: Version) -> None:
        """Within a transaction: removes the row of a version, and of the adapter when it was the last."""
        with self._database.transaction() as db:
            db.table("versions").delete(version.id)
            if not self._database.row("select 1 from versions where adapter = ? limit 1", (version.adapter,)):
                db.table("adapters").delete(version.adapter)
            elif version.current:
                self.history.mend(version.adapter)
            elif version.percent:
                self.history.split(version.adapter, ())
            self.objects.give_up([version.digest])

    def _move_pin(self, *changed: Version | None) -> None:
        """After versions of one adapter have become current, ceased to be, or gone: a pin is on the current one."""
        versions = [version for version in changed if version is not None]
        if any(version.pinned for version in versions):
            self.pins.settle(version.digest for version in versions)

    def _remove_given_up(self, versions: list[Version]) -> None:
        for digest in {v.digest for v in versions}:
            with self._disk.holding(digest):
                self._remove_unnamed(digest)

    def _remove_unnamed(self, digest: str) -> None:
        if self._database.row("select 1 from versions where digest = ? limit 1", (digest,)) is None:
            self._disk.remove(digest)
