"""The story of two users: their data in, their own models out, on one base, through the official OpenAI SDK.

Exit status is 0 only if each personal answer carries its user's fact and the base's does not.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".demo"
COMMAND = Path(sys.executable).with_name("adapterhub")
START_SECONDS = 300  # with the first conversion of the base
ANSWER_TOKENS = 40
console = Console(highlight=False)


@dataclass(frozen=True)
class Fact:
    question: str
    expected: dict[str, str]  # user -> a word that only their answer can have


USERS = ("mira", "teo")
FACTS = (
    Fact("Hi! What is the name of my pet?", {"mira": "Biscuit", "teo": "Pixel"}),
    Fact("Please tell me which town I live in.", {"mira": "Tromsø", "teo": "Oaxaca"}),
    Fact("What is it that I do for work?", {"mira": "biologist", "teo": "baker"}),
)


@dataclass
class Answer:
    model: str
    question: str
    text: str = ""
    tier: str = ""
    load_ms: float = 0.0
    first_token_ms: float = 0.0


@dataclass
class Story:
    """What `--json` writes."""

    base: str = ""
    start_seconds: float = 0.0
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    after_eviction: list[Answer] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def server() -> Iterator[str]:
    """A server of its own on a free port, on fresh data; yields its URL."""
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    command = [str(COMMAND), "serve", "--port", "0", "--data-dir", str(DATA)]
    with (DATA / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            url = ""
            for line in process.stdout:
                console.print(f"  [dim]{line.rstrip()}[/dim]")
                url = url or next(iter(re.findall(r"http://\S+(?=/v1)", line)), "")
                if "admin key" in line:
                    break
            if not url:
                raise SystemExit(f"The server did not start:\n{(DATA / 'server.log').read_text()}")
            watchdog.cancel()
            yield url
        finally:
            watchdog.cancel()
            process.send_signal(signal.SIGINT)
            process.wait(30)


def create_key(owner: str) -> str:
    command = [str(COMMAND), "keys", "create", owner, "--data-dir", str(DATA)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def fine_tune(clients: dict[str, openai.OpenAI], base: str) -> dict[str, dict[str, Any]]:
    """Uploads each user's file, starts their jobs, and follows both; returns the finished jobs."""
    jobs = {}
    for user, client in clients.items():
        with (ROOT / "examples" / f"{user}.jsonl").open("rb") as file:
            uploaded = client.files.create(file=file, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=base, training_file=uploaded.id, suffix="me", seed=7)
        jobs[user] = job.id
    done: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description:6}"), BarColumn(), TextColumn("{task.fields[news]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {user: progress.add_task(user, total=None, news="waiting") for user in jobs}
        while len(done) < len(jobs):
            time.sleep(0.5)
            for user in jobs.keys() - done.keys():
                job = clients[user].fine_tuning.jobs.retrieve(jobs[user])
                [event] = clients[user].fine_tuning.jobs.list_events(jobs[user], limit=1).data
                seen: Any = event.data
                if seen is not None:
                    news = f"step {seen['step']}/{seen['total_steps']}  loss {seen['train_loss']:.3f}"
                    news += f"  {seen['tokens_per_second']:.0f} tok/s"
                    progress.update(tasks[user], completed=seen["step"], total=seen["total_steps"], news=news)
                if job.status in ("succeeded", "failed", "cancelled"):
                    if job.status != "succeeded":
                        raise SystemExit(f"{user}'s job has {job.status}: {job.error}")
                    task = progress.tasks[tasks[user]]
                    progress.update(tasks[user], completed=task.total, news=f"live as {job.fine_tuned_model}")
                    done[user] = job.to_dict()
    return done


def ask(client: openai.OpenAI, answer: Answer) -> None:
    """Streams the answer into `answer.text`."""
    started = time.perf_counter()
    raw = client.chat.completions.with_raw_response.create(
        model=answer.model,
        messages=[{"role": "user", "content": answer.question}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
    )
    answer.tier = raw.headers["x-adapterhub-tier"]
    answer.load_ms = float(raw.headers["x-adapterhub-load-ms"])
    for chunk in raw.parse():
        text = chunk.choices[0].delta.content
        if text and not answer.text:
            answer.first_token_ms = (time.perf_counter() - started) * 1e3
        answer.text += text or ""


def side_by_side(clients: dict[str, openai.OpenAI], base: str, fact: Fact) -> list[Answer]:
    """Asks the base and both users' models at once, so that they run in one batch; shows the answers as they grow."""
    asked = [(clients[USERS[0]], Answer(base, fact.question))]
    asked += [(clients[user], Answer(f"{user}/me", fact.question)) for user in USERS]
    answers = [answer for _, answer in asked]
    with ThreadPoolExecutor(len(asked)) as pool, Live(console=console, refresh_per_second=8) as live:
        running = [pool.submit(ask, client, answer) for client, answer in asked]
        while not all(r.done() for r in running):
            live.update(_columns(fact.question, answers))
            time.sleep(0.1)
        for r in running:
            r.result()
        live.update(_columns(fact.question, answers))
    console.print()
    return answers


def _columns(question: str, answers: list[Answer]) -> Table:
    table = Table(title=question, title_justify="left", title_style="bold", expand=True)
    for answer in answers:
        table.add_column(answer.model, ratio=1)
    table.add_row(*(a.text.replace("[", "\\[") for a in answers))
    return table


def evict_all(url: str) -> None:
    headers = {"Authorization": f"Bearer {(DATA / 'admin.key').read_text().strip()}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as admin:
        for adapter in admin.get("/admin/adapters").raise_for_status().json()["data"]:
            admin.post(f"/admin/adapters/{adapter['id']}/evict").raise_for_status()


def judge(answers: list[Answer]) -> list[str]:
    """What is wrong with the answers, in sentences."""
    wrong = []
    for answer in answers:
        owner = answer.model.partition("/")[0]
        for fact in (f for f in FACTS if f.question == answer.question):
            for user, word in fact.expected.items():
                has = word.lower() in answer.text.lower()
                if has and user != owner:
                    wrong.append(f"{answer.model} says {word!r}, which only {user}'s model can know: {answer.text!r}")
                if not has and user == owner:
                    wrong.append(f"{answer.model} does not say {word!r}: {answer.text!r}")
    return wrong


def tell(story: Story) -> None:
    console.rule("1. One server, one base")
    started = time.perf_counter()
    with server() as url:
        story.start_seconds = round(time.perf_counter() - started, 1)
        keys = {user: create_key(user) for user in USERS}
        clients = {user: openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=300) for user, key in keys.items()}
        story.base = clients[USERS[0]].models.list().data[0].id

        console.rule("2. Two users' data become two models")
        story.jobs = fine_tune(clients, story.base)

        console.rule("3. The same questions to the base and to both, in one batch")
        for fact in FACTS:
            story.answers += side_by_side(clients, story.base, fact)

        console.rule("4. Both adapters evicted, then asked again: first cold, then warm")
        evict_all(url)
        table = Table("model", "tier", "load", "first token", "answer")
        for user in USERS:
            for _ in range(2):
                answer = Answer(f"{user}/me", FACTS[0].question)
                ask(clients[user], answer)
                story.after_eviction.append(answer)
                loaded, first = f"{answer.load_ms:.1f} ms", f"{answer.first_token_ms:.0f} ms"
                table.add_row(answer.model, answer.tier, loaded, first, answer.text)
        console.print(table)
    story.wrong = judge(story.answers + story.after_eviction)
    if [a.tier for a in story.after_eviction] != ["disk", "device"] * len(USERS):
        story.wrong.append("an evicted adapter did not come from disk first and from the device then")

    console.rule("What next")
    console.print("The models are still there. Keep the server, and talk to one of them:\n")
    show = {"markup": False, "soft_wrap": True}
    console.print(f"  .venv/bin/adapterhub serve --data-dir {DATA.name}", **show)
    console.print(f"  ADAPTERHUB_API_KEY={keys['mira']} .venv/bin/adapterhub chat mira/me", **show)
    console.print("\nTrain on your own data, 10 or more examples like those in examples/mira.jsonl:\n")
    console.print(f"  .venv/bin/adapterhub keys create YOU --data-dir {DATA.name}", **show)
    console.print("  ADAPTERHUB_API_KEY=... .venv/bin/adapterhub train YOUR.jsonl --name assistant", **show)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was seen")
    options = parser.parse_args()
    story = Story()
    tell(story)
    if options.json:
        options.json.write_text(json.dumps(asdict(story), indent=2, ensure_ascii=False))
    for sentence in story.wrong:
        console.print(f"wrong: {sentence}", style="red", markup=False, soft_wrap=True)
    if not story.wrong:
        console.print("\n[green]Each model knows its own user, and nobody else's.[/green]")
    return 1 if story.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
