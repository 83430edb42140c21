"""`adapterhub adapters`: list, show, import, export, delete."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.prompt import Confirm

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, Yes, console, show
from adapterhub.config import format_bytes
from adapterhub.errors import HubError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

app = typer.Typer(help="Your adapters.", no_args_is_help=True)
Which = Annotated[str, typer.Argument(help="An adapter's id, or its name.")]


def _find(client: Client, which: str) -> dict[str, Any]:
    for adapter in client.get("/v1/adapters")["data"]:
        if which in (adapter["id"], adapter["name"], adapter["model"]):
            return adapter
    raise HubError(f"You have no adapter {which!r}. `adapterhub adapters list` shows yours.")


@app.command("list")
def list_adapters(
    every: Annotated[bool, typer.Option("--all", help="Every owner's; needs an admin key.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """List adapters with their current version and the tier it is in."""
    found = Client(url, key).get("/admin/adapters" if every else "/v1/adapters")["data"]
    if not as_json:
        found = [{**a, "bytes": format_bytes(a["bytes"]), "versions": len(a["versions"])} for a in found]
    columns = {"Model": "model", "Tier": "tier", "Rank": "rank", "Size": "bytes", "Versions": "versions", "Id": "id"}
    show(found, as_json, columns)


@app.command("show")
def show_adapter(which: Which, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Show one adapter and its versions."""
    adapter = _find(Client(url, key), which)
    if as_json:
        print(json.dumps(adapter, indent=2))
        return
    versions = [{**v, "bytes": format_bytes(v["bytes"])} for v in adapter["versions"]]
    columns = {"No": "number", "Model": "model", "From": "origin", "Rank": "rank", "Size": "bytes", "Tier": "tier"}
    show(versions, False, columns, title=f"{adapter['model']} ({adapter['id']}), current {adapter['current']}")


@app.command("import")
def import_adapter(
    directory: Annotated[Path, typer.Argument(help="A PEFT directory: adapter_config.json and safetensors weights.")],
    name: Annotated[str | None, typer.Option(help="The adapter's name; by default the directory's.")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Import a PEFT adapter; under a name that exists it becomes the next version."""
    config, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    for path in (config, weights):
        if not path.is_file():
            pickled = (directory / "adapter_model.bin").exists()
            hint = " Its weights are a pickle, which is never read: save it as safetensors." if pickled else ""
            raise HubError(f"{path} does not exist; a PEFT directory needs it.{hint}")
    with config.open("rb") as first, weights.open("rb") as second:
        files = {"config": (CONFIG_FILE, first), "weights": (WEIGHTS_FILE, second)}
        data = {"name": name or directory.resolve().name}
        imported = Client(url, key).post("/v1/adapters", data=data, files=files)
    if as_json:
        print(json.dumps(imported, indent=2))
        return
    console.print(f"Imported as [bold]{imported['model']}[/bold], version {imported['versions'][0]['number']}.")
    for warning in imported["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}")


@app.command("export")
def export_adapter(
    which: Which,
    out: Annotated[Path, typer.Option(help="The directory to write; must not exist.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Export the current version as a PEFT directory."""
    if out.exists():
        raise HubError(f"{out} exists already; nothing was written. Choose another --out.")
    client = Client(url, key)
    archive = client.download(f"/v1/adapters/{_find(client, which)['id']}/download")
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        out.mkdir(parents=True)
        for filename in (CONFIG_FILE, WEIGHTS_FILE):
            (out / filename).write_bytes(files.read(filename))
    console.print(f"Wrote {out}.")


@app.command("delete")
def delete_adapter(which: Which, yes: Yes = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Delete an adapter with all its versions."""
    client = Client(url, key)
    adapter = _find(client, which)
    question = f"Delete {adapter['model']} and its {len(adapter['versions'])} version(s)? This cannot be undone."
    if not yes and not Confirm.ask(question, default=False):
        raise typer.Exit(1)
    client.delete(f"/v1/adapters/{adapter['id']}")
    console.print(f"Deleted {adapter['model']}.")
