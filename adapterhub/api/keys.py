"""`/admin/keys`: makes API keys, lists, rotates and revokes them. Needs an admin key."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from adapterhub.api.auth import Admin
from adapterhub.api.body import AtMost, Strict
from adapterhub.api.hub import TheHub
from adapterhub.api.pages import After, page
from adapterhub.api.tenancy.keys import ApiKey, NewKey
from adapterhub.api.tenancy.terms import EVERYDAY, PROJECT, Scope
from adapterhub.swap.database import now

router = APIRouter(prefix="/admin/keys", tags=["keys"])
DAY = 86400
Seconds = Annotated[int, Field(ge=0, le=3650 * DAY, strict=True)]


class KeyBody(Strict):
    """`expires_in`: seconds; None: the key is good until it is revoked."""

    owner: str
    project: str = PROJECT
    scopes: Annotated[frozenset[Scope], Field(min_length=1), AtMost(64)] = EVERYDAY
    expires_in: Annotated[Seconds, Field(ge=1)] | None = None


class RotateBody(Strict):
    """`grace_seconds`: for so long the old key is good, too."""

    grace_seconds: Seconds = DAY


def key_object(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "owner": key.owner,
        "project": key.project,
        "scopes": sorted(key.scopes),
        "hint": key.hint,
        "state": key.state,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }


def _new(made: NewKey) -> dict[str, Any]:
    """With the secret, which is shown this once."""
    return {**key_object(made.key), "key": made.secret}


@router.post("")
def create(hub: TheHub, caller: Admin, body: KeyBody) -> dict[str, Any]:
    """A new key; its owner is made if need be. `key` is the secret, and is not shown again."""
    expires_at = None if body.expires_in is None else now() + body.expires_in
    return _new(hub.keys.make(body.owner, body.scopes, project=body.project, expires_at=expires_at))


@router.get("")
def index(
    hub: TheHub,
    caller: Admin,
    owner: str | None = None,
    project: str | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """The newest first; those that are good no more are listed, too."""
    return page([key_object(key) for key in hub.keys.list(owner, project)], after, limit)


@router.get("/{key_id}")
def retrieve(hub: TheHub, caller: Admin, key_id: str) -> dict[str, Any]:
    return key_object(hub.keys.get(key_id))


@router.post("/{key_id}/rotate")
def rotate(hub: TheHub, caller: Admin, key_id: str, body: RotateBody | None = None) -> dict[str, Any]:
    """A new key in the place of an old one, which is good for a while yet."""
    return _new(hub.keys.rotate(key_id, (body or RotateBody()).grace_seconds))


@router.delete("/{key_id}")
def revoke(hub: TheHub, caller: Admin, key_id: str) -> dict[str, Any]:
    """From now on the key is good for nothing; what is being answered on its behalf ends."""
    return key_object(hub.keys.revoke(key_id))
