"""`/admin`: what an operator sees and steers. Needs an admin key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.api.adapters import zip_of_current
from adapterhub.api.auth import Admin
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


class Strict(BaseModel):
    """A body in which a field that nobody knows is an error: it would not do what its author meant."""

    model_config = ConfigDict(extra="forbid")


class BudgetsBody(Strict):
    device_bytes: Budget = None
    ram_bytes: Budget = None
    disk_bytes: Budget = None


class EvictBody(Strict):
    tier: Literal["device", "ram"] | None = None


# -- tiers and rules


@router.get("/tiers")
def tiers(hub: TheHub, caller: Admin) -> dict[str, Any]:
    """Budgets and use of each tier, and the engine's load."""
    base = {"name": hub.base.name, "fingerprint": hub.base.fingerprint, "bytes": hub.base.nbytes}
    stats = hub.engine.stats().result()
    return {"base": {**base, "device": str(hub.base.device)}, **stats, "trace": hub.trace.stats()}


@router.patch("/tiers")
def set_budgets(hub: TheHub, caller: Admin, body: BudgetsBody) -> dict[str, Any]:
    """Changes budgets while requests run, and for the next start. What no longer fits is evicted."""
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
    """Takes all versions of an adapter off the device, out of RAM, or both. Those in use follow when their requests
    end."""
    tier = Tier(body.tier) if body and body.tier else None
    gone = [hub.engine.evict(v.digest, tier).result() for v in hub.registry.adapter(None, adapter_id)]
    return {"id": adapter_id, "object": "adapter", "evicted": all(gone), "in_use": gone.count(False)}
