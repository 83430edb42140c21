"""The registry: which adapters there are, whose they are, and which immutable version each name points at.

A block file is written before a row names it, and a row goes before its file does, so that a kill at any moment leaves
at most files that no row names; `clean_up` removes those at the next start.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.config import format_bytes
from adapterhub.errors import NotFound, StorageFull
from adapterhub.swap.block import SUFFIX, Block, block_path, read_block, write_block
from adapterhub.swap.database import Database, Row, new_id, now
from adapterhub.swap.files import remove_partials, sync_directory
from adapterhub.swap.names import check_name
from adapterhub.swap.ref import AdapterRef

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
    """Safe to use from any thread. `disk_bytes` bounds the block files in all."""

    def __init__(self, database: Database, blobs: Path, disk_bytes: int) -> None:
        blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
        database.migrate(migrations)
        self._database = database
        self._blobs = blobs
        self._disk_bytes = disk_bytes
        self._files = threading.Lock()  # between a file and the rows that name it

    def publish(self, owner: str, name: str, block: Block, base: str, origin: str) -> Version:
        """Stores `block` as the next version of `owner`'s adapter `name`, and points the name at it.

        Raises StorageFull when the disk or the budget is full; the name then stays as it was.
        """
        check_name(name, "name")
        with self._files:
            used, needed = self.disk_used(), block.meta.nbytes + len(block.source_bytes)
            if used + needed > self._disk_bytes:
                raise StorageFull(
                    f"Of {format_bytes(self._disk_bytes)} for adapters {format_bytes(used)} are in use, and "
                    f"this one needs {format_bytes(needed)}. Delete adapters, or raise --disk-bytes."
                )
            write_block(block, self._blobs)
            with self._database.transaction() as db:
                row = self._database.row("select id from adapters where owner = ? and name = ?", (owner, name))
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
        return self._all("? is null or a.owner = ?", (owner, owner))

    def adapters(self, adapters: Sequence[str]) -> list[Version]:
        """Every version of the adapters with those ids, by adapter, the newest first."""
        return self._all("a.id in (select value from json_each(?))", (json.dumps(adapters),))

    def of_origin(self, owner: str, origin: str) -> Version | None:
        """What a job has published, if it has."""
        return self._one("a.owner = ? and v.origin = ?", (owner, origin))

    def block(self, version: Version) -> Block:
        """The version's block file, whole and checked. Raises BlockDamaged."""
        return read_block(block_path(self._blobs, version.digest))

    def delete_adapter(self, owner: str | None, adapter: str) -> list[Version]:
        """Removes an adapter with all its versions, any owner's with `owner` None; returns what they were. Raises
        NotFound."""
        with self._files:
            gone = self.adapter(owner, adapter)
            with self._database.transaction() as db:
                db.table("adapters").delete(adapter)
            self._remove_files({v.digest for v in gone})
        return gone

    def delete_version(self, owner: str, version: str) -> Version:
        """Removes one version. The name then points at the newest one left, and goes with its last. Raises NotFound."""
        with self._files:
            gone = self.version(owner, version)
            with self._database.transaction() as db:
                db.table("versions").delete(version)
                left = self._all("a.id = ?", (gone.adapter,))
                if not left:
                    db.table("adapters").delete(gone.adapter)
                elif gone.current:
                    db.table("adapters").update(gone.adapter, {"current": left[0].id})
            self._remove_files({gone.digest})
        return gone

    def disk_used(self) -> int:
        """Bytes of the block files, each once however many versions name it."""
        used = 0
        for path in self._blobs.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # deleted at this moment
                used += path.stat().st_size
        return used

    def clean_up(self) -> int:
        """Removes files that no row names, as a kill may have left them; returns how many."""
        with self._files:
            removed = remove_partials(self._blobs)
            named = {row["digest"] for row in self._database.rows("select distinct digest from versions")}
            for path in self._blobs.glob(f"*{SUFFIX}"):
                if path.stem not in named:
                    path.unlink()
                    removed += 1
        return removed

    def _remove_files(self, digests: set[str]) -> None:
        for digest in digests:
            if self._database.row("select 1 from versions where digest = ? limit 1", (digest,)) is None:
                block_path(self._blobs, digest).unlink(missing_ok=True)
        sync_directory(self._blobs)

    def _one(self, where: str, args: tuple[object, ...]) -> Version | None:
        found = self._all(where, args)
        return found[0] if found else None

    def _all(self, where: str, args: tuple[object, ...]) -> list[Version]:
        rows = self._database.rows(f"{_SELECT} where {where} order by a.owner, a.name, v.number desc", args)
        return [Version.of(row) for row in rows]
