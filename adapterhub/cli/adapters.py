"""`adapterhub adapters`: list, show, import, export, pin, unpin, evict, delete; `versions.py` has those on versions."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub.cli import versions
from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, Yes, confirm, console, print_json, show, stderr
from adapterhub.cli.find import Several, Which, find
from adapterhub.cli.formats import ago, size
from adapterhub.cli.imports import import_adapters
from adapterhub.errors import Forbidden, HubError

app = typer.Typer(help="Adapters: yours, and with an admin key everybody's.", no_args_is_help=True)
app.command("import")(import_adapters)
app.command("versions")(versions.list_versions)
app.command("promote")(versions.promote)
app.command("rollback")(versions.rollback)
app.command("split")(versions.split)


class Sort(StrEnum):
    NAME = "name"
    LAST_USE = "last_use"
    BYTES = "bytes"
    HITS = "hits"
    CREATED = "created"


class Place(StrEnum):
    DEVICE = "device"
    RAM = "ram"
    DISK = "disk"
    REMOTE = "remote"


class Cache(StrEnum):
    DEVICE = "device"
    RAM = "ram"
    DISK = "disk"


@app.command("list")
def list_adapters(
    every: Annotated[bool, typer.Option("--all", help="Every owner's; needs an admin key.")] = False,
    owner: Annotated[str | None, typer.Option(help="This owner's; needs an admin key.")] = None,
    name: Annotated[str | None, typer.Option(help="Only those with this in their name.")] = None,
    tier: Annotated[Place | None, typer.Option(help="Only those that are there now.")] = None,
    pinned: Annotated[bool | None, typer.Option("--pinned/--not-pinned", help="Only those that are, or are not.")] = (
        None
    ),
    sort: Annotated[Sort, typer.Option(help="What to sort by.")] = Sort.NAME,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="The highest, largest or latest first.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="How many at most; 0 for all.")] = 100,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """List adapters with their current version, where it is, and how it is used."""
    query: dict[str, Any] = {"sort": f"-{sort}" if reverse else str(sort)}
    given = {"owner": owner, "name": name, "tier": tier, "pinned": pinned}
    query |= {k: v for k, v in given.items() if v is not None}
    path = "/admin/adapters" if every or owner is not None else "/v1/adapters"
    pages = list(Client(url, key).pages(path, limit=limit or None, **query))
    found = [adapter for page in pages for adapter in page["data"]]
    if as_json:
        print_json(found)
    else:
        show_adapters(found)
    if pages[-1]["has_more"]:
        out = stderr if as_json else console
        out.print(f"{len(found)} of {pages[-1]['total']}; --limit 0 shows all.")


def show_adapters(found: list[dict[str, Any]]) -> None:
    """As a table."""
    columns = {
        "Model": "model",
        "Tier": "tier",
        "Size": "bytes",
        "Rank": "rank",
        "Versions": "versions",
        "Hits": "hits",
        "Loads": "loads",
        "Last use": "last_used_at",
        "Pinned": "pinned",
    }
    rows = [
        {
            **a,
            "bytes": size(a["bytes"]),
            "versions": len(a["versions"]),
            "last_used_at": ago(a["last_used_at"]),
            "pinned": a["pinned"] and f"by {a['pinned']}",
        }
        for a in found
    ]
    show(rows, False, columns, right=("Size", "Rank", "Versions", "Hits", "Loads", "Last use"))


@app.command("show")
def show_adapter(which: Which, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Show one adapter and its versions."""
    [(adapter, _)] = find(Client(url, key), [which])
    if as_json:
        print_json(adapter)
        return
    console.print(f"[bold]{adapter['model']}[/bold]  {adapter['id']}")
    current = f"current version {adapter['current']}, in tier {adapter['tier']}" if adapter["current"] else "no release"
    console.print(f"base {adapter['base']}, {current}")
    pinned = f"pinned by {adapter['pinned']}" if adapter["pinned"] else "not pinned"
    uses = f"hits {adapter['hits']}, loads {adapter['loads']}, last use {ago(adapter['last_used_at'])}"
    console.print(f"{uses}, {pinned}")
    versions.show_versions(adapter["versions"])


