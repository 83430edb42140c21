"""Uploads in parts: parts come in any order, and become one file when their owner says in which.

A part's bytes lie under `parts/` by its id, and are there before its row is. Completing writes the file beside the
parts; one transaction then adds the file's row and takes the parts' away, so that a kill leaves an upload that can be
completed again, or a file. What no row names is removed at the next start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from adapterhub.config import MIB, format_bytes
from adapterhub.errors import BadRequest, NotFound, QuotaExceeded, TooLarge
from adapterhub.swap.database import Database, Row, new_id, now
from adapterhub.swap.files import remove_unnamed, stream_durably, sync_directory
from adapterhub.train.files import FileStore, StoredFile, check_purpose, plain_name

MAX_PART = 64 * MIB  # the size that SDKs make them
MAX_PARTS = 1000
MAX_PENDING = 32  # of one owner
_SECONDS = 3600  # until an upload expires
_KEPT_SECONDS = 86400  # for so long it is told after that what became of it
_READ = MIB
_STATUS = "invalid_status"
_OF_ID = "select * from uploads where id = ?"


class Status(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Upload:
    """`bytes`: how many its file will have; `file`: its id, once the upload is completed; `file_seconds`: for how long
    that is kept, None: until it is deleted."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    status: Status
    file: str | None
    created_at: int
    expires_at: int
    file_seconds: int | None = None

    @classmethod
    def of(cls, row: Row) -> Upload:
        over = row["status"] == Status.PENDING and row["expires_at"] <= now()
        return cls(**{**row, "status": Status.EXPIRED if over else Status(row["status"])})


class Part(NamedTuple):
    id: str
    upload: str
    bytes: int
    created_at: int


