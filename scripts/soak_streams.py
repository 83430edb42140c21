"""Many streams at once, a third of them cut off at random: nothing leaks, and every other one is whole and right."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoModelForCausalLM

from tests.serving import BASE, PeftFiles, Server, User, eventually, running, save_base, small_config

OWNERS = 6
QUESTIONS = 4  # for each model
MOST_TOKENS = 24
CUT = 1 / 3
SECONDS = 300  # that anything may take


@dataclass(frozen=True)
class Question:
    user: User
    body: dict[str, Any]
    expected: str  # the whole answer, as it was alone


class Streams:
    def __init__(self, server: Server, adapters: list[PeftFiles], seed: int) -> None:
        self.server = server
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self._choose = random.Random(seed)
        self._questions = [question for number in range(OWNERS) for question in self._questions_of(number, adapters)]

    def _questions_of(self, number: int, adapters: list[PeftFiles]) -> list[Question]:
        user = self.server.user()
        made = user.import_adapter(adapters[number % len(adapters)], "mine")
        return [self._question(user, model, text) for model in (made["model"], BASE) for text in range(QUESTIONS)]

    def _question(self, user: User, model: str, number: int) -> Question:
        tokens = self._choose.randint(1, MOST_TOKENS)
        text = f"Question {number}: " + "and so on " * self._choose.randrange(6)
        body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        alone = user.http.post("/v1/completions", json=body).raise_for_status().json()
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return Question(user, body | streaming, alone["choices"][0]["text"])

    def round(self, count: int) -> None:
        """So many streams at once. Then everybody has gone, and nothing may be left."""
        asyncio.run(self._all_at_once(count))
        with suppress(AssertionError):
            eventually(lambda: not self._left(), seconds=SECONDS)
        if left := self._left():
            self.faults.append(f"left behind: {left}")
        self.server.hub.engine.check_integrity().result(SECONDS)

    async def _all_at_once(self, count: int) -> None:
        everything = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=SECONDS, limits=everything) as client:
            asked = [self._choose.choice(self._questions) for _ in range(count)]
            cuts = [self._choose.random() if self._choose.random() < CUT else None for _ in range(count)]
            await asyncio.gather(*(self._ask(client, *each) for each in zip(asked, cuts, strict=True)))

    async def _ask(self, client: httpx.AsyncClient, question: Question, cut: float | None) -> None:
        """`cut`: hangs up after that part of the events, or before the first where that is very little."""
        headers = {"Authorization": f"Bearer {question.user.key}"}
        after = None if cut is None else int(cut * (question.body["max_tokens"] + 2))
        request = client.build_request("POST", "/v1/completions", json=question.body, headers=headers)
        if after == 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.001 + 0.2 * (cut or 0)):
                    answer = await client.send(request, stream=True)
                    await answer.aclose()
            self.counts["cut before an answer"] += 1
            return
        answer = await client.send(request, stream=True)
        events: list[str] = []
        try:
            if answer.status_code != 200:
                self.faults.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
                return
            async for line in answer.aiter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                if len(events) == after:
                    break
        finally:
            await answer.aclose()
        if after is None or len(events) < after:
            self._check(question, events)
        else:
            self.counts["cut amid an answer"] += 1

    def _check(self, question: Question, events: list[str]) -> None:
        if not events or events[-1] != "[DONE]":
            self.faults.append(f"a stream ended with {events[-1:]}")
            return
        chunks = [json.loads(event) for event in events[:-1]]
        choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
        said = "".join(choice["text"] for choice in choices)
        if said != question.expected:
            self.faults.append(f"{question.body['model']} said {said!r} and not {question.expected!r}")
        if choices[-1]["finish_reason"] != "length":
            self.faults.append(f"a stream finished with {choices[-1]}")
        if chunks[-1]["usage"]["completion_tokens"] != question.body["max_tokens"]:
            self.faults.append(f"a stream of {question.body['max_tokens']} tokens says {chunks[-1]['usage']}")
        self.counts["whole"] += 1

    def _left(self) -> dict[str, int]:
        engine = self.server.engine_stats()
        left = {
            "running": engine["running"],
            "waiting": engine["waiting"],
            "requests": self.server.gate.inside,
            "streams": len(self.server.hub._streams),
            "pinned for requests": self.server.hub.engine.stats().result(SECONDS)["tiers"]["device"]["in_use"],
        }
        return {name: count for name, count in left.items() if count}


def soak_streams(options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = save_base(directory / BASE)
        model = AutoModelForCausalLM.from_pretrained(base)
        adapters = [PeftFiles(model, directory / f"peft{seed}", seed=seed, r=2 + seed) for seed in range(3)]
        # in 16 bits the native code runs where it can, which gives the same numbers alone and among others
        config = small_config(base, directory / "data", dtype="bfloat16", kv_bytes=2**20, device_bytes=2**16)
        with running(config) as server:
            streams = Streams(server, adapters, options.seed)
            for _ in range(options.rounds):
                started = time.perf_counter()
                streams.round(options.streams)
                print(f"{options.streams} streams in {time.perf_counter() - started:.0f} s", flush=True)
            print(", ".join(f"{count} {what}" for what, count in streams.counts.items()))
            return streams.faults
