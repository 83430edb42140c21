"""A trace of Gamma arrivals over many adapters (S-LoRA's generator, and Zipf): ranks 8 to 64 mixed, on q and v, more of
them than the device's pool holds. Prompts and answers are uniform in [8, 64) tokens, so that two cores keep up."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
from figure import Figure

from adapterhub.swap.generate import arrivals, power, zipf
from benchmarks.load import Answer, complete
from benchmarks.peers import Setting
from benchmarks.server import Server, import_adapters, server

RANKS = (64, 32, 16, 8)
ADAPTERS = (10, 100, 1000)
REQUESTS = 150
POOL = "128MiB"
ATTAINED_SECONDS = 6.0
TARGETS = ("q_proj", "v_proj")


def run(setting: Setting) -> list[Figure]:
    figures = []
    curves: dict[str, list[float]] = {}
    for count in ADAPTERS:
        with server("--device-bytes", POOL) as running:
            models = [a["model"] for a in import_adapters(running, count, RANKS, TARGETS)]
            for name, picks in (("alpha 0.3", power(count, REQUESTS, 0.3)), ("Zipf 1.0", zipf(count, REQUESTS, 1.0))):
                answers = asyncio.run(replay(running, [models[i] for i in picks.tolist()]))
                title = f"{count} adapters, {name}"
                curves[title] = sorted(a.first * 1e3 for a in answers)
                figures.append(_figure(title, curves[title], answers))
    if setting.plots is not None:
        plot(curves, setting.plots / "trace.png")
    return figures


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """What share of requests had their first token within how long, one curve for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for title, first in curves.items():
        axes.step(first, np.arange(1, len(first) + 1) / len(first), where="post", label=title)
    axes.set(xscale="log", xlabel="time to first token (ms)", ylabel="share of requests", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


async def replay(running: Server, models: Sequence[str]) -> list[Answer]:
    chooser = np.random.default_rng(1)
    lengths = chooser.integers(8, 64, (len(models), 2)).tolist()
    options = {"base_url": running.url, "headers": {"Authorization": f"Bearer {running.key}"}, "timeout": 600}
    async with httpx.AsyncClient(**options, limits=httpx.Limits(max_connections=512)) as client:

        async def ask(at: float, model: str, prompt: int, answer: int) -> Answer:
            await asyncio.sleep(at)
            return await complete(client, model, answer, chooser.integers(1000, 40_000, prompt).tolist())

        times = arrivals(len(models)).tolist()
        asked = [ask(at, model, *length) for at, model, length in zip(times, models, lengths, strict=True)]
        return list(await asyncio.gather(*asked))


def _figure(name: str, first: list[float], answers: list[Answer]) -> Figure:
    attained = sum(a.first < ATTAINED_SECONDS for a in answers) / len(answers)
    hits = sum(a.tier == "device" for a in answers) / len(answers)
    last = first[int(len(first) * 0.99)]
    note = f"p99 {last:.0f}; under {ATTAINED_SECONDS:g} s {attained:.0%}; on the device {hits:.0%}"
    per_token = statistics.median(a.per_token for a in answers) * 1e3
    return Figure.of(f"{name}: first token", "ms", first, f"{note}; {per_token:.0f} ms per token")
