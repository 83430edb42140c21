"""`adapterhub usage`: who used how much. `adapterhub quotas`: how much each owner may."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from adapterhub.api.tenancy.terms import EVERYBODY, Group
from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, print_json, show
from adapterhub.config import format_bytes, parse_bytes
from adapterhub.errors import BadRequest

quotas = typer.Typer(help="How much each owner may have and use. Needs an admin key.", no_args_is_help=True)
_NONE = "none"
_GIB = 2**30
_COUNTS = {
    "Requests": "requests",
    "Tokens in": "input_tokens",
    "Tokens out": "output_tokens",
    "Trained": "training_tokens",
    "Cold boots": "cold_boots",
    "GiB hours": "gib_hours",
}
_LIMITS = {
    "Owner": "owner",
    "Adapters": "adapters",
    "Bytes": "bytes",
    "Jobs": "jobs",
    "Requests/min": "requests_per_minute",
    "Tokens/min": "tokens_per_minute",
}


def usage(
    by: Annotated[list[Group] | None, typer.Option(help="Tell apart by this; repeatable.")] = None,
    first: Annotated[
        datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="The first day; default: 30 days ago.")
    ] = None,
    last: Annotated[
        datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The last day, in UTC; default: today.")
    ] = None,
    everybody: Annotated[bool, typer.Option("--all", help="All owners' usage. Needs an admin key.")] = False,
    owner: Annotated[str | None, typer.Option(help="This owner's usage. Needs an admin key.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Show what was used: requests, tokens, cold boots, and what was kept for how long. Your own, unless told."""
    if as_csv and as_json:
        raise BadRequest("Give --csv or --json, not both.")
    groups = by or ([Group.OWNER] if everybody else [Group.DAY])
    asked = {"group_by": groups, "from": first and first.date(), "to": last and last.date(), "owner": owner}
    params: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    path = "/admin/usage" if everybody or owner is not None else "/v1/usage"
    client = Client(url, key)
    if as_csv:
        client.download(path, sys.stdout.buffer, format="csv", **params)
        return
    rows = client.items(path, **params)
    if not as_json:
        rows = [{**row, "gib_hours": f"{row['byte_hours'] / _GIB:.3f}"} for row in rows]
    show(rows, as_json, {**{str(group).capitalize(): str(group) for group in groups}, **_COUNTS}, right=_COUNTS)


@quotas.command("show")
def show_quotas(
    owner: Annotated[str | None, typer.Argument(help="Whose; without one, what has been set for whom.")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Show the quotas: an owner's with what they have, or all that have been set. Needs an admin key."""
    client = Client(url, key)
    if owner is not None:
        _show(client.get(_path(owner)), as_json)
        return
    found = client.get("/admin/quotas")
    if as_json:
        print_json(found)
    else:
        everybody = {"owner": EVERYBODY, **found["limits"]}
        show([_row(each) for each in [everybody, *_set(found["set"])]], False, _LIMITS, right=list(_LIMITS)[1:])


@quotas.command("set")
def set_quotas(
    owner: Annotated[str, typer.Argument(help="Whose; '*' for all that have none of their own.")],
    adapters: Annotated[str | None, typer.Option(help="Adapters; none for no limit.")] = None,
    kept: Annotated[
        str | None, typer.Option("--bytes", help="Files and adapters, as in 2GiB; none for no limit.")
    ] = None,
    jobs: Annotated[str | None, typer.Option(help="Fine-tuning jobs under way; none for no limit.")] = None,
    requests: Annotated[str | None, typer.Option(help="Requests per minute; none for no limit.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens per minute; none for no limit.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what was set; the defaults count.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Set what is given of an owner's quotas, at once and for the next start. Needs an admin key."""
    given = {
        "adapters": adapters,
        "bytes": kept,
        "jobs": jobs,
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
    }
    changes = {name: _amount(name, text) for name, text in given.items() if text is not None}
    if bool(changes) == reset:
        raise BadRequest("Give limits, as --tokens 100000, or else --reset.")
    client, path = Client(url, key), _path(owner)
    _show(client.delete(path) if reset else client.patch(path, changes), as_json)


def _path(owner: str) -> str:
    return f"/admin/quotas/{quote(owner, safe='')}"


def _amount(name: str, text: str) -> int | None:
    if text == _NONE:
        return None
    if name == "bytes":
        return parse_bytes(text)
    if not text.isascii() or not text.isdigit():
        raise BadRequest(f"{text!r} is no limit of {name}. Write a whole number, or none.")
    return int(text)


def _show(quota: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(quota)
        return
    limits, used = quota["limits"], quota.get("used", {})
    rows = [
        {
            "quota": name.replace("_", " "),
            "limit": _written(name, limit),
            "used": _written(name, used[name]) if name in used else None,
            "set": "set" if name in quota["set"] else "default",
        }
        for name, limit in limits.items()
    ]
    show(rows, False, {"Quota": "quota", "Limit": "limit", "Used": "used", "From": "set"}, right=("Limit", "Used"))


def _set(owners: dict[str, dict[str, int | None]]) -> list[dict[str, Any]]:
    return [{"owner": owner, **limits} for owner, limits in owners.items() if owner != EVERYBODY]


def _row(limits: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "owner" else _written(name, value) for name, value in limits.items()}


def _written(name: str, limit: int | None) -> str:
    if limit is None:
        return _NONE
    return format_bytes(limit) if name == "bytes" else str(limit)
