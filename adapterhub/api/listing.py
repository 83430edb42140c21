"""Adapters as the API shows them, one by one and in lists: the registry's rows joined with what the engine knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Depends
from fastapi.responses import Response, StreamingResponse

from adapterhub.api.hub import Hub
from adapterhub.errors import BadRequest
from adapterhub.swap.catalog import Filter, Found, Order, unknown_cursor
from adapterhub.swap.ref import Tier
from adapterhub.swap.uses import NEVER, Used
from adapterhub.swap.versions import Version

_BY_USE = ("last_use", "hits")
_PIECE = 250  # adapters of a list that are looked up and written at a time


@dataclass(frozen=True)
class Listing:
    """What a list is asked for, besides whose adapters and how many. `by_use` goes before `order`."""

    order: Order
    by_use: str | None
    descending: bool
    after: str | None
    name: str | None
    tier: Tier | None
    pinned: bool | None


def listing(
    sort: str = "name",
    after: str | None = None,
    name: str | None = None,
    tier: Literal["device", "ram", "disk", "remote"] | None = None,
    pinned: bool | None = None,
) -> Listing:
    """The query of a list. Raises BadRequest."""
    key = sort.removeprefix("-")
    if key not in (*Order, *_BY_USE):
        known = ", ".join((*Order, *_BY_USE))
        raise BadRequest(f"sort: {sort[:80]!r} is none of {known}; '-' before one turns it around.", param="sort")
    order, by_use = (Order.NAME, key) if key in _BY_USE else (Order(key), None)
    return Listing(order, by_use, sort.startswith("-"), after, name, Tier(tier) if tier else None, pinned)


TheListing = Annotated[Listing, Depends(listing)]


def list_adapters(hub: Hub, owner: str | None, asked: Listing, limit: int | None) -> Response:
    """The list object of a page of `owner`'s adapters, or of everybody's. Raises BadRequest for an unknown cursor."""
    which = Filter(owner, asked.name, asked.pinned)
    if asked.tier is None and asked.by_use is None:
        found = hub.catalog.page(which, asked.order, descending=asked.descending, after=asked.after, limit=limit)
    else:
        found = _joined(hub, which, asked, limit)
    return StreamingResponse(_written(hub, found), media_type="application/json")


def _written(hub: Hub, found: Found) -> Iterator[bytes]:
    """The list object, a piece at a time: that of ten thousand adapters costs no more memory than a piece, and is
    written while the event loop does other things. What was deleted meanwhile is left out."""
    first = last = None
    yield b'{"object":"list","data":['
    for begin in range(0, len(found.adapters), _PIECE):
        shown = adapter_objects(hub, hub.catalog.versions(found.adapters[begin : begin + _PIECE]))
        if shown:
            yield (b"," if last else b"") + _json(shown)[1:-1]
            first, last = first or shown[0]["id"], shown[-1]["id"]
    yield b"]," + _json({"has_more": found.has_more, "first_id": first, "last_id": last, "total": found.total})[1:]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _joined(hub: Hub, which: Filter, asked: Listing, limit: int | None) -> Found:
    """A page by what is no column: of all that the columns let through, the engine is asked once."""
    matches = hub.catalog.matching(which, asked.order, descending=asked.descending and asked.by_use is None)
    if asked.tier is not None:
        digests = [match.digest for match in matches if match.digest is not None]
        tiers = dict(zip(digests, hub.engine.tiers_of(digests).result(), strict=True))
        matches = [match for match in matches if match.digest in tiers and tiers[match.digest] is asked.tier]
    ids = [m.adapter for m in matches]
    if asked.by_use is not None:
        used = hub.catalog.by_adapter(hub.uses.all())
        keys = {"last_use": lambda u: u.last or 0.0, "hits": lambda u: u.hits}
        key = keys[asked.by_use]
        ids.sort(key=lambda adapter: key(used.get(adapter, NEVER)), reverse=asked.descending)
    begin = 0
    if asked.after is not None:
        if asked.after not in ids:
            raise unknown_cursor(asked.after)
        begin = ids.index(asked.after) + 1
    end = len(ids) if limit is None else begin + limit
    return Found(ids[begin:end], len(ids), end < len(ids))


def adapter_objects(hub: Hub, adapters: list[list[Version]]) -> list[dict[str, Any]]:
    """One object for each adapter, from all of its versions, the newest first: of plain values alone, as those of enums
    take half the time of writing a long list as JSON."""
    tiers = iter(hub.engine.tiers_of([v.digest for versions in adapters for v in versions]).result())
    return [_adapter_object([Shown(v, next(tiers), hub.uses.of(v.id)) for v in versions]) for versions in adapters]


class Shown(NamedTuple):
    version: Version
    tier: Tier
    used: Used


def _adapter_object(versions: list[Shown]) -> dict[str, Any]:
    one = versions[0].version  # of whatever kind: the name may point at none yet
    current = next((shown for shown in versions if shown.version.current), None)
    used = sum((shown.used for shown in versions), NEVER)
    return {
        "id": one.adapter,
        "object": "adapter",
        "name": one.name,
        "owner": one.owner,
        "model": one.alias,
        "base": current.version.base if current else one.base,
        "current": current.version.id if current else None,
        "bytes": current.version.nbytes if current else None,
        "rank": current.version.rank if current else None,
        "tier": current.tier.value if current else None,
        "split": dict(one.split) or None,
        "pinned": one.pinned,
        **_use_fields(used),
        "created_at": min(shown.version.created_at for shown in versions),
        "versions": [_version_object(shown) for shown in versions],
    }


def _version_object(shown: Shown) -> dict[str, Any]:
    version = shown.version
    return {
        "id": version.id,
        "object": "adapter.version",
        "number": version.number,
        "model": version.model,
        "kind": version.kind.value,
        "step": version.step,
        "metrics": version.metrics,
        "current": version.current,
        "percent": version.percent,
        "origin": version.origin,
        "bytes": version.nbytes,
        "rank": version.rank,
        "base": version.base,
        "digest": version.digest,
        "tier": shown.tier.value,
        **_use_fields(shown.used),
        "created_at": version.created_at,
    }


def _use_fields(used: Used) -> dict[str, Any]:
    return {"hits": used.hits, "loads": used.loads, "last_used_at": used.last}
