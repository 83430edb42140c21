"""`/v1/adapters`: a caller's adapters; PEFT in and out."""

from __future__ import annotations

import io
import zipfile
from typing import Annotated, Any

from fastapi import APIRouter, Form, Response, UploadFile

from adapterhub.api.auth import Caller
from adapterhub.api.hub import Hub, TheHub
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import TooLarge
from adapterhub.swap import peft
from adapterhub.swap.names import check_name
from adapterhub.swap.ref import Tier
from adapterhub.swap.registry import Version

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


def adapter_objects(hub: Hub, versions: list[Version]) -> list[dict[str, Any]]:
    """One object for each adapter, from all of its versions, which come the newest first."""
    tiers = hub.engine.tiers_of([v.digest for v in versions]).result()
    grouped: dict[str, list[tuple[Version, Tier]]] = {}
    for version, tier in zip(versions, tiers, strict=True):
        grouped.setdefault(version.adapter, []).append((version, tier))
    return [_adapter_object(pairs) for pairs in grouped.values()]


def _adapter_object(pairs: list[tuple[Version, Tier]]) -> dict[str, Any]:
    current, tier = next((pair for pair in pairs if pair[0].current), pairs[0])
    return {
        "id": current.adapter,
        "object": "adapter",
        "name": current.name,
        "owner": current.owner,
        "model": current.alias,
        "base": current.base,
        "current": current.id,
        "bytes": current.nbytes,
        "rank": current.rank,
        "tier": tier,
        "created_at": min(v.created_at for v, _ in pairs),
        "versions": [_version_object(v, t) for v, t in pairs],
    }


def _version_object(version: Version, tier: Tier) -> dict[str, Any]:
    return {
        "id": version.id,
        "number": version.number,
        "model": version.model,
        "origin": version.origin,
        "bytes": version.nbytes,
        "rank": version.rank,
        "base": version.base,
        "digest": version.digest,
        "tier": tier,
        "created_at": version.created_at,
    }


@router.post("")
def import_adapter(
    hub: TheHub, caller: Caller, name: Annotated[str, Form()], config: UploadFile, weights: UploadFile
) -> dict[str, Any]:
    """Imports a PEFT adapter as the next version of `name`. `warnings` says what is odd about it."""
    check_name(name, "name")
    parsed = peft.read_config(_read(config, MIB))
    raw = _read(weights, hub.config.max_file_bytes)
    block = peft.encode(parsed, raw, hub.base.layout, hub.base.fingerprint, hub.base.dtype)
    version = hub.registry.publish(caller.owner, name, block, hub.base.name, "import")
    [shown] = adapter_objects(hub, hub.registry.adapter(caller.owner, version.adapter))
    idle = list(peft.no_effect(block))
    whole = len(idle) == len(block.meta.layout.targets)
    warnings = [f"{'All' if whole else len(idle)} of its modules change nothing: A or B is zero"] if idle else []
    return {**shown, "warnings": warnings}


@router.get("")
def list_adapters(hub: TheHub, caller: Caller) -> dict[str, Any]:
    return {"object": "list", "data": adapter_objects(hub, hub.registry.versions(caller.owner)), "has_more": False}


@router.get("/{adapter_id}")
def retrieve(hub: TheHub, caller: Caller, adapter_id: str) -> dict[str, Any]:
    [shown] = adapter_objects(hub, hub.registry.adapter(caller.owner, adapter_id))
    return shown


@router.get("/{adapter_id}/download")
def download(hub: TheHub, caller: Caller, adapter_id: str) -> Response:
    """The current version as a zip of a PEFT directory."""
    version = next(v for v in hub.registry.adapter(caller.owner, adapter_id) if v.current)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for filename, content in peft.export_files(hub.registry.block(version)).items():
            archive.writestr(filename, content)
    disposition = f'attachment; filename="{version.name}-v{version.number}.zip"'
    return Response(buffer.getvalue(), media_type="application/zip", headers={"content-disposition": disposition})


@router.delete("/{adapter_id}")
def delete(hub: TheHub, caller: Caller, adapter_id: str) -> dict[str, Any]:
    hub.forget(hub.registry.delete_adapter(caller.owner, adapter_id))
    return {"id": adapter_id, "object": "adapter", "deleted": True}


def _read(upload: UploadFile, limit: int) -> bytes:
    raw = upload.file.read(limit + 1)
    if len(raw) > limit:
        raise TooLarge(f"{upload.filename} is larger than {format_bytes(limit)}.")
    return raw
