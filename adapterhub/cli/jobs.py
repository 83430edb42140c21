"""`adapterhub jobs`: list, show."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, console, show

app = typer.Typer(help="Your fine-tuning jobs.", no_args_is_help=True)


@app.command("list")
def list_jobs(as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """List your fine-tuning jobs, the newest first."""
    jobs = Client(url, key).get("/v1/fine_tuning/jobs", limit=100)["data"]
    columns = {
        "Id": "id",
        "Status": "status",
        "Model": "fine_tuned_model",
        "Created": "created",
        "Tokens": "trained_tokens",
    }
    show(jobs if as_json else [{**j, "created": _time(j["created_at"])} for j in jobs], as_json, columns)


@app.command("show")
def show_job(
    job: Annotated[str, typer.Argument(help="A job's id.")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Show one job and its events."""
    client = Client(url, key)
    found = client.get(f"/v1/fine_tuning/jobs/{job}")
    events = client.get(f"/v1/fine_tuning/jobs/{job}/events", limit=1000)["data"][::-1]
    if as_json:
        print(json.dumps({**found, "events": events}, indent=2))
        return
    console.print(f"[bold]{found['id']}[/bold] {found['status']} {found['fine_tuned_model'] or ''}")
    console.print(f"hyperparameters {found['hyperparameters']}, seed {found['seed']}")
    for event in events:
        console.print(f"{_time(event['created_at'])} {event['level']:5} {event['message']}", markup=False)


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
