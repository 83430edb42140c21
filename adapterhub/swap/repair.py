"""Whether every version's block is whole, and making whole what can be made so: for `adapterhub doctor`.

`inspect` changes nothing and may run beside a server. `repair` may not. It sets damaged files aside, fetches them again
where there is a store, puts back what turns out to be good, uploads what the store has not or not whole, and removes
from both what no row names. A version whose block is nowhere keeps its row, so that its owner hears what happened; the
others are left as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from adapterhub.errors import BlockDamaged
from adapterhub.swap.block import PAGE, SUFFIX, block_path, damaged, verify_block
from adapterhub.swap.database import Database, Row
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.files import sync_directory
from adapterhub.swap.mirror import Mirror
from adapterhub.swap.objects import State, server_id
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.registry import Registry
from adapterhub.swap.store import Store, StoredObject

_LOST = "its block is lost. Import or train it again, or delete it."


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


class Unowned(NamedTuple):
    """Whole files and objects that no row names, and that a repair removes."""

    files: list[Path]
    objects: list[StoredObject]


def inspect(database: Database, blobs: Path, store_url: str | None, outside: Path) -> Report:
    """Reads every block file, and lists the store if one is given. Changes nothing."""
    report = Report()
    if not _has(database, "versions"):
        return report
    store = _opened(database, store_url, outside)
    known = _known(database, store)
    rows = list(_versions(database))
    there = _listed(store)  # after the rows: what was published meanwhile is not missed there
    for row in rows:
        report.versions += 1
        digest = row["digest"]
        path = block_path(blobs, digest)
        try:
            nbytes = _verify(path)
            reason = _differs(there.get(digest), nbytes) if store is not None and digest in known else None
        except FileNotFoundError as error:
            if store is None and digest in known:
                report.unseen[known[digest]] = report.unseen.get(known[digest], 0) + 1
                continue
            reason = _too_small(there[digest], row) if digest in there else damaged(path, str(error.strerror)).message
            report.in_store += reason is None
        except BlockDamaged as error:
            reason = error.message
        if reason is not None and _still_named(database, digest):
            report.faults.append(Fault(_name(row), path, reason))
    named = {row["digest"] for row in rows}
    report.unnamed = sum(not _still_named(database, digest) for digest in there.keys() - named)
    return report


def repair(
    database: Database, blobs: Path, store_url: str | None, outside: Path, agree: Callable[[Unowned], None]
) -> Report:
    """The data directory's lock must be held. `agree` is told what will be removed for good, before anything is
    changed, and raises if it shall not.

    Raises Unavailable when the store does not answer, and StorageFull when it has no room.
    """
    report = Report()
    store = Store.open(store_url, server_id(database), outside) if store_url is not None else None
    disk = DiskTier(blobs, None, store)
    registry = Registry(database, disk)
    if store is not None and not registry.objects.any():
        store.create()
    agree(_unowned(database, disk, store))
    report.removed = registry.clean_up()
    known = _known(database, store)
    rows = list(_versions(database))
    lost = {row["digest"] for row in rows if not _mend(disk, row, report)}
    there: dict[str, int] = {}
    if store is not None:
        there = _listed(store)
        for row in rows:
            digest, path = row["digest"], disk.files.path(row["digest"])
            if path.exists() and digest in known and _differs(there.get(digest), path.stat().st_size):
                registry.objects.set(digest, State.UPLOADING)
                report.mended.append(f"{_name(row)}, in the store")
        Mirror(database, registry.objects, disk, store).settle()
        there = _listed(store)
        for digest in there.keys() - {row["digest"] for row in rows}:
            store.delete(digest)
            report.removed += 1
    for row in rows:
        report.versions += 1
        digest = row["digest"]
        path = disk.files.path(digest)
        if path.exists():
            continue
        if store is None and digest in known:
            report.unseen[known[digest]] = report.unseen.get(known[digest], 0) + 1
        elif digest in lost or digest not in there or _too_small(there[digest], row):
            report.faults.append(Fault(_name(row), path, _LOST))
        else:
            report.in_store += 1
    return report


def _unowned(database: Database, disk: DiskTier, store: Store | None) -> Unowned:
    named = {row["digest"] for row in _versions(database)}
    there = _listed(store)
    places = (disk.files.directory, disk.files.quarantine)
    files = [path for place in places for path in sorted(place.glob(f"*{SUFFIX}")) if path.is_file()]
    return Unowned(
        [path for path in files if path.stem not in named],
        [StoredObject(digest, there[digest]) for digest in sorted(there.keys() - named)],
    )


def _mend(disk: DiskTier, row: Row, report: Report) -> bool:
    """False when its file was damaged, and is to be had from nowhere: it is set aside then."""
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
        return False
    if not was_good and path.exists():
        report.mended.append(_name(row))
    return True


def _differs(found: int | None, nbytes: int) -> str | None:
    """What is wrong with an object of `found` bytes (None: there is none), whose file is good and has `nbytes`."""
    if found == nbytes:
        return None
    has = "has lost it" if found is None else f"has {found} of its {nbytes} bytes"
    return f"the store {has}. --repair uploads it again."


def _too_small(found: int, row: Row) -> str | None:
    """What is wrong with an object of `found` bytes, whose file is not here to compare with."""
    if found >= row["nbytes"] + PAGE:  # its header has a page at the least
        return None
    return f"the store has only {found} bytes of it, and the disk none. Import or train it again, or delete it."


def _good(path: Path) -> bool:
    try:
        _verify(path)
    except (BlockDamaged, OSError):
        return False
    return True


def _verify(path: Path) -> int:
    """The bytes of a good file. Raises BlockDamaged, or FileNotFoundError."""
    try:
        with path.open("rb", buffering=0) as file:
            verify_block(file, path)
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damaged(path, str(error.strerror)) from error


def _has(database: Database, table: str) -> bool:
    return database.row("select 1 from sqlite_master where type = 'table' and name = ?", (table,)) is not None


def _opened(database: Database, url: str | None, outside: Path) -> Store | None:
    """None also when this server has never had a store."""
    if url is None or not _has(database, "server"):
        return None
    [server] = database.rows("select id from server")
    return Store.open(url, server["id"], outside)


def _known(database: Database, store: Store | None) -> dict[str, str]:
    """Digests of the blocks that the store, or without one any, is known to hold, and its URL."""
    if not _has(database, "objects"):
        return {}
    sql = "select digest, store from objects where state = 'stored' and store = coalesce(?, store)"
    return {row["digest"]: row["store"] for row in database.rows(sql, (store and store.url,))}


def _listed(store: Store | None) -> dict[str, int]:
    """Digest and bytes of each object."""
    return {} if store is None else {found.digest: found.nbytes for found in store.list()}


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
