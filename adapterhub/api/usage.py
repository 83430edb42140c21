"""Who used how much: `/v1/usage` for owners, `/admin/usage` for the operator; as JSON, or as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse

from adapterhub.api.auth import Admin, Caller
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.pages import listed
from adapterhub.api.tenancy.terms import Group
from adapterhub.api.tenancy.usage import NONE, Asked, Counts
from adapterhub.errors import BadRequest
from adapterhub.swap.database import Row

router = APIRouter(tags=["usage"])
_DAYS = 30  # that are told of where no others are asked for
_ROWS = 10_000  # of a table that are in memory at once


class Form(NamedTuple):
    """How a report is given. `after`: the id of a row, which is its place."""

    format: Literal["json", "csv"]
    after: int
    limit: int


def _form(
    format: Literal["json", "csv"] = "json",  # noqa: A002  (a query's field)
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=_ROWS)] = 1000,
) -> Form:
    return Form(format, after, limit)


def _days(
    first: Annotated[date | None, Query(alias="from")] = None, last: Annotated[date | None, Query(alias="to")] = None
) -> tuple[date, date]:
    """Both included. Raises BadRequest when they are the wrong way round."""
    last = last or max(datetime.now(UTC).date(), first or date.min)
    first = first or last - timedelta(days=min(_DAYS, last.toordinal()) - 1)
    if first > last:
        raise BadRequest(f"from is {first}, which is after to, {last}. Give the earlier day as from.", param="from")
    return first, last


TheForm = Annotated[Form, Depends(_form)]
Days = Annotated[tuple[date, date], Depends(_days)]
Groups = Annotated[list[Group], Query(max_length=len(Group))]


@router.get("/v1/usage", response_model=None)
def own(hub: TheHub, caller: Caller, days: Days, form: TheForm, group_by: Groups = []) -> Response | dict[str, Any]:  # noqa: B006
    """The caller's usage, summed up, or by each of `group_by`; by day in UTC."""
    return _report(hub, Asked(*days, caller.owner, tuple(dict.fromkeys(group_by))), form)


@router.get("/admin/usage", response_model=None)
def everybodys(
    hub: TheHub,
    caller: Admin,
    days: Days,
    form: TheForm,
    owner: str | None = None,
    group_by: Groups = [],  # noqa: B006
) -> Response | dict[str, Any]:
    """All owners' usage, or one's."""
    return _report(hub, Asked(*days, owner, tuple(dict.fromkeys(group_by))), form)


def _report(hub: Hub, asked: Asked, form: Form) -> Response | dict[str, Any]:
    hub.meter.save()
    if form.format == "csv":
        headers = {"content-disposition": f'attachment; filename="usage-{asked.first}-{asked.last}.csv"'}
        return StreamingResponse(usage_csv(hub, asked), media_type="text/csv", headers=headers)
    rows = hub.usage.report(asked, skip=form.after, limit=form.limit + 1)
    shown = [_usage_object(row, form.after + at + 1) for at, row in enumerate(rows[: form.limit])]
    return listed(shown, len(rows) > form.limit)


def _usage_object(row: Row, place: int) -> dict[str, Any]:
    return {"id": str(place), "object": "usage", **{name: None if v == NONE else v for name, v in row.items()}}


def usage_csv(hub: Hub, asked: Asked) -> Iterator[str]:
    """A table with its headings, in pieces."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [*map(str, asked.by), *Counts._fields])
    writer.writeheader()
    skip = 0
    while rows := hub.usage.report(asked, skip=skip, limit=_ROWS):
        writer.writerows(rows)
        yield table.getvalue()
        table.seek(0)
        table.truncate()
        skip += len(rows)
    yield table.getvalue()
