"""`adapterhub users`: what operators do with all that is kept of an owner."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, Yes, confirm, console, print_json, stderr
from adapterhub.config import format_bytes
from adapterhub.errors import HubError

app = typer.Typer(help="What is kept of an owner.", no_args_is_help=True)


@app.callback()
def users() -> None:
    """What is kept of an owner."""


@app.command()
def erase(
    owner: Annotated[str, typer.Argument(help="Whose data to remove.")],
    yes: Yes = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Remove all that is kept of OWNER: keys, files, jobs, adapters in every tier, traces and usage."""
    client = Client(url, key)
    confirm(f"Erase all that is kept of {owner}? This cannot be undone.", yes)
    receipt = client.delete(f"/admin/users/{owner}")
    if as_json:
        print_json(receipt)
        return
    console.print(f"Erased {owner} ({receipt['id']}):")
    for kind, count in receipt["removed"].items():
        console.print(f"  {count:>8} {kind.replace('_', ' ')}")
    for left in receipt["left_in_stores"]:
        console.print(f"{left['blocks']} blocks are still being deleted from {left['store']}")


@app.command()
def export(
    owner: Annotated[str, typer.Argument(help="Whose data to write.")],
    file: Annotated[Path, typer.Argument(help="The zip to write.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Write all that is kept of OWNER to a zip: files, jobs, adapters as PEFT directories, usage, and keys without
    their secrets."""
    client = Client(url, key)
    if file.exists():
        confirm(f"Overwrite {file}?", yes)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as beside:  # whole, or not at all
        archive = Path(beside) / "export.zip"
        archive.touch(mode=0o600)
        _download(client, owner, archive)
        missing = _missing(archive)
        archive.replace(file)
    console.print(f"Wrote {file} ({format_bytes(file.stat().st_size)}).", markup=False, soft_wrap=True)
    if missing:
        raise HubError(
            f"{len(missing)} things of {owner} could not be read; missing.json in {file} says which and why."
        )


def _download(client: Client, owner: str, path: Path) -> None:
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress, path.open("wb") as out:
        task = progress.add_task(f"Exporting {owner}", total=None)
        client.download(f"/admin/users/{owner}/export", out, lambda count: progress.advance(task, count))


def _missing(path: Path) -> dict[str, str]:
    """What the server could not read, and why. Raises HubError when the zip is not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("missing.json"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise HubError(f"What the server sent is not whole ({error}). Try again.") from error
