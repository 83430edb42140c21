"""The versions of an adapter, and which of them its name means: for owners under `/v1/adapters`, for operators, of
anybody's, under `/admin/adapters`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, StrictInt

from adapterhub.api.auth import Admin, Caller, Training
from adapterhub.api.body import AtMost, Strict
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.listing import adapter_objects
from adapterhub.api.pages import After, page

looking = APIRouter()
router = APIRouter()  # what changes something


def own_seen(request: Request, caller: Caller) -> None:
    """A dependency of `looking` where it serves an owner."""
    request.state.whose = caller.owner


def own_changed(request: Request, caller: Training) -> None:
    """A dependency of `router` where it serves an owner."""
    request.state.whose = caller.owner


def anybodys(request: Request, caller: Admin) -> None:
    """A dependency of both where they serve operators."""
    request.state.whose = None


def _whose(request: Request) -> str | None:
    return request.state.whose


Whose = Annotated[str | None, Depends(_whose)]


class SplitBody(Strict):
    """`percent`: by version, each by its number, id or name, or "candidate" or "previous"; the current one gets the
    rest."""

    percent: Annotated[dict[str, StrictInt], Field(min_length=1), AtMost(100)]


@looking.get("/{adapter_id}/versions")
def index(
    hub: TheHub,
    whose: Whose,
    adapter_id: str,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Releases, candidates and checkpoints, the newest first; `history` says what is current and what was before."""
    shown = _shown(hub, whose, adapter_id)
    history = [was._asdict() for was in hub.registry.history.of(adapter_id)]
    return {**page(shown["versions"], after, limit), "history": history}


@router.post("/{adapter_id}/versions/{version:path}/promote")
def promote(hub: TheHub, whose: Whose, adapter_id: str, version: str) -> dict[str, Any]:
    """Makes a version current, by its number, id or name, or the newest "candidate"."""
    hub.registry.promote(whose, adapter_id, version)
    return _shown(hub, whose, adapter_id)


@router.post("/{adapter_id}/rollback")
def rollback(hub: TheHub, whose: Whose, adapter_id: str) -> dict[str, Any]:
    """Makes current what was so before; again, what was so before that."""
    hub.registry.rollback(whose, adapter_id)
    return _shown(hub, whose, adapter_id)


@router.put("/{adapter_id}/split")
def split(hub: TheHub, whose: Whose, adapter_id: str, body: SplitBody) -> dict[str, Any]:
    """Sends a part of the requests for the adapter's name to other versions than the current one."""
    hub.registry.split(whose, adapter_id, body.percent)
    return _shown(hub, whose, adapter_id)


@router.delete("/{adapter_id}/split")
def end_split(hub: TheHub, whose: Whose, adapter_id: str) -> dict[str, Any]:
    """All requests for the adapter's name go to the current version again."""
    hub.registry.split(whose, adapter_id, {})
    return _shown(hub, whose, adapter_id)


def _shown(hub: Hub, whose: str | None, adapter_id: str) -> dict[str, Any]:
    [shown] = adapter_objects(hub, [hub.registry.adapter(whose, adapter_id)])
    return shown
