"""How much each owner may have and use: `/v1/quotas` for owners, `/admin/quotas` for the operator."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from adapterhub.api.auth import Admin, Caller
from adapterhub.api.body import Strict
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.tenancy.terms import EVERYBODY
from adapterhub.errors import BadRequest

router = APIRouter(tags=["quotas"])
_MOST = 2**53  # what every JSON reader takes
Amount = Annotated[int, Field(ge=0, le=_MOST, strict=True)] | None
PerMinute = Annotated[int, Field(ge=1, le=_MOST, strict=True)] | None


class QuotaBody(Strict):
    """What is given is set, null being no limit."""

    adapters: Amount = None
    bytes: Amount = None
    jobs: Amount = None
    requests_per_minute: PerMinute = None
    tokens_per_minute: PerMinute = None


def _quota(hub: Hub, owner: str) -> dict[str, Any]:
    used = {} if owner == EVERYBODY else {"used": hub.room.kept(owner)._asdict()}
    return {"object": "quota", "owner": owner, "limits": vars(hub.quotas.of(owner)), **used}


@router.get("/v1/quotas")
def own(hub: TheHub, caller: Caller) -> dict[str, Any]:
    """The caller's limits, null being none, and what they have of those that are not per minute."""
    return _quota(hub, caller.owner)


@router.get("/admin/quotas")
def index(hub: TheHub, caller: Admin) -> dict[str, Any]:
    """What counts for all owners (`limits`), and what has been set, by owner; for `*`, for all others."""
    return {**_quota(hub, EVERYBODY), "set": hub.quotas.given()}


@router.get("/admin/quotas/{owner}")
def retrieve(hub: TheHub, caller: Admin, owner: str) -> dict[str, Any]:
    return {**_quota(hub, owner), "set": hub.quotas.given().get(owner, {})}


@router.patch("/admin/quotas/{owner}")
def change(hub: TheHub, caller: Admin, owner: str, body: QuotaBody) -> dict[str, Any]:
    """Sets an owner's limits, at once; `*` for all that have none of their own. What is not given stays as it is."""
    given = body.model_dump(exclude_unset=True)
    if not given:
        raise BadRequest(f"Give at least one of {', '.join(QuotaBody.model_fields)}.")
    hub.quotas.change(owner, given)
    return retrieve(hub, caller, owner)


@router.delete("/admin/quotas/{owner}")
def forget(hub: TheHub, caller: Admin, owner: str) -> dict[str, Any]:
    """What was set counts no more; the defaults do."""
    hub.quotas.forget(owner)
    return retrieve(hub, caller, owner)
