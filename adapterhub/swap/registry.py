"""The registry: which adapters there are, whose they are, and which immutable version each name points at.

A block is on the disk, and in the store where there is one, before a row names it, and its row goes before it does, so
that a kill at any moment leaves at most blocks that no row names. At the next start `clean_up` removes those from the
disk, and `Mirror` from the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.errors import NotFound
from adapterhub.swap.blobs import Named
from adapterhub.swap.block import Block
from adapterhub.swap.database import Database, Row, new_id, now
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.names import check_name
from adapterhub.swap.objects import Objects, State
from adapterhub.swap.pins import Pins
from adapterhub.swap.ref import AdapterRef

log = logging.getLogger(__name__)
migrations = Migrations("adapterhub.swap")

_SELECT = """
    select v.id, v.number, v.digest, v.nbytes, v.rank, v.fingerprint, v.base, v.origin, v.created_at,
           a.id as adapter, a.owner, a.name, a.current = v.id as current, a.pinned
    from versions v join adapters a on a.id = v.adapter
"""


@migrations()
def create_adapters(db: sqlite_utils.Database) -> None:
    db.execute("""
        create table adapters (
            id text primary key, owner text not null, name text not null, current text, created_at integer not null,
            unique (owner, name))
    """)
    db.execute("""
        create table versions (
            id text primary key, adapter text not null references adapters(id) on delete cascade,
            number integer not null, digest text not null, nbytes integer not null, rank integer not null,
            fingerprint text not null, base text not null, origin text not null, created_at integer not null,
            unique (adapter, number))
    """)
    db.execute("create index versions_by_digest on versions (digest)")


@migrations()
def add_pins(db: sqlite_utils.Database) -> None:
    db.execute("alter table adapters add column pinned text")


@dataclass(frozen=True)
class Version:
    """One immutable version, with the adapter it belongs to. `origin` is a job's id, or "import"."""

    id: str
    number: int
    digest: str
    nbytes: int
    rank: int
    fingerprint: str
    base: str
    origin: str
    created_at: int
    adapter: str
    owner: str
    name: str
    current: bool
    pinned: str | None  # "owner" or "admin": who keeps the adapter in memory

    @classmethod
    def of(cls, row: Row) -> Version:
        return cls(**{**row, "current": bool(row["current"])})

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.id, self.digest, self.nbytes, self.owner, self.current and self.pinned is not None)

    @property
    def model(self) -> str:
        """The name of this version in the API: `ft:{base}:{owner}:{suffix}:{id}`."""
        return f"ft:{self.base}:{self.owner}:{self.name}:{self.id}"

    @property
    def alias(self) -> str:
        """The name of whatever version is current: `{owner}/{suffix}`."""
        return f"{self.owner}/{self.name}"


