"""`/admin/users`: erases an owner, and hands out all that is kept of one; `/v1/export`: of oneself."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from adapterhub.api.auth import Admin, Caller
from adapterhub.api.downloads import Download
from adapterhub.api.export import export
from adapterhub.api.hub import ADMIN_OWNER, Hub, TheHub
from adapterhub.api.pages import After, page
from adapterhub.api.tenancy.erasures import Erasure
from adapterhub.errors import BadRequest, NotFound

router = APIRouter(tags=["users"])


def erasure_object(erasure: Erasure) -> dict[str, Any]:
    """`left_in_stores`: what object stores are still to delete, which the server sees to."""
    return {
        "id": erasure.id,
        "object": "user.erasure",
        "status": "in_progress" if erasure.finished_at is None else "completed",
        "removed": erasure.removed,
        "left_in_stores": [{"store": store, "blocks": blocks} for store, blocks in erasure.left.items()],
        "begun_at": erasure.begun_at,
        "finished_at": erasure.finished_at,
    }


@router.delete("/admin/users/{owner}")
def erase(hub: TheHub, caller: Admin, owner: str) -> dict[str, Any]:
    """Removes all that is kept of an owner, while requests run: theirs end. Answers with how much that was."""
    if owner in (caller.owner, ADMIN_OWNER):
        raise BadRequest(f"{owner!r} is the operator, or you: neither can be erased so.", param="owner")
    return {**erasure_object(hub.eraser.erase(owner)), "owner": owner}


@router.get("/admin/erasures")
def erasures(
    hub: TheHub, caller: Admin, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, Any]:
    """The newest first. Whose data they removed is not kept."""
    return page([erasure_object(erasure) for erasure in hub.erasures.all()], after, limit)


@router.get("/admin/erasures/{erasure_id}")
def erasure(hub: TheHub, caller: Admin, erasure_id: str) -> dict[str, Any]:
    return erasure_object(hub.erasures.get(erasure_id))


@router.get("/admin/users/{owner}/export", response_class=StreamingResponse)
def export_of(hub: TheHub, caller: Admin, owner: str) -> Download:
    """A zip of all that is kept of an owner."""
    return Download(hub, caller, _zip(hub, owner))


@router.get("/v1/export", response_class=StreamingResponse)
def export_own(hub: TheHub, caller: Caller) -> Download:
    """A zip of all that is kept of the caller."""
    return Download(hub, caller, _zip(hub, caller.owner))


def _zip(hub: Hub, owner: str) -> StreamingResponse:
    if not hub.keys.list(owner) and not hub.registry.versions(owner):
        raise NotFound(f"There is no user {owner[:80]!r}.")
    headers = {"content-disposition": f'attachment; filename="{owner}.zip"'}
    pieces = export(hub, owner)
    zipped = pieces if hub.disk.store is None else hub.storing.iterate(pieces)
    return StreamingResponse(zipped, media_type="application/zip", headers=headers)