class UploadStore:
    """Safe to use from any thread. The tables are the file store's."""

    def __init__(self, database: Database, files: FileStore, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database = database
        self._files = files
        self._directory = directory

    def create(self, owner: str, filename: str, purpose: str, nbytes: int, file_seconds: int | None = None) -> Upload:
        """Raises BadRequest, and QuotaExceeded when too many are pending."""
        check_purpose(purpose)
        made = now()
        upload = Upload(
            new_id("upload"),
            owner,
            plain_name(filename),
            purpose,
            nbytes,
            Status.PENDING,
            file=None,
            created_at=made,
            expires_at=made + _SECONDS,
            file_seconds=file_seconds,
        )
        with self._database.transaction() as db:
            [row] = self._database.rows(
                "select count(*) as n from uploads where owner = ? and status = ? and expires_at > ?",
                (owner, Status.PENDING, made),
            )
            if row["n"] >= MAX_PENDING:
                raise QuotaExceeded(
                    f"You have {row['n']} uploads pending, of at most {MAX_PENDING}. Complete or cancel one; what is "
                    "left alone expires after an hour."
                )
            db.table("uploads").insert(vars(upload))
        return upload

    def get(self, owner: str, identity: str) -> Upload:
        """Raises NotFound, also for another owner's."""
        row = self._database.row("select * from uploads where id = ? and owner = ?", (identity, owner))
        if row is None:
            raise NotFound(f"You have no upload {identity[:80]!r}. `POST /v1/uploads` begins one.", param="upload_id")
        return Upload.of(row)

    def add_part(self, owner: str, identity: str, chunks: Iterable[bytes]) -> Part:
        """Stores a part; when it returns, the part survives a crash. Raises NotFound, BadRequest, TooLarge, StorageFull
        and QuotaExceeded."""
        _check_pending(self.get(owner, identity))
        part = new_id("part")
        try:
            size = stream_durably(self._path(part), _bounded(chunks))
            if size == 0:
                raise BadRequest("The part is empty.", param="data", code="empty_file")
            with self._database.transaction() as db:
                upload = self.get(owner, identity)  # as it is now
                _check_pending(upload)
                self._check_room(upload, size)
                stored = Part(part, identity, size, now())
                db.table("parts").insert(stored._asdict())
        except BaseException:
            self._remove([part])
            raise
        return stored

    def complete(self, owner: str, identity: str, parts: Sequence[str], md5: str | None) -> Upload:
        """Makes a file of the parts, in that order; whatever is not among them is dropped. Completing what is completed
        already changes nothing.

        Raises NotFound; BadRequest when parts are unknown or named twice, or the bytes are not as many as was said, or
        do not have that MD5 sum; StorageFull. The upload stays as it was then.
        """
        upload = self.get(owner, identity)
        if upload.status is Status.COMPLETED:
            return upload
        _check_pending(upload)
        self._check_parts(upload, parts)
        digest = hashlib.md5(usedforsecurity=False)
        joined = self._joined(upload, parts, digest.update)
        file = self._files.write(owner, upload.filename, upload.purpose, joined, upload.file_seconds)
        try:
            if md5 is not None and digest.hexdigest() != md5.lower():
                raise BadRequest(
                    f"The MD5 sum of the parts is {digest.hexdigest()}, not {md5[:80]!r}. Upload the parts again, or "
                    "name them in another order.",
                    param="md5",
                    code="md5_mismatch",
                )
            with self._database.transaction():
                upload = self.get(owner, identity)
                if upload.status is not Status.COMPLETED:
                    _check_pending(upload)
                    self._files.add(file)
                    gone = self._end(upload, Status.COMPLETED, file=file.id)
                    upload = self.get(owner, identity)
        except BaseException:
            self._files.discard(file)
            raise
        if upload.file != file.id:  # another request was faster
            self._files.discard(file)
        else:
            self._remove(gone)
        return upload

    def cancel(self, owner: str, identity: str) -> Upload:
        """Raises NotFound, and BadRequest when it is completed or has expired."""
        gone: list[str] = []
        with self._database.freeing():
            upload = self.get(owner, identity)
            if upload.status is not Status.CANCELLED:
                _check_pending(upload)
                gone = self._end(upload, Status.CANCELLED)
                upload = self.get(owner, identity)
        self._remove(gone)
        return upload

    def file(self, upload: Upload) -> StoredFile | None:
        """What came of it, if it is still there."""
        try:
            return self._files.get(upload.owner, upload.file) if upload.file else None
        except NotFound:
            return None

    def pending(self, owner: str) -> list[tuple[Upload, dict[str, Path]]]:
        """The uploads of an owner that have not ended, and their parts' files, by the parts' ids."""
        rows = self._database.rows("select * from uploads where owner = ? and status = ?", (owner, Status.PENDING))
        return [(Upload.of(row), {part: self._path(part) for part in self._parts(row["id"])}) for row in rows]

    def expire(self) -> None:
        """Removes what has expired."""
        rows = self._database.rows(
            "select * from uploads where expires_at <= ? and (status = ? or expires_at <= ?)",
            (now(), Status.PENDING, now() - _KEPT_SECONDS),
        )
        for row in rows:
            gone: list[str] = []
            with self._database.freeing() as db:
                if row["status"] == Status.PENDING and (found := self._database.row(_OF_ID, (row["id"],))):
                    if (upload := Upload.of(found)).status is Status.EXPIRED:  # it was not completed just now
                        gone = self._end(upload, Status.EXPIRED)
                else:
                    db.table("uploads").delete(row["id"])
            self._remove(gone)

    def erase(self, owner: str) -> int:
        """Removes all uploads of an owner, the bytes first; returns how many that were."""
        rows = self._database.rows(
            "select p.id from parts p join uploads u on u.id = p.upload where u.owner = ?", (owner,)
        )
        self._remove(row["id"] for row in rows)
        with self._database.freeing() as db:
            count = db.table("uploads").count_where("owner = ?", [owner])
            db.execute("delete from uploads where owner = ?", [owner])
        return count

    def clean_up(self) -> int:
        """At a start: removes parts that no row names, and what has expired; returns how many files the former were."""
        self.expire()
        named = {row["id"] for row in self._database.rows("select id from parts")}
        return remove_unnamed(self._directory, named)

    def _check_room(self, upload: Upload, nbytes: int) -> None:
        """A part may come twice, when an SDK tries again, but not without end."""
        [row] = self._database.rows(
            "select count(*) as n, coalesce(sum(bytes), 0) as bytes from parts where upload = ?", (upload.id,)
        )
        if row["n"] >= MAX_PARTS:
            raise BadRequest(f"The upload has {row['n']} parts, which is the limit. Make them larger.", param="data")
        if row["bytes"] + nbytes > 2 * upload.bytes:
            raise BadRequest(
                f"The upload is for {upload.bytes} bytes; its parts would have {row['bytes'] + nbytes}. Begin another "
                "one for what is larger.",
                param="data",
            )

    def _check_parts(self, upload: Upload, parts: Sequence[str]) -> None:
        rows = self._database.rows("select id, bytes from parts where upload = ?", (upload.id,))
        sizes = {row["id"]: row["bytes"] for row in rows}
        if unknown := [part for part in parts if part not in sizes]:
            raise BadRequest(f"The upload has no part {unknown[0][:80]!r}.", param="part_ids")
        if len(set(parts)) < len(parts):
            raise BadRequest("A part is named twice.", param="part_ids")
        if (total := sum(sizes[part] for part in parts)) != upload.bytes:
            raise BadRequest(
                f"The parts have {total} bytes; the upload was begun for {upload.bytes}. Name all parts, or upload "
                "those that are missing.",
                param="part_ids",
            )

    def _joined(self, upload: Upload, parts: Sequence[str], see: Callable[[bytes], None]) -> Iterator[bytes]:
        try:
            for part in parts:
                with self._path(part).open("rb") as file:
                    while chunk := file.read(_READ):
                        see(chunk)
                        yield chunk
        except FileNotFoundError:  # it was completed, cancelled or erased just now
            _check_pending(self.get(upload.owner, upload.id))
            raise

    def _end(self, upload: Upload, status: Status, *, file: str | None = None) -> list[str]:
        """Within a transaction; returns the parts whose bytes are to be removed after it."""
        with self._database.transaction() as db:
            gone = self._parts(upload.id)
            db.execute("delete from parts where upload = ?", [upload.id])
            db.table("uploads").update(upload.id, {"status": status, "file": file})
        return gone

    def _parts(self, upload: str) -> list[str]:
        return [row["id"] for row in self._database.rows("select id from parts where upload = ?", (upload,))]

    def _path(self, part: str) -> Path:
        return self._directory / part

    def _remove(self, parts: Iterable[str]) -> None:
        for part in parts:
            self._path(part).unlink(missing_ok=True)
        sync_directory(self._directory)


def _check_pending(upload: Upload) -> None:
    """Raises BadRequest."""
    if upload.status is Status.EXPIRED:
        raise BadRequest(
            f"Upload {upload.id} expired an hour after it was begun. Begin another.", code="invalid_status"
        )
    if upload.status is not Status.PENDING:
        raise BadRequest(f"Upload {upload.id} is already {upload.status}. Begin another.", code="invalid_status")


def _bounded(chunks: Iterable[bytes]) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > MAX_PART:
            raise TooLarge(
                f"The part is larger than {format_bytes(MAX_PART)}. Make more and smaller ones.", param="data"
            )
        yield chunk