class Registry:
    """Safe to use from any thread."""

    def __init__(
        self, database: Database, disk: DiskTier, keep_in_memory: Callable[[str, bool], None] = lambda *_: None
    ) -> None:
        """`keep_in_memory` is told the digest of a block that stays there from now on, as it is pinned, or may go."""
        database.migrate(migrations)
        self._database = database
        self._disk = disk
        self.objects = Objects(database, disk.store.url if disk.store else None)

        def keep(digest: str, pinned: bool) -> None:
            disk.pin(digest, pinned)
            keep_in_memory(digest, pinned)

        self.pins = Pins(database, keep)

    def publish(self, owner: str, name: str, block: Block, base: str, origin: str) -> Version:
        """Stores `block` as the next version of `owner`'s adapter `name`, and points the name at it.

        Raises StorageFull when the disk, its budget or the store is full, and Unavailable when the store does not
        answer; the name then stays as it was.
        """
        check_name(name, "name")
        with self._disk.holding(block.digest):
            try:
                return self._publish(owner, name, block, base, origin)
            except BaseException:
                self._remove_unnamed(block.digest)
                self.objects.to_do.set()
                raise

    def _publish(self, owner: str, name: str, block: Block, base: str, origin: str) -> Version:
        in_store = self._disk.store is not None
        if in_store:
            self.objects.set(block.digest, State.UPLOADING)
        self._disk.write(block, owner)
        if in_store:
            self._disk.upload(block.digest)
        with self._database.transaction() as db:
            sql = """
                select a.id, a.pinned, v.digest from adapters a left join versions v on v.id = a.current
                where a.owner = ? and a.name = ?
            """
            row = self._database.row(sql, (owner, name))
            adapter = row["id"] if row else new_id("adapter")
            if row is None:
                db.table("adapters").insert(
                    {"id": adapter, "owner": owner, "name": name, "current": None, "created_at": now()}
                )
            last = self._database.row("select max(number) as n from versions where adapter = ?", (adapter,))
            version = new_id("v").removeprefix("v-")[:12]
            db.table("versions").insert(
                {
                    "id": version,
                    "adapter": adapter,
                    "number": ((last or {})["n"] or 0) + 1,
                    "digest": block.digest,
                    "nbytes": block.meta.nbytes,
                    "rank": block.meta.rank,
                    "fingerprint": block.meta.fingerprint,
                    "base": base,
                    "origin": origin,
                    "created_at": now(),
                }
            )
            db.table("adapters").update(adapter, {"current": version})
            if in_store:
                self.objects.set(block.digest, State.STORED)
        self._disk.files.settle([Named(block.digest, owner, safe=in_store)])
        if row and row["pinned"]:
            self.pins.settle([block.digest, row["digest"]])
        return self.version(owner, version)

    def resolve(self, owner: str, model: str) -> Version | None:
        """The version that one of `owner`'s model names means; None if there is none of that name."""
        if model.startswith("ft:"):
            found = self._one("a.owner = ? and v.id = ?", (owner, model.rsplit(":", 1)[-1]))
            return found if found and found.model == model else None
        whose, _, name = model.partition("/")
        return self._one("a.owner = ? and a.name = ? and v.id = a.current", (owner, name)) if whose == owner else None

    def version(self, owner: str, version: str) -> Version:
        found = self._one("a.owner = ? and v.id = ?", (owner, version))
        if found is None:
            raise NotFound(f"There is no version {version!r}.")
        return found

    def adapter(self, owner: str | None, adapter: str) -> list[Version]:
        """All versions of an adapter, by its id, the newest first; any owner's with `owner` None. Raises NotFound."""
        found = self._all("a.id = ? and (? is null or a.owner = ?)", (adapter, owner, owner))
        if not found:
            whose, route = ("There is", "/admin/adapters") if owner is None else ("You have", "/v1/adapters")
            raise NotFound(f"{whose} no adapter {adapter[:80]!r}. `GET {route}` lists them.", param="id")
        return found

    def versions(self, owner: str | None = None) -> list[Version]:
        """Every version of `owner`'s, or of all owners', by adapter, the newest first."""
        return self._all("true", ()) if owner is None else self._all("a.owner = ?", (owner,))

    def adapters(self, adapters: Sequence[str]) -> list[Version]:
        """Every version of the adapters with those ids, by adapter, the newest first."""
        return self._all("a.id in (select value from json_each(?))", (json.dumps(adapters),))

    def of_blocks(self, digests: Iterable[str]) -> list[Version]:
        """Every version, of whatever owner, that has one of those blocks."""
        return self._all("v.digest in (select value from json_each(?))", (json.dumps(list(digests)),))

    def of_origin(self, owner: str, origin: str) -> Version | None:
        """What a job has published, if it has."""
        return self._one("a.owner = ? and v.origin = ?", (owner, origin))

    def block(self, version: Version) -> Block:
        """The version's block, whole and checked. Raises BlockDamaged; Unavailable when the store does not answer."""
        return self._disk.block(version.ref)

    def delete_adapter(self, owner: str | None, adapter: str) -> list[Version]:
        """Removes an adapter with all its versions, anybody's with `owner` None; returns what they were.

        Raises NotFound.
        """
        with self._database.transaction() as db:
            gone = self.adapter(owner, adapter)
            db.table("adapters").delete(adapter)
            self.objects.give_up(v.digest for v in gone)
        self._unpin(gone)
        self._remove_given_up(gone)
        return gone

    def delete_version(self, owner: str, version: str) -> Version:
        """Removes one version. The name then points at the newest one left, and goes with its last. Raises NotFound."""
        with self._database.transaction() as db:
            gone = self.version(owner, version)
            db.table("versions").delete(version)
            left = self._all("a.id = ?", (gone.adapter,))
            if not left:
                db.table("adapters").delete(gone.adapter)
            elif gone.current:
                db.table("adapters").update(gone.adapter, {"current": left[0].id})
            self.objects.give_up([gone.digest])
        self._unpin([gone, *left])
        self._remove_given_up([gone])
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

    def _unpin(self, changed: list[Version]) -> None:
        """After versions of one adapter have gone: the current one has the pin, if there is one."""
        if changed[0].pinned is not None:
            self.pins.settle(v.digest for v in changed)

    def _remove_given_up(self, versions: list[Version]) -> None:
        for digest in {v.digest for v in versions}:
            with self._disk.holding(digest):
                self._remove_unnamed(digest)

    def _remove_unnamed(self, digest: str) -> None:
        if self._database.row("select 1 from versions where digest = ? limit 1", (digest,)) is None:
            self._disk.remove(digest)

    def _one(self, where: str, args: tuple[object, ...]) -> Version | None:
        found = self._all(where, args)
        return found[0] if found else None

    def _all(self, where: str, args: tuple[object, ...]) -> list[Version]:
        rows = self._database.rows(f"{_SELECT} where {where} order by a.owner, a.name, v.number desc", args)
        return [Version.of(row) for row in rows]