@app.command("export")
def export_adapter(
    which: Which,
    out: Annotated[Path, typer.Option(help="What to write: a directory, or a zip if it ends in .zip; must not exist.")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Export the current version as a PEFT directory, or as a zip of one."""
    if out.exists():
        raise HubError(f"{out} exists already; nothing was written. Choose another --out.")
    client = Client(url, key)
    [(adapter, route)] = find(client, [which])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:  # whole, or not at all
        archive = Path(beside) / "download.zip"
        with archive.open("wb") as file:
            client.download(f"{route}/download", file)
        if out.suffix.lower() == ".zip":
            archive.rename(out)
        else:
            directory = Path(beside) / "directory"
            with zipfile.ZipFile(archive) as files:
                files.extractall(directory)
            directory.rename(out)
    if as_json:
        print_json({"id": adapter["id"], "model": adapter["model"], "version": adapter["current"], "out": str(out)})
    else:
        console.print(f"Wrote {out}.", soft_wrap=True)


@app.command()
def pin(which: Several, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Keep adapters in memory, once they are there, whatever else is asked for.

    An owner's pins may hold a sixteenth of the device's budget; all pins, which an admin key can set, three quarters.
    """
    _steer(Client(url, key), which, "pin", "Pinned", as_json)


@app.command()
def unpin(which: Several, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Let adapters leave memory again when others need the room. What an operator pinned, only they unpin."""
    _steer(Client(url, key), which, "unpin", "Unpinned", as_json)


@app.command()
def evict(
    which: Several,
    tier: Annotated[
        Cache | None,
        typer.Option(help="Only from there; by default from device and RAM. From the disk where there is a store."),
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Take adapters out of memory, or off the disk; the next request loads them again. Needs an admin key."""
    client = Client(url, key)
    answers = []
    body = {} if tier is None else {"tier": tier}
    for adapter, _ in find(client, which):
        answers.append(client.post(f"/admin/adapters/{adapter['id']}/evict", json=body))
        if not as_json:
            console.print(_evicted(adapter["model"], tier, answers[-1]))
    if as_json:
        print_json(answers)


def _evicted(model: str, tier: Cache | None, answer: dict[str, Any]) -> str:
    if answer["evicted"]:
        return f"Evicted {model}."
    if tier is Cache.DISK:
        return f"{model} stays on the disk: it is being read, or is not in the store yet. Try again in a moment."
    return f"Evicted {model} as soon as the requests that use it have ended."


@app.command("delete")
def delete_adapters(
    which: Several, yes: Yes = False, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = ""
) -> None:
    """Delete adapters with all their versions. Asks first."""
    client = Client(url, key)
    found = find(client, which)
    names = ", ".join(adapter["model"] for adapter, _ in found)
    count = sum(len(adapter["versions"]) for adapter, _ in found)
    confirm(f"Delete {names} ({count} version{'' if count == 1 else 's'})? This cannot be undone.", yes)
    answers = []
    for adapter, route in found:
        answers.append(client.delete(route))
        if not as_json:
            console.print(f"Deleted {adapter['model']}.")
    if as_json:
        print_json(answers)


def _steer(client: Client, which: Sequence[str], verb: str, done: str, as_json: bool) -> None:
    """As the operator where the key may, and else as the owner."""
    answers = []
    for adapter, _ in find(client, which):
        try:
            answers.append(client.post(f"/admin/adapters/{adapter['id']}/{verb}"))
        except Forbidden:
            answers.append(client.post(f"/v1/adapters/{adapter['id']}/{verb}"))
        if not as_json:
            console.print(f"{done} {adapter['model']}.")
    if as_json:
        print_json(answers)
