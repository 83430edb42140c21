"""`/v1/files`: uploads, and the files that jobs result in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from adapterhub.api.auth import Caller, Training
from adapterhub.api.hub import TheHub
from adapterhub.api.pages import After, listed
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import BadRequest, TooLarge
from adapterhub.train.files import StoredFile

router = APIRouter(prefix="/v1/files", tags=["files"])
NO_EXPIRY = "expires_after is not supported: files stay until they are deleted."


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
        "expires_at": None,
    }


async def refuse_expiry(request: Request) -> None:
    if any(name.startswith("expires_after") for name in await request.form()):
        raise BadRequest(NO_EXPIRY, param="expires_after")


@router.post("", dependencies=[Depends(refuse_expiry)])
def create(hub: TheHub, caller: Training, file: UploadFile, purpose: Annotated[str, Form()]) -> dict[str, Any]:
    chunks = _chunks(file.file, hub.config.max_file_bytes)
    with hub.room.taken(caller.owner, file.size or 0):
        return file_object(hub.files.upload(caller.owner, file.filename or "file", purpose, chunks))


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
def content(hub: TheHub, caller: Caller, file_id: str) -> FileResponse:
    file = hub.files.get(caller.owner, file_id)
    return FileResponse(hub.files.path(file.id), media_type="application/octet-stream", filename=file.filename)


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
