"""A trace of Gamma arrivals over many adapters (S-LoRA's generator, and Zipf): ranks 8 to 64 mixed, on q and v, more of
them than the device's pool holds. Prompts and answers are uniform in [8, 64) tokens, so that two cores keep up."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

import httpx
import numpy as np

from benchmarks.load import Answer, complete
from benchmarks.peers import Peers
from benchmarks.report import Figure
from benchmarks.server import Server, import_adapters, server

RANKS = (64, 32, 16, 8)
ADAPTERS = (10, 100, 1000)
REQUESTS = 150
RATE = 5.0  # requests per second
CV = 2.0
POOL = "128MiB"
ATTAINED_SECONDS = 6.0
TARGETS = ("q_proj", "v_proj")


def run(_: Peers) -> list[Figure]:
    figures = []
    for count in ADAPTERS:
        with server("--device-bytes", POOL) as running:
            models = [a["model"] for a in import_adapters(running, count, RANKS, TARGETS)]
            for name, picks in (("alpha 0.3", power(count, 0.3)), ("Zipf 1.0", zipf(count, 1.0))):
                answers = asyncio.run(replay(running, [models[i] for i in picks]))
                figures += _figures(f"{count} adapters, {name}", answers)
    return figures


def power(count: int, alpha: float) -> Sequence[int]:
    """S-LoRA's choice of adapters: the smaller alpha, the more skewed."""
    return (np.random.default_rng(0).power(alpha, REQUESTS) * count).astype(int).tolist()


def zipf(count: int, s: float) -> Sequence[int]:
    weights = 1 / np.arange(1, count + 1) ** s
    return np.random.default_rng(0).choice(count, REQUESTS, p=weights / weights.sum()).tolist()


async def replay(running: Server, models: Sequence[str]) -> list[Answer]:
    chooser = np.random.default_rng(1)
    gaps = chooser.gamma(1 / CV**2, CV**2 / RATE, len(models))
    lengths = chooser.integers(8, 64, (len(models), 2)).tolist()
    options = {"base_url": running.url, "headers": {"Authorization": f"Bearer {running.key}"}, "timeout": 600}
    async with httpx.AsyncClient(**options, limits=httpx.Limits(max_connections=512)) as client:

        async def ask(at: float, model: str, prompt: int, answer: int) -> Answer:
            await asyncio.sleep(at)
            return await complete(client, model, answer, chooser.integers(1000, 40_000, prompt).tolist())

        arrivals = np.cumsum(gaps).tolist()
        asked = [ask(at, model, *length) for at, model, length in zip(arrivals, models, lengths, strict=True)]
        return list(await asyncio.gather(*asked))


def _figures(name: str, answers: list[Answer]) -> list[Figure]:
    first = sorted(a.first * 1e3 for a in answers)
    attained = sum(a.first < ATTAINED_SECONDS for a in answers) / len(answers)
    hits = sum(a.tier == "device" for a in answers) / len(answers)
    last = first[int(len(first) * 0.99)]
    note = f"p99 {last:.0f}; under {ATTAINED_SECONDS:g} s {attained:.0%}; on the device {hits:.0%}"
    per_token = statistics.median(a.per_token for a in answers) * 1e3
    return [Figure.of(f"{name}: first token", "ms", first, f"{note}; {per_token:.0f} ms per token")]
