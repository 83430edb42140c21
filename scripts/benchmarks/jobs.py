"""Training files and jobs for the benchmarks, through the HTTP API."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from adapterhub.base.text import TextCodec
from benchmarks.server import Server, base

POLL_SECONDS = 0.05
FINAL = ("succeeded", "failed", "cancelled")


# -- data


class Data(NamedTuple):
    """Examples of `length` tokens each, as a peer takes them and as a training file."""

    tokens: list[list[int]]
    lines: bytes


def data(seed: int, count: int, length: int, prompt: int) -> Data:
    """Words at random, of which the first `prompt` of each example are not learned."""
    codec, choose = TextCodec(base().tokenizer), random.Random(seed)
    words = _words(codec)
    tokens, lines = [], []
    for _ in range(count):
        ids = choose.choices(words, k=length - len(codec.end))
        parts = {"prompt": codec.decode(ids[:prompt]), "completion": codec.decode(ids[prompt:])}
        found = [t for part in parts.values() for t in codec.encode(part)] + codec.end
        assert len(found) == length, "words are tokens"
        tokens.append(found)
        lines.append(json.dumps(parts))
    return Data(tokens, "\n".join(lines).encode())


def _words(codec: TextCodec) -> list[int]:
    """Tokens that are a space and a word, and stay so beside each other."""
    texts = {t: codec.decode([t]) for t in range(1000, 20_000)}
    return [t for t, text in texts.items() if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]


# -- jobs


def upload(running: Server, lines: bytes) -> str:
    answer = running.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("data.jsonl", lines)})
    return answer.raise_for_status().json()["id"]


def create(running: Server, file: str, suffix: str, *, model: str | None = None, **hyperparameters: Any) -> str:
    """A job's id; it goes on from `model`, None: from the base."""
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    body = {"model": model or running.base, "training_file": file, "suffix": suffix, "seed": 0, "method": method}
    return running.client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]


def wait_until_together(running: Server, jobs: Sequence[tuple[Server, str]]) -> None:
    """Until all of the jobs, each with its owner, train at the same time."""
    while training(running)["runs"] < len(jobs):
        if any(look(user, job)["status"] in FINAL for user, job in jobs):
            raise SystemExit(f"one of {len(jobs)} jobs has ended before all of them trained at once")
        time.sleep(POLL_SECONDS)


def look(running: Server, job: str) -> dict[str, Any]:
    return running.client.get(f"/v1/fine_tuning/jobs/{job}").raise_for_status().json()


def wait_for(running: Server, job: str) -> dict[str, Any]:
    """The job, once it has succeeded."""
    while True:
        seen = look(running, job)
        if seen["status"] == "succeeded":
            return seen
        if seen["status"] in FINAL:
            raise SystemExit(f"{job} {seen['status']}: {seen['error']}")
        time.sleep(POLL_SECONDS)


def training(running: Server) -> dict[str, Any]:
    """What the engine says of it."""
    return running.tiers()["engine"]["training"]


@contextmanager
def endless_job(running: Server, lines: bytes, **hyperparameters: Any) -> Iterator[None]:
    """A job that trains for longer than the block takes."""
    job = create(running, upload(running, lines), "endless", n_epochs=100, **hyperparameters)
    try:
        before = training(running)["tokens"]
        while training(running)["tokens"] == before:
            time.sleep(POLL_SECONDS)
        yield
    finally:
        running.client.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
        while training(running)["runs"]:
            time.sleep(POLL_SECONDS)


def trained_while(running: Server, does: Callable[[], None]) -> float:
    """Tokens per second that training makes while something is done."""
    before, started = training(running)["tokens"], time.perf_counter()
    does()
    return (training(running)["tokens"] - before) / (time.perf_counter() - started)
