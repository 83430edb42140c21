"""Load on any server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import httpx
import numpy as np

from adapterhub.swap.generate import arrivals
from benchmarks.server import PROMPT

MAX_CONNECTIONS = 512


@dataclass(frozen=True)
class Answer:
    """One streamed completion: seconds to the first token and to the end, and how many tokens there were."""

    first: float
    whole: float
    tokens: int
    tier: str = ""
    gaps: tuple[float, ...] = ()  # seconds between one piece of text and the next

    @property
    def per_token(self) -> float:
        return (self.whole - self.first) / max(self.tokens - 1, 1)


@dataclass(frozen=True)
class Round:
    """A closed loop of streams that start together."""

    answers: list[Answer]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second of all streams together."""
        return sum(a.tokens for a in self.answers) / self.seconds

    @property
    def first_ms(self) -> float:
        return statistics.median(a.first for a in self.answers) * 1e3


class Load:
    def __init__(self, url: str, key: str = "none") -> None:
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {key}"},
            "timeout": 600,
            "limits": httpx.Limits(max_connections=MAX_CONNECTIONS),
        }

    def rounds(self, models: Sequence[str], streams: int, tokens: int, count: int) -> list[Round]:
        """`count` rounds after one to warm up; stream i asks for models[i % len(models)]."""
        asked = [models[i % len(models)] for i in range(streams)]
        return [self.round(asked, tokens) for _ in range(count + 1)][1:]

    def round(self, models: Sequence[str], tokens: int, prompt: Any = PROMPT) -> Round:
        """One stream for each of `models`, all at once."""

        async def run() -> Round:
            async with self.connect() as client:
                started = time.perf_counter()
                answers = await asyncio.gather(*(complete(client, model, tokens, prompt) for model in models))
                return Round(list(answers), time.perf_counter() - started)

        return asyncio.run(run())

    def one(self, model: str, tokens: int, prompt: Any) -> Answer:
        return self.round([model], tokens, prompt).answers[0]

    def connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options)


async def complete(client: httpx.AsyncClient, model: str, tokens: int, prompt: Any = PROMPT) -> Answer:
    """Exactly `tokens` greedy tokens, streamed."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    times: list[float] = []
    produced = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{model}: {answer.status_code} {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(f"{model}: {chunk['error']}")
            if chunk["choices"]:
                times.append(time.perf_counter())
            if chunk.get("usage"):
                produced = chunk["usage"]["completion_tokens"]
        tier = answer.headers.get("x-adapterhub-tier", "")
    gaps = tuple(after - before for before, after in pairwise(times))
    return Answer(times[0] - started, time.perf_counter() - started, produced, tier, gaps)


class Asked(NamedTuple):
    """One request of a trace: when it comes, in seconds, its prompt's tokens, and how many are to be answered."""

    at: float
    prompt: list[int]
    answer: int


def requests(count: int) -> list[Asked]:
    """Gamma arrivals, prompts and answers of [8, 64) tokens; the same ones each time."""
    chooser = np.random.default_rng(1)
    lengths = chooser.integers(8, 64, (count, 2)).tolist()
    return [
        Asked(at, chooser.integers(1000, 40_000, prompt).tolist(), answer)
        for at, (prompt, answer) in zip(arrivals(count).tolist(), lengths, strict=True)
    ]


async def replay(load: Load, models: Sequence[str], asked: Sequence[Asked]) -> list[Answer]:
    """Each request when it comes, for its model."""
    async with load.connect() as client:

        async def ask(model: str, one: Asked) -> Answer:
            await asyncio.sleep(one.at)
            return await complete(client, model, one.answer, one.prompt)

        return list(await asyncio.gather(*(ask(model, one) for model, one in zip(models, asked, strict=True))))
