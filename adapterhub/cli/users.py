"""What users do: `adapterhub train FILE --name N` and `adapterhub chat MODEL`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from adapterhub.cli.client import DEFAULT_URL, Client, Key, Url, console
from adapterhub.errors import HubError

_POLL_SECONDS = 0.5
_FINAL = ("succeeded", "failed", "cancelled")


def train(
    file: Annotated[Path, typer.Argument(help="JSONL with chat messages, or prompts and completions.")],
    name: Annotated[str, typer.Option(help="The name of the adapter; a new version of it if it exists.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Upload FILE, fine-tune on it, and follow until the model is live."""
    client = Client(url, key)
    if not file.is_file():
        raise HubError(f"{file} is not a file.")
    with file.open("rb") as opened:
        uploaded = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (file.name, opened)})
    base = client.get("/v1/models")["data"][0]["id"]
    job = client.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": uploaded["id"], "suffix": name})
    console.print(f"Job {job['id']} on {base}")
    job = follow(client, job["id"], name)
    if job["status"] != "succeeded":
        raise HubError(f"The job has {job['status']}: {(job['error'] or {}).get('message', 'no reason given')}")
    console.print(f"Live as [bold]{job['fine_tuned_model']}[/bold]")
    console.print(f"Try: adapterhub chat {job['organization_id']}/{name}")


def follow(client: Client, job: str, label: str) -> dict[str, Any]:
    """Shows a job's progress until it has ended; returns it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[news]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None, news="waiting")
        while True:
            found = client.get(f"/v1/fine_tuning/jobs/{job}")
            _show(progress, task, client.get(f"/v1/fine_tuning/jobs/{job}/events", limit=1)["data"][0], found["status"])
            if found["status"] in _FINAL:
                return found
            time.sleep(_POLL_SECONDS)


def _show(progress: Progress, task: TaskID, event: dict[str, Any], status: str) -> None:
    data = event["data"]
    if status == "succeeded":
        progress.update(task, completed=progress.tasks[task].total or 1, total=progress.tasks[task].total or 1)
    elif data is not None:
        speed = f"{data['tokens_per_second']:.0f} tok/s"
        news = f"step {data['step']}/{data['total_steps']}  loss {data['train_loss']:.3f}  {speed}"
        progress.update(task, completed=data["step"], total=data["total_steps"], news=news)
    else:
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
