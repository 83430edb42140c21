"""Adapters as the API shows them, one by one and in lists: the registry's rows joined with what the engine knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query

from adapterhub.api.hub import Hub
from adapterhub.api.pages import listed
from adapterhub.errors import BadRequest
from adapterhub.swap.catalog import Filter, Found, Order, unknown_cursor
from adapterhub.swap.ref import Tier
from adapterhub.swap.registry import Version


@dataclass(frozen=True)
class Listing:
    """What a list is asked for, besides whose adapters and how many."""

    order: Order
    descending: bool
    after: str | None
    name: str | None
    tier: Tier | None
    pinned: bool | None


def listing(
    sort: str = "name",
    after: str | None = None,
    name: Annotated[str | None, Query(max_length=64)] = None,
    tier: Literal["device", "ram", "disk", "remote"] | None = None,
    pinned: bool | None = None,
) -> Listing:
    """The query of a list. Raises BadRequest."""
    key = sort.removeprefix("-")
    if key not in list(Order):
        known = ", ".join(Order)
        raise BadRequest(f"sort: {sort[:80]!r} is none of {known}; '-' before one turns it around.", param="sort")
    return Listing(Order(key), sort.startswith("-"), after, name, Tier(tier) if tier else None, pinned)


TheListing = Annotated[Listing, Depends(listing)]


def list_adapters(hub: Hub, owner: str | None, asked: Listing, limit: int | None) -> dict[str, Any]:
    """The list object of a page of `owner`'s adapters, or of everybody's. Raises BadRequest for an unknown cursor."""
    which = Filter(owner, asked.name, asked.pinned)
    if asked.tier is None:
        found = hub.catalog.page(which, asked.order, descending=asked.descending, after=asked.after, limit=limit)
    else:
        found = _joined(hub, which, asked, limit)
    return listed(adapter_objects(hub, found.adapters), found.has_more, total=found.total)


def _joined(hub: Hub, which: Filter, asked: Listing, limit: int | None) -> Found:
    """A page by what the engine knows: it is asked once, about all that the columns let through."""
    matches = hub.catalog.matching(which, asked.order, descending=asked.descending)
    tiers = hub.engine.tiers_of([m.digest for m in matches]).result()
    ids = [m.adapter for m, tier in zip(matches, tiers, strict=True) if tier == asked.tier]
    begin = 0
    if asked.after is not None:
        if asked.after not in ids:
            raise unknown_cursor(asked.after)
        begin = ids.index(asked.after) + 1
    end = len(ids) if limit is None else begin + limit
    return Found(hub.catalog.versions(ids[begin:end]), len(ids), end < len(ids))


def adapter_objects(hub: Hub, adapters: list[list[Version]]) -> list[dict[str, Any]]:
    """One object for each adapter, from all of its versions, the newest first."""
    tiers = iter(hub.engine.tiers_of([v.digest for versions in adapters for v in versions]).result())
    return [_adapter_object([(v, next(tiers)) for v in versions]) for versions in adapters]


def _adapter_object(pairs: list[tuple[Version, Tier]]) -> dict[str, Any]:
    current, tier = next(pair for pair in pairs if pair[0].current)
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
        "pinned": current.pinned,
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
