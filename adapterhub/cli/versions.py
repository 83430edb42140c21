"""`adapterhub adapters`, on versions: versions, promote, rollback, split."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, console, print_json, show
from adapterhub.cli.find import Which, find
from adapterhub.cli.formats import duration
from adapterhub.config import format_bytes
from adapterhub.errors import HubError

_VERSION = "its number, id or name, `candidate` for the newest candidate, or `previous`"
_SHOWN = 5  # of what rollbacks would go to


def list_versions(which: Which, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """List an adapter's releases, candidates and checkpoints, and what its name has pointed at."""
    client = Client(url, key)
    [(adapter, route)] = find(client, [which])
    pages = list(client.pages(f"{route}/versions"))
    found = [version for page in pages for version in page["data"]]
    history = pages[0]["history"]
    if as_json:
        print_json({"versions": found, "history": history})
        return
    show_versions(found)
    if history:
        numbers = {version["id"]: str(version["number"]) for version in found}
        current, *before = [numbers.get(was["version"], was["version"]) for was in history]  # less if deleted just now
        back = f"; a rollback goes to {', then '.join(before[:_SHOWN])}" if before else ""
        since = duration(max(0.0, time.time() - history[0]["since"]))
        console.print(f"{adapter['model']} has been version {current} for {since}{back}.")


def show_versions(found: list[dict[str, Any]]) -> None:
    """As a table."""
    rows = [
        {**v, "bytes": format_bytes(v["bytes"]), "percent": f"{v['percent']}%" if v["percent"] else None} for v in found
    ]
    columns = {
        "No": "number",
        "Model": "model",
        "Kind": "kind",
        "Gets": "percent",
        "From": "origin",
        "Rank": "rank",
        "Size": "bytes",
        "Tier": "tier",
    }
    show(rows, False, columns, right=("No", "Gets", "Rank", "Size"))


def promote(
    which: Which,
    version: Annotated[str, typer.Argument(help=f"Which version: {_VERSION}.")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Make a version current: a candidate or a checkpoint becomes a release, or an older release comes back."""
    client = Client(url, key)
    [(_, route)] = find(client, [which])
    _say(client.post(f"{route}/versions/{quote(version, safe='')}/promote"), as_json)


def rollback(which: Which, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Make current what was so before; again, what was so before that."""
    client = Client(url, key)
    [(_, route)] = find(client, [which])
    _say(client.post(f"{route}/rollback"), as_json)


def split(
    which: Which,
    shares: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"VERSION=PERCENT, several if need be; VERSION is {_VERSION}. The current version gets the rest."
        ),
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="All requests go to the current version again.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Send a part of the requests for an adapter's name to other versions, until another one becomes current.

    Requests with the same `user` field go to the same version.
    """
    if end == bool(shares):
        raise HubError("Give shares as in `candidate=10`, or --end.")
    percent = dict(_share(share) for share in shares or [])
    client = Client(url, key)
    [(_, route)] = find(client, [which])
    path = f"{route}/split"
    _say(client.delete(path) if end else client.put(path, {"percent": percent}), as_json)


def _share(written: str) -> tuple[str, int]:
    version, _, percent = written.rpartition("=")
    if not version or not percent.removesuffix("%").isdecimal():
        raise HubError(f"{written!r} is no share. Write VERSION=PERCENT, as in `candidate=10`.")
    return version, int(percent.removesuffix("%"))


def _say(adapter: dict[str, Any], as_json: bool) -> None:
    """What the adapter's name means now."""
    if as_json:
        print_json(adapter)
        return
    share = "{model} ({percent}%)" if adapter["split"] else "{model}"
    means = [share.format(**version) for version in adapter["versions"] if version["percent"]]
    console.print(f"{adapter['model']} is now {', '.join(means)}.", soft_wrap=True)
