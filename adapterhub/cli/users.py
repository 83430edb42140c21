"""What users do: `adapterhub train FILE --name N` and `adapterhub chat MODEL`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from adapterhub.cli.choices import Method, Priority
from adapterhub.cli.client import DEFAULT_URL, Client, Key, Url, console
from adapterhub.errors import BadRequest, HubError

_POLL_SECONDS = 0.5
_PAGE = 100  # events that one look asks for
_FINAL = ("succeeded", "failed", "cancelled")


def train(
    file: Annotated[Path, typer.Argument(help="JSONL with chat messages, or prompts and completions.")],
    name: Annotated[str, typer.Option(help="The name of the adapter; a new version of it if it exists.")],
    validation: Annotated[
        Path | None, typer.Option(help="Measure on this file, instead of on a part of FILE that is held out.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on from what the adapter has learned, instead of from the base.")
    ] = False,
    method: Annotated[Method, typer.Option(help="dpo for a FILE of preferences.")] = Method.SUPERVISED,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter, as in n_epochs=3; repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the order of the data and of the start.")] = None,
    priority: Annotated[Priority, typer.Option(help="Among your jobs that wait, and for a share of the device.")] = (
        Priority.NORMAL
    ),
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Upload FILE, fine-tune on it, and follow until the model is live."""
    client = Client(url, key)
    for path in (file, validation):
        if path is not None and not path.is_file():
            raise HubError(f"{path} is not a file.")
    hyperparameters = dict(map(_hyperparameter, given or ()))
    model = _adapter(client, name) if go_on else client.get("/v1/models")["data"][0]["id"]
    order: dict[str, Any] = {
        "model": model,
        "suffix": name,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "priority": priority,
        "training_file": _upload(client, file),
    }
    if validation is not None:
        order["validation_file"] = _upload(client, validation)
    if seed is not None:
        order["seed"] = seed
    job = client.post("/v1/fine_tuning/jobs", json=order)
    console.print(f"Job {job['id']} on {model}", markup=False)
    job = follow(client, job["id"], name)
    if job["status"] != "succeeded":
        raise HubError(f"The job has {job['status']}: {(job['error'] or {}).get('message', 'no reason given')}")
    if job["proof"]["passed"]:
        console.print(f"Live as [bold]{job['fine_tuned_model']}[/bold]")
        console.print(f"Try: adapterhub chat {job['organization_id']}/{name}")
    else:
        console.print(f"A candidate only: [bold]{job['fine_tuned_model']}[/bold]")
        console.print(f"Try: adapterhub chat {job['fine_tuned_model']}")


def _hyperparameter(given: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value in JSON or as a word. Raises BadRequest."""
    name, equals, value = given.partition("=")
    if not equals:
        raise BadRequest(f'--set {given!r}: write NAME=VALUE, as in rank=8 or targets=["q_proj", "v_proj"].')
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _upload(client: Client, path: Path) -> str:
    with path.open("rb") as opened:
        return client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, opened)})["id"]


def _adapter(client: Client, name: str) -> str:
    """The model's name of one of the caller's adapters."""
    for adapter in client.items("/v1/adapters", name=name):
        if adapter["name"] == name:
            return adapter["model"]
    raise HubError(f"You have no adapter {name!r} to go on from. Leave --continue out to train it from the base.")


def follow(client: Client, job: str, label: str) -> dict[str, Any]:
    """Shows a job's progress, and what its events warn of, until it has ended; returns it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[news]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None, news="waiting")
        seen: str | None = None
        while True:
            found = client.get(f"/v1/fine_tuning/jobs/{job}")
            events = _since(client, job, seen)
            _show(progress, task, events, found["status"])
            if found["status"] in _FINAL:
                return found
            seen = events[-1]["id"] if events else seen
            time.sleep(_POLL_SECONDS)


def _since(client: Client, job: str, seen: str | None) -> list[dict[str, Any]]:
    """The events after the one with the id `seen`, the oldest first."""
    new: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    while True:
        page = client.get(f"/v1/fine_tuning/jobs/{job}/events", limit=_PAGE, **more)
        for event in page["data"]:
            if event["id"] == seen:
                return new[::-1]
            new.append(event)
        if seen is None or not page["has_more"]:
            return new[::-1]
        more = {"after": page["last_id"]}


def _show(progress: Progress, task: TaskID, events: list[dict[str, Any]], status: str) -> None:
    for event in events:
        if event["level"] != "info":
            progress.console.print(f"{event['level']}: {event['message']}", markup=False)
    metrics = [event["data"] for event in events if event["type"] == "metrics"]
    if metrics:
        data = metrics[-1]
        speed = f"{data['tokens_per_second']:.0f} tok/s"
        news = f"step {data['step']}/{data['total_steps']}  loss {data['train_loss']:.3f}  {speed}"
        progress.update(task, completed=data["step"], total=data["total_steps"], news=news)
    if status == "succeeded":
        progress.update(task, completed=progress.tasks[task].total or 1, total=progress.tasks[task].total or 1)
    elif status != "running":
        progress.update(task, news=status.replace("_", " "))


def chat(
    model: Annotated[str, typer.Argument(help="A model's name: the base's, ft:..., or owner/name.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends the conversation."""
    client = Client(url, key)
    client.get(f"/v1/models/{model.replace('/', '%2F')}")  # says at once if there is no such model
    messages: list[dict[str, str]] = []
    while (said := _read()) is not None:
        messages.append({"role": "user", "content": said})
        answer = ""
        for chunk in client.events("/v1/chat/completions", {"model": model, "messages": messages, "stream": True}):
            text = chunk["choices"][0]["delta"].get("content") or ""
            answer += text
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
        messages.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() or None
