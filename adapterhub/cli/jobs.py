"""`adapterhub jobs`: list, show, pause, resume, cancel, checkpoints, curve."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, console, print_json, show
from adapterhub.cli.curve import draw, show_curve
from adapterhub.cli.formats import duration
from adapterhub.cli.pictures import check_png
from adapterhub.errors import HubError

app = typer.Typer(help="Your fine-tuning jobs.", no_args_is_help=True)

_JOBS = "/v1/fine_tuning/jobs"
TheJob = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]


@app.command("list")
def list_jobs(as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """List your last 100 fine-tuning jobs, the newest first."""
    jobs = Client(url, key).get(_JOBS, limit=100)["data"]
    columns = {
        "Id": "id",
        "Status": "status",
        "Model": "fine_tuned_model",
        "Created": "created",
        "Tokens": "trained_tokens",
    }
    show(jobs if as_json else [{**j, "created": _time(j["created_at"])} for j in jobs], as_json, columns)


@app.command("show")
def show_job(job: TheJob, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Show one job, with what its events say; as JSON with all of its metrics."""
    client = Client(url, key)
    found = client.get(f"{_JOBS}/{job}")
    events = client.items(f"{_JOBS}/{job}/events")[::-1]
    if as_json:
        print_json({**found, "events": events})
        return
    console.print(f"[bold]{found['id']}[/bold] {found['status']} {found['fine_tuned_model'] or ''}")
    given = ", ".join(f"{name} {value}" for name, value in found["hyperparameters"].items() if value is not None)
    console.print(f"{found['method']['type']} from {escape(found['model'])}: {given}, seed {found['seed']}")
    if found["estimate"] is not None and found["estimate"]["seconds"] is not None:
        console.print(f"estimated at {duration(found['estimate']['seconds'])} with the device to itself")
    metrics = [event for event in events if event["type"] == "metrics"]
    for event in events:
        if event["type"] == "message" or event is metrics[-1]:
            console.print(f"{_time(event['created_at'])} {event['level']:5} {event['message']}", markup=False)


@app.command()
def pause(job: TheJob, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Stop a job for now; what it has done is kept, and `resume` goes on from there."""
    _change(job, "pause", url, key)


@app.command()
def resume(job: TheJob, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Put a paused job back into the queue."""
    _change(job, "resume", url, key)


@app.command()
def cancel(job: TheJob, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """End a job for good; the checkpoints that it has are kept."""
    _change(job, "cancel", url, key)


@app.command()
def checkpoints(job: TheJob, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """List the checkpoints that a job has kept, the last one first. Each is a model that can be used."""
    found = Client(url, key).items(f"{_JOBS}/{job}/checkpoints")
    columns = {
        "Step": "step_number",
        "Model": "fine_tuned_model_checkpoint",
        "Training loss": "train_loss",
        "Validation loss": "full_valid_loss",
        "Created": "created",
    }
    rows = [{**c, **_rounded(c["metrics"]), "created": _time(c["created_at"])} for c in found]
    show(found if as_json else rows, as_json, columns, right=("Step", "Training loss", "Validation loss"))


@app.command()
def curve(
    job: TheJob,
    png: Annotated[Path | None, typer.Option(help="Draw it as this PNG file instead; needs matplotlib.")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Show how a job's loss goes from step to step."""
    if png is not None:
        check_png(png, "--png")
    events = Client(url, key).items(f"{_JOBS}/{job}/events")[::-1]
    metrics = list({e["data"]["step"]: e["data"] for e in events if e["type"] == "metrics"}.values())
    if as_json:
        print_json(metrics)
    elif not metrics:
        raise HubError(f"Job {job} has not trained a step yet. `adapterhub jobs show {job}` says why.")
    elif png is not None:
        draw(metrics, png, title=job)
        console.print(f"Drawn as {png}", markup=False)
    else:
        show_curve(metrics)


def _change(job: str, what: str, url: str, key: str) -> None:
    found = Client(url, key).post(f"{_JOBS}/{job}/{what}")
    console.print(f"{found['id']} is {found['status'].replace('_', ' ')}")


def _rounded(metrics: dict[str, Any]) -> dict[str, str]:
    return {name: f"{metrics[name]:.4f}" for name in ("train_loss", "full_valid_loss") if name in metrics}


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
