"""`/v1/files`: uploads, and the files that jobs result in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, ValidationError

from adapterhub.api.auth import Caller, Training
from adapterhub.api.body import IdempotencyKey
from adapterhub.api.downloads import Download
from adapterhub.api.hub import TheHub
from adapterhub.api.pages import After, listed
from adapterhub.api.tenancy.once import Asked, digest_of
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import TooLarge
from adapterhub.train.files import StoredFile

router = APIRouter(prefix="/v1/files", tags=["files"])
_EXPIRY = "expires_after"


class Expiry(BaseModel):
    """When a file is removed: so many seconds after it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 86400)]


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": file.expires_at,
    }


async def _expiry(request: Request) -> Expiry | None:
    """From a form, in which an object is a field for each of its own: `expires_after[anchor]`."""
    given = {name: value for name, value in (await request.form()).items() if name.startswith(_EXPIRY)}
    if not given:
        return None
    try:
        fields = {name.removeprefix(f"{_EXPIRY}[").removesuffix("]"): value for name, value in given.items()}
        return Expiry.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(
            [{**each, "loc": ("body", _EXPIRY, *each["loc"])} for each in error.errors()]
        ) from error


@router.post("")
def create(
    hub: TheHub,
    caller: Training,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    expiry: Annotated[Expiry | None, Depends(_expiry)],
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    name, seconds = file.filename or "file", None if expiry is None else expiry.seconds

    def make() -> StoredFile:
        chunks = _chunks(file.file, hub.config.max_file_bytes)
        with hub.room.taken(caller.owner, file.size or 0):
            return hub.files.upload(caller.owner, name, purpose, chunks, seconds)

    asked = Asked(caller.owner, "file", idempotency_key)
    digest = partial(digest_of, [name, purpose, seconds], file.file)
    return file_object(hub.once.made(asked, digest, partial(hub.files.get, caller.owner), make))


@router.get("")
def list_files(
    hub: TheHub,
    caller: Caller,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    files, more = hub.files.page(caller.owner, after, limit, purpose=purpose, ascending=order == "asc")
    return listed([file_object(f) for f in files], more)


@router.get("/{file_id}")
def retrieve(hub: TheHub, caller: Caller, file_id: str) -> dict[str, Any]:
    return file_object(hub.files.get(caller.owner, file_id))


@router.get("/{file_id}/content")
def content(hub: TheHub, caller: Caller, file_id: str) -> Download:
    file = hub.files.get(caller.owner, file_id)
    path = hub.files.path(file.id)
    return Download(hub, caller, FileResponse(path, media_type="application/octet-stream", filename=file.filename))


@router.delete("/{file_id}")
def delete(hub: TheHub, caller: Training, file_id: str) -> dict[str, Any]:
    gone = hub.files.get(caller.owner, file_id)
    hub.files.delete(caller.owner, file_id)
    hub.meter.released(gone.owner, None, gone.bytes, gone.created_at)
    return {"id": file_id, "object": "file", "deleted": True}


def _chunks(file: BinaryIO, limit: int) -> Iterator[bytes]:
    total = 0
    while chunk := file.read(MIB):
        total += len(chunk)
        if total > limit:
            raise TooLarge(f"The file is larger than {format_bytes(limit)}. Split it.", param="file")
        yield chunk
