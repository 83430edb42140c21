"""`/v1/uploads`: a file in parts, as OpenAI's SDKs send large ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, UploadFile
from pydantic import Field

from adapterhub.api.auth import Training
from adapterhub.api.body import AtMost, Body, IdempotencyKey
from adapterhub.api.files import Expiry, file_object
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.tenancy.once import Asked, digest_of
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import TooLarge
from adapterhub.train.uploads import MAX_PARTS, Part, Upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


class UploadBody(Body):
    """`mime_type` is taken and not looked at."""

    bytes: Annotated[int, Field(ge=1, strict=True)]
    filename: str
    mime_type: str
    purpose: str
    expires_after: Expiry | None = None


class CompleteBody(Body):
    part_ids: Annotated[list[str], Field(min_length=1), AtMost(MAX_PARTS)]
    md5: str | None = None


def upload_object(hub: Hub, upload: Upload) -> dict[str, Any]:
    file = hub.uploads.file(upload)
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file_object(file) if file else None,
    }


def part_object(part: Part) -> dict[str, Any]:
    return {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.upload}


@router.post("")
def create(hub: TheHub, caller: Training, body: UploadBody, idempotency_key: IdempotencyKey = None) -> dict[str, Any]:
    """Begins an upload of so many bytes; it expires in an hour, and `expires_after` is about the file that comes of
    it."""
    if body.bytes > hub.config.max_file_bytes:
        limit = format_bytes(hub.config.max_file_bytes)
        raise TooLarge(f"A file may have {limit}; this one has {body.bytes} bytes. Split it.", param="bytes")
    seconds = None if body.expires_after is None else body.expires_after.seconds

    def make() -> Upload:
        with hub.room.taken(caller.owner, body.bytes):
            return hub.uploads.create(caller.owner, body.filename, body.purpose, body.bytes, seconds)

    asked = Asked(caller.owner, "upload", idempotency_key)
    digest = partial(digest_of, body.model_dump())
    return upload_object(hub, hub.once.made(asked, digest, partial(hub.uploads.get, caller.owner), make))


@router.post("/{upload_id}/parts")
def add_part(hub: TheHub, caller: Training, upload_id: str, data: UploadFile) -> dict[str, Any]:
    """Adds a part of at most 64 MiB. Parts may come in any order, and at once."""
    return part_object(hub.uploads.add_part(caller.owner, upload_id, _chunks(data.file)))


@router.post("/{upload_id}/complete")
def complete(hub: TheHub, caller: Training, upload_id: str, body: CompleteBody) -> dict[str, Any]:
    """Makes a file of the parts in the order in which they are named."""
    return upload_object(hub, hub.uploads.complete(caller.owner, upload_id, body.part_ids, body.md5))


@router.post("/{upload_id}/cancel")
def cancel(hub: TheHub, caller: Training, upload_id: str) -> dict[str, Any]:
    return upload_object(hub, hub.uploads.cancel(caller.owner, upload_id))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(MIB):
        yield chunk
