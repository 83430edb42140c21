"""`/v1/adapters`: a caller's adapters; PEFT in and out."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Form, Query, Response, UploadFile

from adapterhub.api.auth import Caller, Inferring, Principal, Training
from adapterhub.api.body import IdempotencyKey
from adapterhub.api.downloads import Download
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.listing import TheListing, adapter_objects, list_adapters
from adapterhub.api.tenancy.once import Asked, digest_of
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import TooLarge
from adapterhub.swap import peft
from adapterhub.swap.block import Block
from adapterhub.swap.names import check_name
from adapterhub.swap.pins import PinnedBy
from adapterhub.swap.versions import Version, current_of

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


@router.post("")
async def import_adapter(
    hub: TheHub,
    caller: Training,
    name: Annotated[str, Form()],
    config: UploadFile,
    weights: UploadFile,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Imports a PEFT adapter as the next version of `name`. `warnings` says what is odd about it."""
    check_name(name, "name")

    def find(identity: str) -> Imported:
        version = hub.registry.version(caller.owner, identity)
        return Imported(version, hub.registry.block(version))

    def act() -> dict[str, Any]:
        asked = Asked(caller.owner, "adapter", idempotency_key)
        digest = partial(digest_of, [name], config.file, weights.file)
        imported = hub.once.made(asked, digest, find, lambda: _import(hub, caller, name, config, weights))
        return _imported_object(hub, imported)

    return await hub.in_store(act)


@router.get("")
def index(
    hub: TheHub, caller: Caller, asked: TheListing, limit: Annotated[int | None, Query(ge=1, le=10_000)] = None
) -> Response:
    """The caller's adapters; all of them unless there is a limit."""
    return list_adapters(hub, caller.owner, asked, limit)


@router.get("/{adapter_id}")
def retrieve(hub: TheHub, caller: Caller, adapter_id: str) -> dict[str, Any]:
    [shown] = adapter_objects(hub, [hub.registry.adapter(caller.owner, adapter_id)])
    return shown


@router.get("/{adapter_id}/download")
async def download(hub: TheHub, caller: Caller, adapter_id: str) -> Response:
    zipped = await hub.in_store(lambda: zip_of_current(hub, hub.registry.adapter(caller.owner, adapter_id)))
    return Download(hub, caller, zipped)


@router.delete("/{adapter_id}")
def delete(hub: TheHub, caller: Training, adapter_id: str) -> dict[str, Any]:
    hub.forget(hub.registry.delete_adapter(caller.owner, adapter_id))
    return {"id": adapter_id, "object": "adapter", "deleted": True}


@router.post("/{adapter_id}/pin")
def pin(hub: TheHub, caller: Training, adapter_id: str) -> dict[str, Any]:
    """Keeps the current version in memory, once it is there, within the owner's share of it."""
    current_of(hub.registry.adapter(caller.owner, adapter_id))
    hub.pin(adapter_id, PinnedBy.OWNER)
    return retrieve(hub, caller, adapter_id)


@router.post("/{adapter_id}/unpin")
def unpin(hub: TheHub, caller: Training, adapter_id: str) -> dict[str, Any]:
    hub.registry.adapter(caller.owner, adapter_id)
    hub.registry.pins.unpin(adapter_id, PinnedBy.OWNER)
    return retrieve(hub, caller, adapter_id)


@router.post("/{adapter_id}/prefetch", status_code=202)
def prefetch(hub: TheHub, caller: Inferring, adapter_id: str) -> dict[str, Any]:
    """A hint that the adapter will be asked for soon: its current version, or all that its name is split between.
    Answers at once, with where it is now."""
    versions = hub.registry.adapter(caller.owner, adapter_id)
    current_of(versions)
    for version in versions:
        if version.percent:
            hub.engine.prefetch(version.ref)
    [shown] = adapter_objects(hub, [versions])
    return shown


class Imported(NamedTuple):
    version: Version
    block: Block

    @property
    def id(self) -> str:
        return self.version.id


def _import(hub: Hub, caller: Principal, name: str, config: UploadFile, weights: UploadFile) -> Imported:
    parsed = peft.read_config(_read(config, MIB))
    raw = _read(weights, hub.config.max_file_bytes)
    block = peft.encode(parsed, raw, hub.base.layout, hub.base.fingerprint, hub.base.dtype)
    with hub.room.taken(caller.owner, block.meta.nbytes, adapter=name):
        return Imported(hub.registry.publish(caller.owner, name, block, hub.base.name, "import"), block)


def _imported_object(hub: Hub, imported: Imported) -> dict[str, Any]:
    version, block = imported
    [shown] = adapter_objects(hub, [hub.registry.adapter(version.owner, version.adapter)])
    idle = list(peft.no_effect(block))
    whole = len(idle) == len(block.meta.layout.targets)
    warnings = [f"{'All' if whole else len(idle)} of its modules change nothing: A or B is zero"] if idle else []
    return {**shown, "warnings": warnings}


def zip_of_current(hub: Hub, versions: list[Version]) -> Response:
    """An adapter's current version as a zip of a PEFT directory."""
    version = current_of(versions)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for filename, content in peft.export_files(hub.registry.block(version)).items():
            archive.writestr(filename, content)
    disposition = f'attachment; filename="{version.name}-v{version.number}.zip"'
    return Response(buffer.getvalue(), media_type="application/zip", headers={"content-disposition": disposition})


def _read(upload: UploadFile, limit: int) -> bytes:
    raw = upload.file.read(limit + 1)
    if len(raw) > limit:
        raise TooLarge(f"{upload.filename} is larger than {format_bytes(limit)}.")
    return raw
