"""A trace of Gamma arrivals over many adapters (S-LoRA's generator, and Zipf): ranks 8 to 64 mixed, on q and v, more of
them than the device's pool holds. Prompts and answers are uniform in [8, 64) tokens, so that two cores keep up. Of
10,000 adapters only those that are asked for are written: all together would be 35 GB.

And what a replay of the server's own trace says of its hits, beside what the server counted: for each policy, 3,000
requests in four streams by Zipf's law over 2,000 adapters of ranks 1, 2 and 4 on q, with room for 32 of them on the
device and for 256 in RAM."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
from figure import Figure

from adapterhub.swap.frames import Trace, read_trace
from adapterhub.swap.generate import arrivals, power, zipf
from adapterhub.swap.policies import Policy
from adapterhub.swap.registry import Version
from adapterhub.swap.simulate import Budgets, simulate
from adapterhub.swap.simulate import Setting as Replayed
from benchmarks.load import Answer, Load, complete
from benchmarks.peers import Setting
from benchmarks.server import Server, base, chosen, server
from benchmarks.stored import publish

RANKS = (64, 32, 16, 8)
ADAPTERS = (10, 100, 1000, 10_000)
ALL_WRITTEN = 1000  # of more adapters than that only those that are asked for
REQUESTS = 150
POOL = "128MiB"
ATTAINED_SECONDS = 6.0
TARGETS = ("q_proj", "v_proj")

COUNTED_ADAPTERS, COUNTED_REQUESTS, SKEW = 2000, 3000, 1.0
COUNTED_RANKS, COUNTED_TARGETS = (1, 2, 4), ("q_proj",)
ON_DEVICE, IN_RAM = 32, 256  # adapters
STREAMS = 4
POLICIES = tuple(Policy)
RECORDED_SECONDS = 30  # by when the last use should be in the trace


def run(setting: Setting) -> list[Figure]:
    figures: list[Figure] = []
    curves: dict[str, list[float]] = {}
    for count in ADAPTERS:
        for title, answers in _replayed(count).items():
            curves[title] = sorted(a.first * 1e3 for a in answers)
            figures.append(_figure(title, curves[title], answers))
    if setting.plots is not None:
        plot(curves, setting.plots / "trace.png")
    return [*figures, *(figure for policy in POLICIES for figure in _counted(policy))]


def _replayed(count: int) -> dict[str, list[Answer]]:
    """By what was asked for."""
    laws = {"alpha 0.3": power(count, REQUESTS, 0.3), "Zipf 1.0": zipf(count, REQUESTS, 1.0)}
    asked = np.unique(np.concatenate(list(laws.values()))).tolist()
    written = range(count) if count <= ALL_WRITTEN else asked
    made: list[Version] = []
    with server("--device-bytes", POOL, prepare=lambda data: made.extend(publish(data, written, RANKS, TARGETS))) as it:
        models = {index: version.alias for index, version in zip(written, made, strict=True)}
        there = "" if len(made) == count else f" ({len(made)} of them written)"
        return {
            f"{count} adapters{there}, {law}": asyncio.run(replay(it, [models[i] for i in picks.tolist()]))
            for law, picks in laws.items()
        }


def _counted(policy: Policy) -> list[Figure]:
    """Hits of the device and of RAM as the server counts them, beside those of a replay of its trace."""
    layout, made = chosen(COUNTED_TARGETS), list[Version]()
    size = sum(layout.numel(rank) * base().dtype.itemsize for rank in COUNTED_RANKS) // len(COUNTED_RANKS)
    budgets = Budgets(ON_DEVICE * size, IN_RAM * size)
    replayed = Replayed(budgets, policy)
    options = ("--device-bytes", str(budgets.device), "--ram-bytes", str(budgets.ram))
    indices = range(COUNTED_ADAPTERS)
    with server(*options, prepare=lambda d: made.extend(publish(d, indices, COUNTED_RANKS, COUNTED_TARGETS))) as it:
        rules = {tier: {"policy": policy} for tier in ("device", "ram")}
        it.client.put("/admin/policy", json=rules).raise_for_status()
        picks = zipf(COUNTED_ADAPTERS, COUNTED_REQUESTS, SKEW).tolist()
        asyncio.run(_ask_in_streams(it, [made[i].alias for i in picks]))
        tiers = it.tiers()["tiers"]
        outcome = simulate(_recorded(it, COUNTED_REQUESTS), budgets, replayed.rules)
    name = f"Zipf {SKEW} over {COUNTED_ADAPTERS}, {policy}"
    figures = []
    for tier, predicted in (("device", outcome.device_hits), ("ram", outcome.ram_hits)):
        shares = [100 * hits / COUNTED_REQUESTS for hits in (tiers[tier]["hits"], predicted)]
        note = f"a replay of its trace says {shares[1]:.2f}: {shares[0] - shares[1]:+.2f} points"
        figures.append(Figure.of(f"{name}: found in {tier}", "%", shares[:1], note))
    return figures


async def _ask_in_streams(running: Server, models: Sequence[str]) -> None:
    """One token of each model in turn, by whichever stream is free."""
    left = iter(models)

    async with Load(running.url, running.key).connect() as client:

        async def stream() -> None:
            for model in left:
                await complete(client, model, 1)

        await asyncio.gather(*(stream() for _ in range(STREAMS)))


def _recorded(running: Server, uses: int) -> Trace:
    """The server's trace, once all of `uses` are in it."""
    deadline = time.monotonic() + RECORDED_SECONDS
    while len(trace := read_trace(running.data / "trace")) < uses:
        if time.monotonic() > deadline:
            raise SystemExit(f"after {RECORDED_SECONDS} s the trace has {len(trace)} of {uses} uses")
        time.sleep(0.1)
    return trace


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
