"""`/admin`: what an operator sees and steers. Needs an admin key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response
from pydantic import Field

from adapterhub.api.adapters import zip_of_current
from adapterhub.api.auth import Admin
from adapterhub.api.body import Strict
from adapterhub.api.downloads import Download
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.listing import TheListing, adapter_objects, list_adapters
from adapterhub.config import MIB
from adapterhub.errors import BadRequest
from adapterhub.swap.pins import PinnedBy
from adapterhub.swap.policies import Rules
from adapterhub.swap.ref import Tier
from adapterhub.swap.versions import current_of

router = APIRouter(prefix="/admin", tags=["admin"])
_MOST_BYTES = 2**30 * MIB
Budget = Annotated[int | None, Field(ge=0, le=_MOST_BYTES, strict=True)]


class BudgetsBody(Strict):
    device_bytes: Budget = None
    ram_bytes: Budget = None
    disk_bytes: Budget = None


class EvictBody(Strict):
    tier: Literal["device", "ram", "disk"] | None = None


# -- tiers and rules


@router.get("/tiers")
def tiers(hub: TheHub, caller: Admin) -> dict[str, Any]:
    """Budgets and use of each tier, and the load: of all devices together, and of each."""
    base = {"name": hub.base.name, "fingerprint": hub.base.fingerprint, "bytes": hub.base.nbytes}
    stats = hub.engine.stats().result()
    hardware = hub.devices.look()
    devices = [{**device, "hardware": hardware[device["device"]].json} for device in stats["devices"]]
    return {"base": {**base, "device": str(hub.base.device)}, **stats, "devices": devices, "trace": hub.trace.stats()}


@router.patch("/tiers")
def set_budgets(hub: TheHub, caller: Admin, body: BudgetsBody) -> dict[str, Any]:
    """Changes budgets while requests run, and for the next start. What no longer fits is evicted. Those of device and
    RAM are each device's."""
    if body == BudgetsBody():
        raise BadRequest(f"Give at least one of {', '.join(BudgetsBody.model_fields)}.")
    hub.steering.set_budgets(body.device_bytes, body.ram_bytes, body.disk_bytes)
    return tiers(hub, caller)


@router.get("/policy")
def policy(hub: TheHub, caller: Admin) -> dict[str, Any]:
    """The rules of each tier that are in force."""
    return hub.steering.rules.json


@router.put("/policy")
def set_policy(hub: TheHub, caller: Admin, body: Annotated[Any, Body()], dry_run: bool = False) -> dict[str, Any]:
    """Puts the fields that are given into force, at once and for the next start; a tier's `owners` as a whole.

    A dry run only says what would leave each tier for them now.
    """
    return _change_rules(hub, lambda rules: rules.merged(body), dry_run)


@router.patch("/policy")
def change_policy(hub: TheHub, caller: Admin, body: Annotated[Any, Body()], dry_run: bool = False) -> dict[str, Any]:
    """As PUT, but of `owners` only the rules and fields that are given change; null forgets an owner's rule."""
    return _change_rules(hub, lambda rules: rules.patched(body), dry_run)


def _change_rules(hub: Hub, change: Callable[[Rules], Rules], dry_run: bool) -> dict[str, Any]:
    if not dry_run:
        return hub.steering.set_rules(change).json
    rules, *tiers = hub.steering.try_rules(change)
    leaving = (_leaving(hub, blocks) for blocks in tiers)
    return {"rules": rules.json, **dict(zip(("device", "ram", "disk"), leaving, strict=True))}


def _leaving(hub: Hub, blocks: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """With the names of the adapters that have the block; versions that were deleted while they ran have none."""
    models = hub.catalog.models_of([digest for digest, _ in blocks])
    return [{"digest": digest, "bytes": size, "models": models.get(digest, [])} for digest, size in blocks]


# -- everybody's adapters


@router.get("/adapters")
def adapters(
    hub: TheHub,
    caller: Admin,
    asked: TheListing,
    owner: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Every owner's adapters, or one owner's."""
    return list_adapters(hub, owner, asked, limit)


@router.get("/adapters/{adapter_id}")
def retrieve(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    [shown] = adapter_objects(hub, [hub.registry.adapter(None, adapter_id)])
    return shown


@router.get("/adapters/{adapter_id}/download")
async def download(hub: TheHub, caller: Admin, adapter_id: str) -> Response:
    zipped = await hub.in_store(lambda: zip_of_current(hub, hub.registry.adapter(None, adapter_id)))
    return Download(hub, caller, zipped)


@router.delete("/adapters/{adapter_id}")
def delete(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    hub.forget(hub.registry.delete_adapter(None, adapter_id))
    return {"id": adapter_id, "object": "adapter", "deleted": True}


@router.post("/adapters/{adapter_id}/pin")
def pin(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    """Keeps the current version in memory, once it is there. The owner cannot undo it."""
    current_of(hub.registry.adapter(None, adapter_id))
    hub.pin(adapter_id, PinnedBy.ADMIN)
    return retrieve(hub, caller, adapter_id)


@router.post("/adapters/{adapter_id}/unpin")
def unpin(hub: TheHub, caller: Admin, adapter_id: str) -> dict[str, Any]:
    hub.registry.adapter(None, adapter_id)
    hub.registry.pins.unpin(adapter_id, PinnedBy.ADMIN)
    return retrieve(hub, caller, adapter_id)


@router.post("/adapters/{adapter_id}/evict")
def evict(hub: TheHub, caller: Admin, adapter_id: str, body: EvictBody | None = None) -> dict[str, Any]:
    """Takes all versions of an adapter off the device, out of RAM, or both, or off a disk that is a cache of a store.
    Those in use follow when their requests end; of the disk, they stay."""
    tier = Tier(body.tier) if body and body.tier else None
    digests = {version.digest for version in hub.registry.adapter(None, adapter_id)}
    if tier is Tier.DISK:
        if hub.disk.store is None:
            raise BadRequest("There is no object store: what leaves the disk would be lost.", param="tier")
        gone = [hub.disk.files.evict_file(digest) for digest in digests]
    else:
        gone = [asked.result() for asked in [hub.engine.evict(digest, tier) for digest in digests]]
    return {"id": adapter_id, "object": "adapter", "evicted": all(gone), "in_use": gone.count(False)}
