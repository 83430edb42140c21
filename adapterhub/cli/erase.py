"""`adapterhub users`: what operators do with all that is kept of an owner."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, Yes, confirm, console, print_json

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
