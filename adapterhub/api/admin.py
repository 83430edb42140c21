"""`/admin`: what an operator sees and steers. Needs an admin key."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from adapterhub.api.adapters import zip_of_current
from adapterhub.api.auth import Admin
from adapterhub.api.hub import TheHub
from adapterhub.api.listing import TheListing, adapter_objects, list_adapters

router = APIRouter(prefix="/admin", tags=["admin"])


@router.get("/tiers")
def tiers(hub: TheHub, caller: Admin) -> dict[str, Any]:
    """Budgets and use of each tier, and the engine's load."""
    stats = hub.engine.stats().result()
    stats["tiers"]["disk"] |= {"budget_bytes": hub.config.disk_bytes, "used_bytes": hub.registry.disk_used()}
    base = {"name": hub.base.name, "fingerprint": hub.base.fingerprint, "bytes": hub.base.nbytes}
    return {"base": {**base, "device": str(hub.base.device)}, **stats, "trace": hub.trace.stats()}


@router.get("/adapters")
def adapters(
    hub: TheHub,
    caller: Admin,
    asked: TheListing,
    owner: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Every owner's adapters, or one owner's."""
    return list_adapters(hub, owner, asked, limit)


@router.get("/adapters/{adapter_id}")
def retrieve(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    [shown] = adapter_objects(hub, [hub.registry.adapter(None, adapter_id)])
    return shown


@router.get("/adapters/{adapter_id}/download")
def download(hub: TheHub, caller: Admin, adapter_id: str) -> Response:
    return zip_of_current(hub, hub.registry.adapter(None, adapter_id))


@router.delete("/adapters/{adapter_id}")
def delete(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    hub.forget(hub.registry.delete_adapter(None, adapter_id))
    return {"id": adapter_id, "object": "adapter", "deleted": True}


@router.post("/adapters/{adapter_id}/evict")
def evict(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    """Takes all versions of an adapter off the device and out of RAM. Those in use follow when their requests end."""
    versions = hub.registry.adapter(None, adapter_id)
    gone = [hub.engine.evict(v.digest).result() for v in versions]
    return {"id": adapter_id, "object": "adapter", "evicted": all(gone), "in_use": gone.count(False)}
