"""Whether every version's block is whole, and making whole what can be made so: for `adapterhub doctor`.

`inspect` changes nothing and may run beside a server. `repair` may not. It sets damaged files aside, fetches them again
where there is a store, puts back what turns out to be good, uploads what only the disk has, and removes from both what
no row names. A version whose block is nowhere keeps its row, so that its owner hears what happened; the others are left
as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from adapterhub.errors import BlockDamaged
from adapterhub.swap.block import block_path, damaged, verify_block
from adapterhub.swap.database import Database, Row
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.files import sync_directory
from adapterhub.swap.mirror import Mirror
from adapterhub.swap.objects import server_id
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.registry import Registry
from adapterhub.swap.store import Store


class Fault(NamedTuple):
    version: str  # as its owner would call it
    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.version}, in {self.path}: {self.reason}"


@dataclass
class Report:
    """What was found, or what is left after a repair."""

    versions: int = 0
    in_store: int = 0  # of them, those that only the store has, as it should be
    faults: list[Fault] = field(default_factory=list)
    unnamed: int = 0  # objects in the store that no row names
    unseen: dict[str, int] = field(default_factory=dict)  # stores that were not looked at, and how much only they have
    mended: list[str] = field(default_factory=list)
    removed: int = 0


def inspect(database: Database, blobs: Path, store_url: str | None, outside: Path) -> Report:
    """Reads every block file, and lists the store if one is given. Changes nothing."""
    report = Report()
    tables = {row["name"] for row in database.rows("select name from sqlite_master where type = 'table'")}
    if "versions" not in tables:
        return report
    known = {}
    if "objects" in tables:
        rows = database.rows("select digest, store from objects where state = 'stored'")
        known = {row["digest"]: row["store"] for row in rows}
    there: set[str] = set()
    if store_url is not None and "server" in tables:
        [row] = database.rows("select id from server")
        there = {found.digest for found in Store.open(store_url, row["id"], outside).list()}
    digests = set()
    for row in _versions(database):
        report.versions += 1
        digest = row["digest"]
        digests.add(digest)
        path = block_path(blobs, digest)
        try:
            _verify(path)
        except FileNotFoundError as error:
            if digest in there:
                report.in_store += 1
            elif store_url is None and digest in known:
                report.unseen[known[digest]] = report.unseen.get(known[digest], 0) + 1
            elif _still_named(database, digest):
                report.faults.append(Fault(_name(row), path, damaged(path, str(error.strerror)).message))
        except BlockDamaged as error:
            report.faults.append(Fault(_name(row), path, error.message))
    report.unnamed = len(there - digests)
    return report


def repair(database: Database, blobs: Path, store_url: str | None, outside: Path) -> Report:
    """The data directory's lock must be held. Raises Unavailable when the store does not answer."""
    report = Report()
    store = Store.open(store_url, server_id(database), outside) if store_url is not None else None
    disk = DiskTier(blobs, None, store)
    registry = Registry(database, disk)
    if store is not None and not registry.objects.any():
        store.create()
    report.removed = registry.clean_up()
    known = registry.objects.elsewhere()
    rows = list(_versions(database))
    for row in rows:
        _mend(disk, row, report)
    there: set[str] = set()
    if store is not None:
        Mirror(database, registry.objects, disk, store).settle()
        there = {found.digest for found in store.list()}
        for digest in there - {row["digest"] for row in rows}:
            store.delete(digest)
            report.removed += 1
    for row in rows:
        report.versions += 1
        digest = row["digest"]
        path = disk.files.path(digest)
        if path.exists():
            continue
        if digest in there:
            report.in_store += 1
        elif store is None and digest in known:
            report.unseen[known[digest]] = report.unseen.get(known[digest], 0) + 1
        else:
            report.faults.append(Fault(_name(row), path, "its block is lost. Import or train it again, or delete it."))
    return report


def _mend(disk: DiskTier, row: Row, report: Report) -> None:
    digest = row["digest"]
    path, aside = disk.files.path(digest), disk.files.set_aside_path(digest)
    was_good = _good(path)
    if not was_good and _good(aside):  # set aside for another reason than its bytes: a file system's error
        aside.replace(path)
        sync_directory(path.parent)
    try:
        if path.exists():
            disk.verify(AdapterRef(row["id"], digest, row["nbytes"], row["owner"]))
    except BlockDamaged:
        return  # set aside now: what is left of it is reported in the end
    if not was_good and path.exists():
        report.mended.append(_name(row))


def _good(path: Path) -> bool:
    try:
        _verify(path)
    except (BlockDamaged, OSError):
        return False
    return True


def _verify(path: Path) -> None:
    """Raises BlockDamaged, or FileNotFoundError."""
    try:
        with path.open("rb", buffering=0) as file:
            verify_block(file, path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damaged(path, str(error.strerror)) from error


def _versions(database: Database) -> Iterator[Row]:
    yield from database.rows(
        "select v.id, v.number, v.digest, v.nbytes, a.owner, a.name "
        "from versions v join adapters a on a.id = v.adapter order by a.owner, a.name, v.number"
    )


def _still_named(database: Database, digest: str) -> bool:
    """A server may have deleted it while we looked."""
    return database.row("select 1 from versions where digest = ? limit 1", (digest,)) is not None


def _name(row: Row) -> str:
    which = f"checkpoint {row['id']}" if row["number"] is None else f"version {row['number']}"
    return f"{row['owner']}/{row['name']}, {which}"
