"""OpenAI's lists: `{object, data, has_more}`, with the last item's id as the cursor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query

from adapterhub.errors import BadRequest

After = Annotated[str | None, Query()]


def page(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """The `limit` items that follow the one with the id `after`. Raises BadRequest for an unknown cursor."""
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise BadRequest(f"There is no item {after[:80]!r} to go on after.", param="after")
        items = items[ids.index(after) + 1 :]
    return listed(items[:limit], len(items) > limit)


def listed(shown: Sequence[dict[str, Any]], has_more: bool, **more: Any) -> dict[str, Any]:
    """The list object of the items of one page."""
    return {
        "object": "list",
        "data": list(shown),
        "has_more": has_more,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        **more,
    }
